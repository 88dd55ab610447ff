"""Which trained generator to use, by the name a person has for it, and how to run it.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from experiments.claims import PROFILES
from experiments.deblur.card import card_of
from experiments.errors import UserError
from experiments.records import Record
from experiments.store import read_json, read_run

PAPER, BEST = "face_deblur", "naf_full"
AVERAGED, NET = "averaged.module.", "net."
RANKED_BY = "near_linear/psnr/gain"


@dataclass(frozen=True)
class Facts:
    """What is known of a generator's weights, all of it written into its ONNX file: the names of its run, the commit of the
    code it was trained with, the side in pixels of the faces it was trained on, the licences, and its model card.
    """

    ablation: str
    data: str
    profile: str
    seed: int
    signature: str
    commit: str
    size: int
    licence: str
    card: str
    paper: str = PAPER

    @property
    def name(self) -> str:
        """Return how messages call it."""
        return f"{self.ablation} on {self.data}, seed {self.seed} ({self.profile}), run {self.signature[:10]}"


@dataclass(frozen=True)
class Restorer:
    """A generator ready for use: `run` maps float32 images (B, 3, H, W) in [0, 1] on `device` to such, for any H and W."""

    run: Callable[[Tensor], Tensor]
    device: torch.device
    facts: Facts

    def __call__(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Restore images, float32 in [0, 1]; grey ones (C = 1) go in as three equal channels and come out as their mean.

        Raises:
            FloatingPointError: the generator answers with values that are not finite.
        """
        x_BCHW = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        with torch.inference_mode():
            y_BCHW = self.run(x_BCHW.contiguous().to(self.device)).float().cpu()
        if not bool(torch.isfinite(y_BCHW).all()):
            raise FloatingPointError(f"the generator ({self.facts.name}) answers with values that are not finite")
        grey = images_BHWC.shape[-1] == 1
        return (y_BCHW.mean(1, keepdim=True) if grey else y_BCHW).permute(0, 2, 3, 1).numpy()


class Clamped(nn.Module):
    """A generator with its result clamped to [0, 1], as it is tested."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, blurred: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to restored ones."""
        return self.net(blurred).clamp(0, 1)


def load(word: str | None, runs: Path, device: torch.device) -> Restorer:
    """Return the generator that `find` finds.

    Raises:
        UserError: see `find`, `load_net` and `load_onnx`.
    """
    file = find(word, runs)
    if file.suffix == ".onnx":
        return load_onnx(file, device)
    net, facts = load_net(file)
    return Restorer(net.to(device), device, facts)


def find(word: str | None, runs: Path) -> Path:
    """Return the checkpoint or ONNX file that is meant.

    Args:
        word: a run's folder, a checkpoint in one, an .onnx file, an ablation of paper 2, whose newest finished run is taken,
            or the start of a signature; None for the finished run of naf_full that gains most, the larger profile first.
        runs: where runs lie.
    Raises:
        UserError: there is none, with what to do.
    """
    if word is None:
        return _weights(max(_finished(BEST, runs), key=_merit))
    path = Path(word)
    if path.is_file() or path.suffix in (".onnx", ".ckpt"):
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        if path.suffix not in (".onnx", ".ckpt"):
            raise UserError(f"{path} is neither a checkpoint (.ckpt) nor an exported generator (.onnx)")
        return path
    from experiments.cell import ablations

    if word in ablations(PAPER):
        return _weights(max(_finished(word, runs), key=_age))
    return _inside(path) if path.is_dir() else _by_signature(word, runs)


def _by_signature(word: str, runs: Path) -> Path:
    from experiments.cell import ablations
    from experiments.inspection import find_run
    from experiments.schema import nearest

    if not all(letter in "0123456789abcdef" for letter in word):
        raise UserError(
            f"'{word}' is no run's folder, no .ckpt or .onnx file, no signature, and no ablation of paper 2"
            f"{nearest(word, ablations(PAPER))}"
        )
    record = find_run(word, runs)
    if record.key.paper != PAPER:
        raise UserError(f"run {record.signature} is of another paper: {record.key}")
    return _weights(record)


def _finished(ablation: str, runs: Path) -> list[Record]:
    """The finished runs of an ablation; those of the smoke profile, which decide nothing, only where there are no others.

    Raises:
        UserError: there are none.
    """
    found = []
    for file in sorted(runs.glob("*/manifest.json")):
        with suppress(json.JSONDecodeError, KeyError, TypeError):  # a damaged folder hides no other
            manifest = read_json(file)
            if (manifest["paper"], manifest["ablation"]) == (PAPER, ablation) and file.with_name("done.json").exists():
                found.append(read_run(file.parent))
    if not found:
        raise UserError(
            f"there is no trained generator yet: no finished run of {ablation} under {runs}. `make reproduce-paper-2` trains "
            f"all of paper 2 in minutes, `fivefold reproduce 2 --only {ablation} --seeds 1` this one alone; or give "
            "--weights a run's folder, a best.ckpt, or an .onnx file of `fivefold deblur-export`"
        )
    return [record for record in found if record.key.profile != "smoke"] or found


def _merit(record: Record) -> tuple[float, ...]:
    return PROFILES.index(record.key.profile), record.metrics.get(RANKED_BY, float("-inf")), _age(record)


def _age(record: Record) -> int:
    return (record.path / "done.json").stat().st_mtime_ns


def _weights(record: Record) -> Path:
    return _inside(record.path)


def _inside(folder: Path) -> Path:
    if not (folder / "best.ckpt").is_file():
        untrained = "" if not read_json(folder / "done.json") else ": what it tested is computed, not trained"
        raise UserError(f"{folder} holds no best.ckpt{untrained}; give a run of a generator of paper 2, such as {BEST}")
    return folder / "best.ckpt"


def load_net(checkpoint: Path) -> tuple[Clamped, Facts]:
    """Return the generator of a checkpoint as it is tested, the averaged one where there is one, and what is known of it.

    Nothing that the files name is run but classes of lit_modules.nets.

    Raises:
        UserError: no configuration beside it, another paper's, or weights that do not fit it.
    """
    from hydra.utils import instantiate

    folder = checkpoint.parent
    if not (folder / "config.yaml").is_file():
        raise UserError(f"there is no {folder / 'config.yaml'}; a checkpoint must lie in its run's folder")
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    target = str(config.get("net", {}).get("_target_", ""))
    if config.get("paper") != PAPER or not target.startswith("lit_modules.nets.deblur_"):
        raise UserError(f"{folder / 'config.yaml'} is not of a generator of paper 2, but of {target or 'nothing'}")
    net: nn.Module = instantiate(config["net"])
    try:
        state: dict[str, Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        prefix = AVERAGED if any(name.startswith(AVERAGED) for name in state) else NET
        net.load_state_dict({n.removeprefix(prefix): w for n, w in state.items() if n.startswith(prefix)})
    except Exception as error:  # a damaged file raises what it will
        words = " ".join(str(error).split())
        raise UserError(f"{checkpoint} does not fit {folder / 'config.yaml'}: {words[:300]}") from error
    return Clamped(net).eval(), facts_of(folder, config, sum(p.numel() for p in net.parameters()))


def facts_of(folder: Path, config: dict[str, Any], params: int) -> Facts:
    """Return what a run's folder says of its weights; what it does not say is "unknown"."""
    manifest, metrics = read_json(folder / "manifest.json"), read_json(folder / "metrics.json")
    cards = manifest.get("data_cards", [])
    return Facts(
        ablation=str(manifest.get("ablation", "unknown")),
        data=str(config["data"]["name"]),
        profile=str(manifest.get("profile", "unknown")),
        seed=int(config["seed"]),
        signature=str(manifest.get("signature", folder.name)),
        commit=f"{manifest.get('commit', 'unknown')}{' and changes' if manifest.get('dirty') else ''}",
        size=int(config["datamodule"]["size"]),
        licence="code Apache-2.0; faces: " + ("; ".join(str(card["licence"]) for card in cards) or "unknown"),
        card=card_of(config, manifest, metrics, params),
    )


def load_onnx(file: Path, device: torch.device) -> Restorer:
    """Return an exported generator, run by onnxruntime.

    Raises:
        UserError: onnxruntime is not installed, or the file is not one of `fivefold deblur-export`.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("an .onnx file needs onnxruntime: install the extra, `pip install 'fivefold[onnx]'`") from None
    gpu = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if device.type == "cuda" else []
    there = [each for each in gpu if each[0] in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(file), providers=[*there, "CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map
        facts = Facts(**{field.name: _typed(field.type, told[field.name]) for field in fields(Facts)})
    except KeyError as error:
        raise UserError(f"{file} does not say its {error.args[0]}: it is not of `fivefold deblur-export`") from None
    except Exception as error:  # of the library's own types
        raise UserError(f"{file} cannot be run: {error}") from error
    (name,) = (each.name for each in session.get_inputs())

    def run(x_BCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x_BCHW.cpu().numpy()})[0])

    return Restorer(run, torch.device("cpu"), facts)


def told_of(facts: Facts) -> dict[str, str]:
    """Return the facts as an ONNX file holds them."""
    return {name: str(value) for name, value in asdict(facts).items()}


def _typed(kind: Any, text: str) -> Any:
    return int(text) if kind == "int" else text


def device_of(word: str) -> torch.device:
    """Return a device by its name, or with "auto" the first GPU where there is one.

    Raises:
        UserError: no such device, or none here.
    """
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device '{word}' cannot be used: {str(error).splitlines()[0]}") from None
    return device
