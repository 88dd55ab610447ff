"""What is reported of restored faces is what the definitions say, image by image and in the mean."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.blur_convolve import convolve
from datamodules.blur_kernels import kernel_extent
from datamodules.blur_motion import FACE_WIDTH
from datamodules.face_deblur import FaceDeblurData, Pairs
from experiments.per_image import image_values
from experiments.records import CellKey, Record
from lit_modules.deblur_classical import STRENGTHS as STRENGTHS_OF
from lit_modules.deblur_classical import KnownKernel, deconvolve
from lit_modules.deblur_report import STRENGTHS, DeblurReport
from lit_modules.ops.image_quality import psnr, ssim


def _pairs(count: int = 6, side: int = 32, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    sharp = torch.nn.functional.avg_pool2d(torch.rand(count, 3, side + 4, side + 4, generator=generator), 5, stride=1)
    lengths = [1, 3, 5, 7, 9, 11]
    kernels = torch.zeros(count, 15, 15)
    for kernel, length in zip(kernels, lengths, strict=False):
        kernel[7, 7 - length // 2 : 8 + length // 2] = 1 / length
    return Pairs(convolve(sharp, kernels), sharp, torch.arange(count), kernels)


def _filled(report: DeblurReport, pairs: Pairs, restored: torch.Tensor, folder: Path) -> dict[str, float]:
    report.start(["first", "second"])
    report.add(0, pairs, restored, lambda x: x)
    report.add(1, pairs, pairs.blurred, lambda x: x)
    return report.finish(folder)


def test_means_and_gains_are_those_of_the_images(tmp_path: Path) -> None:
    pairs = _pairs()
    restored = (pairs.blurred + pairs.sharp) / 2
    found = _filled(DeblurReport(judge=False), pairs, restored, tmp_path)
    finite = slice(1, None)  # the first kernel is one pixel: nothing is blurred, and the PSNR is infinite
    expected = psnr(restored, pairs.sharp)[finite].mean() - psnr(pairs.blurred, pairs.sharp)[finite].mean()
    assert expected > 3
    assert found["first/psnr/gain"] == pytest.approx(float(expected), rel=1e-5)
    assert found["first/ssim/restored"] == pytest.approx(100 * float(ssim(restored, pairs.sharp).mean()), rel=1e-5)
    assert found["second/ssim/gain"] == 0
    with open(tmp_path / "images.csv") as handle:
        rows = list(csv.DictReader(handle))
    of = {name: [row for row in rows if row["set"] == name] for name in ("first", "second", "unblurred")}
    assert all([int(row["index"]) for row in table] == list(range(6)) for table in of.values())
    assert float(of["first"][3]["psnr/restored"]) == pytest.approx(float(psnr(restored, pairs.sharp)[3]), rel=1e-4)
    assert of["first"][0]["psnr/blurred"] == "inf"


def test_metrics_are_the_means_of_what_is_read_image_by_image(tmp_path: Path) -> None:
    """Of faces, with the judge: what claims test image by image is what the tables show."""
    data = FaceDeblurData("procedural_faces", 4, seed=0, train_samples=1, val_samples=1, test_samples=12)
    data.setup()
    report = DeblurReport(judge=True)
    report.start(data.test_names)
    for number, loader in enumerate(data.test_dataloader()):
        for crops in loader:
            pairs = data.pairs(crops)
            report.add(number, pairs, 0.6 * pairs.blurred + 0.4 * pairs.sharp, lambda x: 0.9 * x)
    found = report.finish(tmp_path)
    record = Record(CellKey("face_deblur", "a", "procedural_faces", 0, "smoke"), "s", "done", tmp_path)
    names = [name for name in found if name.split("/")[-2].split("_")[0] in ("psnr", "ssim", "prob", "iou", "detected")]
    names = [name for name in names if not name.endswith("recovery")]
    assert len(names) > 40
    assert {name.split("/")[0] for name in names} == {"near_linear", "deblurgan", "strength", "unblurred"}
    for name in names:
        values = list(image_values(record, name).values())
        if name.split("/")[-1] in ("blurred", "restored", "gain"):
            assert found[name] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-3), name


def test_images_fall_into_bins_by_the_measured_extent_of_their_kernels(tmp_path: Path) -> None:
    pairs = _pairs()
    found = _filled(DeblurReport(judge=False), pairs, pairs.sharp, tmp_path)
    counts = {n.split("/")[1]: v for n, v in found.items() if n.startswith("strength/") and n.endswith("/n")}
    widths = kernel_extent(pairs.kernels).numpy() / (FACE_WIDTH * 32)
    expected, _ = np.histogram(widths, [*STRENGTHS, np.inf])
    assert 0 < sum(expected) < len(widths)  # the weakest is below every bin
    assert counts == {f"{edge:g}": count for edge, count in zip(STRENGTHS, expected, strict=True) if count}


def test_pictures_are_the_first_images_of_the_first_set(tmp_path: Path) -> None:
    pairs = _pairs()
    _filled(DeblurReport(judge=False, pictures=2), pairs, pairs.sharp, tmp_path)
    with np.load(tmp_path / "pictures.npz") as opened:
        assert opened["sharp"].shape == (2, 32, 32, 3)
        assert opened["sharp"].dtype == np.uint8
        assert np.array_equal(opened["sharp"], opened["restored"])
        assert not np.array_equal(opened["sharp"][1], opened["blurred"][1])
        assert opened["index"].tolist() == [0, 1]


def test_a_judged_report_has_every_version_and_its_recovery(tmp_path: Path) -> None:
    data = FaceDeblurData("procedural_faces", 4, 0, size=64, train_faces=4, val_samples=4, test_samples=4)
    data.setup()
    report = DeblurReport(judge=True)
    report.start(data.test_names)
    for number, loader in enumerate(data.test_dataloader()):
        for crops in loader:
            pairs = data.pairs(crops)
            report.add(number, pairs, pairs.sharp, lambda x: x)
    found = report.finish(tmp_path)
    assert found["near_linear/n/sharp"] == 4  # procedural faces are found
    for indicator in ("detected_0.7", "detected_0.99", "prob", "iou"):
        sharp, restored = (found[f"near_linear/{indicator}/{v}"] for v in ("sharp", "restored"))
        assert restored == pytest.approx(sharp)  # nothing was lost, since the sharp images themselves were handed in
        if found[f"near_linear/{indicator}/blurred"] < sharp:
            assert found[f"near_linear/{indicator}/recovery"] == pytest.approx(100)
    assert found["near_linear/iou/blurred"] < 100
    assert found["near_linear/landmark_error/restored"] == pytest.approx(0, abs=1e-4)
    with np.load(tmp_path / "pictures.npz") as opened:
        assert opened["faces/sharp"].shape == (4, 15)


def _framed() -> Pairs:
    """Texture inside a plain frame wider than the kernels, so that nothing moves over the border."""
    pairs = _pairs(side=64)
    frame = torch.zeros(64, 64)
    frame[16:48, 16:48] = 1
    sharp, kernels = 0.5 + frame * (pairs.sharp - 0.5), pairs.kernels
    return Pairs(convolve(sharp, kernels)[2:], sharp[2:], pairs.index[2:], kernels[2:])


@pytest.mark.parametrize(("method", "strength"), [("wiener", 0.003), ("richardson_lucy", 20)])
def test_the_true_kernel_takes_blur_away_and_a_wrong_one_does_not(method: str, strength: float) -> None:
    pairs = _framed()
    restored = deconvolve(pairs.blurred, pairs.kernels, method, strength)
    wrong = deconvolve(pairs.blurred, pairs.kernels.transpose(1, 2), method, strength)
    before, after = psnr(pairs.blurred, pairs.sharp), psnr(restored, pairs.sharp)
    assert (after > before + 1).all(), after - before
    assert (psnr(wrong, pairs.sharp) < before).all()
    assert restored.shape == pairs.sharp.shape


def test_the_strength_is_the_best_of_those_on_validation() -> None:
    pairs = _framed()
    batches = SimpleNamespace(val_dataloader=lambda: [pairs], on_after_batch_transfer=lambda batch, _: batch)
    for method, strengths in STRENGTHS_OF.items():
        module = KnownKernel(torch.nn.Identity(), DeblurReport(judge=False), method)
        module._trainer = SimpleNamespace(datamodule=batches)  # type: ignore[assignment]
        module.on_test_start()
        found = {
            s: float(psnr(deconvolve(pairs.blurred, pairs.kernels, method, s), pairs.sharp).mean()) for s in strengths
        }
        assert module.strength == max(found, key=lambda s: found[s])
        assert max(found.values()) > min(found.values())
    with pytest.raises(ValueError, match="unknown method 'inverse'; known: wiener, richardson_lucy"):
        KnownKernel(torch.nn.Identity(), DeblurReport(judge=False), "inverse")
