"""The model card of a trained generator: what it saw, what it does to test faces, and what it must not be used for."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

WIDTH = 100
WARNINGS = (
    "It may invent detail: eyes, mouths, glasses and hair can come out sharp and wrong, and a face may come to look like "
    "another person's. What it shows is a guess.",
    "Not for identification: no restored face is evidence of who somebody is, for people or for programs that compare faces.",
    "It takes off motion blur of the kind it was trained on. Defocus, noise, strong compression, and motion that differs "
    "within a face are not what it has learnt; it may leave them, or make them worse.",
    "The faces it was trained on are not a fair sample of people: expect it to do worse on those who are unlike them.",
)


def card_of(config: Mapping[str, Any], manifest: Mapping[str, Any], metrics: Mapping[str, float], params: int) -> str:
    """Return the card as plain text, a sentence or two per line.

    Args:
        config, manifest, metrics: of the run; what they do not say is left out or said to be unknown.
        params: weights of the generator.
    """
    data = config["datamodule"]
    size, net = data["size"], str(config["net"]["_target_"]).rsplit(".", 1)[-1]
    lines = [
        f"Model card: {manifest.get('ablation', 'a generator')} of paper 2 (reconstruction after arXiv 2103.02121), {net}, "
        f"{params:,} parameters, run {manifest.get('signature', 'unknown')}",
        f"Trained on: {_faces(manifest)}; aligned, {size} x {size} pixels.",
        f"Blur: {_blur(data, size)}",
        f"Training: {_training(manifest, metrics)}",
        *_tests(metrics),
        *WARNINGS,
    ]
    return "\n".join(fill(line, WIDTH, subsequent_indent="  ", break_long_words=False) for line in lines)


def _faces(manifest: Mapping[str, Any]) -> str:
    cards = manifest.get("data_cards", [])
    told = (
        f"{card['name']}, {'photographs' if card['real'] else 'drawn by rule, not photographs'}, licence: {card['licence']}"
        for card in cards
    )
    return "; ".join(told) or "unknown faces"


def _blur(data: Mapping[str, Any], size: int) -> str:
    from datamodules.blur_motion import FACE_WIDTH, preset

    law = data["motion"]
    if not isinstance(law, str):
        return f"synthetic, of the law {dict(law)}, the same all over the face."
    motion = preset(law)
    name = f"synthetic, preset '{law}' (kind {motion.kind})"
    if motion.parametrise == "length":
        return f"{name}, paths of {motion.length[0] * size:.3g} to {motion.length[1] * size:.3g} pixels, the same all over."
    low, high = motion.extent
    return (
        f"{name}, {low * size:.3g} to {high * size:.3g} pixels wide at that size, which is {low / FACE_WIDTH:.2f} to "
        f"{high / FACE_WIDTH:.2f} face widths, the same all over the face."
    )


def _training(manifest: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    pairs = f"{metrics['train/samples']:,.0f} pairs" if "train/samples" in metrics else "an unknown number of pairs"
    parent = f", from the weights of {manifest['parent']['ablation']}" if manifest.get("parent") else ""
    smoke = (
        "; a smoke run, for tests: do not expect it to restore anything" if manifest.get("profile") == "smoke" else ""
    )
    return f"profile {manifest.get('profile', 'unknown')}, {pairs}{parent}{smoke}."


def _tests(metrics: Mapping[str, float]) -> list[str]:
    """What was measured on faces of people it had not seen, set by set."""
    lines = []
    for name in sorted({key.split("/")[0] for key in metrics if key.endswith("/psnr/restored")} - {"unblurred"}):
        told = [
            f"{label} {metrics[f'{name}/{key}/blurred']:.4g} blurred, {metrics[f'{name}/{key}/restored']:.4g} restored{unit}"
            for key, label, unit in (
                ("psnr", "PSNR", " (dB)"),
                ("ssim", "SSIM", " (%)"),
                ("detected_0.7", "faces that MTCNN finds", " (%)"),
            )
            if f"{name}/{key}/blurred" in metrics and f"{name}/{key}/restored" in metrics
        ]
        if told and not name.startswith("strength"):
            lines.append(f"Measured on test set {name}: {'; '.join(told)}.")
    if (kept := metrics.get("unblurred/psnr/restored")) is not None:
        lines.append(f"A sharp face comes out with a PSNR of {kept:.4g} dB against what it was.")
    return lines
