"""What the tests of paper 2's tools work on: untrained generators in run folders, and photographs of every kind."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from experiments.cli import app
from lit_modules.nets.deblur_naf import DeblurNAF

NAF = {"width": 4, "encoder": [1, 1], "middle": 1, "decoder": [1, 1]}
SIZE = 64
FACE = (181, 62, 268, 172)  # MTCNN's box of the astronaut


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def identity(net: nn.Module) -> None:
    """Make a generator return what it is given: what is added to the image is 0."""
    nn.init.zeros_(net.ending.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(net.ending.bias)  # type: ignore[union-attr, arg-type]


def brighter(net: nn.Module) -> None:
    """Make it add 26 of 255, which depends on no neighbour."""
    identity(net)
    nn.init.constant_(net.ending.bias, 26 / 255)  # type: ignore[union-attr, arg-type]


def shaken(net: nn.Module) -> None:
    """Make all of its layers count."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def run(
    home: Path,
    change: Callable[[nn.Module], None],
    signature: str = "ab12" + 16 * "0",
    *,
    ablation: str = "naf_full",
    profile: str = "small",
    paper: str = "face_deblur",
    gain: float = 1.0,
    averaged: Callable[[nn.Module], None] | None = None,
    finished: bool = True,
    target: str = "lit_modules.nets.deblur_naf.DeblurNAF",
) -> Path:
    """Write a run's folder as `experiments.run` does, with weights of our making."""
    folder = home / "runs" / signature
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    net = DeblurNAF(**NAF)  # type: ignore[arg-type]
    change(net)
    state = {f"net.{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    if averaged is not None:
        averaged(net)
        state |= {f"averaged.module.{name}": tensor for name, tensor in net.state_dict().items()}
        state["averaged.n_averaged"] = torch.tensor(3)
    torch.save({"state_dict": state, "hyper_parameters": {"pixel": "psnr"}, "epoch": 3}, folder / "best.ckpt")
    datamodule = {"name": "faces", "size": SIZE, "motion": "training"}
    config = {"paper": paper, "seed": 0, "data": {"name": "faces"}, "net": {"_target_": target, **NAF}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"datamodule": datamodule, "profile": profile}))
    card = {"name": "faces", "n": 783, "licence": "CC BY 4.0", "real": True, "sha256": "", "source": "", "note": ""}
    manifest = {"paper": paper, "ablation": ablation, "data": "faces", "seed": 0, "profile": profile}
    manifest |= {"signature": signature, "commit": "c0ffee", "dirty": False, "data_cards": [card]}
    metrics = {
        "near_linear/psnr/gain": gain,
        "near_linear/psnr/blurred": 22.0,
        "near_linear/psnr/restored": 22.0 + gain,
    }
    metrics |= {"train/samples": 5600.0, "strength/0.25/psnr/restored": 1.0, "unblurred/psnr/restored": 33.0}
    files: dict[str, Any] = {"manifest.json": manifest, "metrics.json": metrics}
    if finished:
        files["done.json"] = {"seconds": 1.0, "finished": "2026-01-01T00:00:00+00:00"}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@cache
def astronaut() -> np.ndarray:
    """A public-domain photograph with one face, uint8 (512, 512, 3)."""
    from skimage.data import astronaut

    return astronaut()


def portrait(left: int = 0) -> np.ndarray:
    """The part of it round the face, 240 pixels high and 250 - left wide."""
    return astronaut()[20:260, 100 + left : 350].copy()


def scene(height: int = 150, width: int = 130, channels: int = 3) -> np.ndarray:
    """A picture without a face: waves and noise."""
    y, x = np.mgrid[:height, :width]
    waves = 0.5 + 0.3 * np.sin(x / 7)[..., None] * np.cos(y / 11 + np.arange(channels)[:, None, None]).transpose(
        1, 2, 0
    )
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, waves.shape)
    return (255 * (waves + noise)).round().clip(0, 255).astype(np.uint8)


def saved(pixels: np.ndarray, file: Path, **settings: Any) -> Path:
    """Write pixels as an image file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    Image.fromarray(picture).save(file, **settings)
    return file


def opened(file: Path) -> np.ndarray:
    """The pixels of an image file as they lie in it."""
    return np.asarray(Image.open(file))


def exif(orientation: int) -> bytes:
    """EXIF of a camera, with an orientation, a sub-directory and a maker's note; of either order of bytes."""
    made = Image.Exif()
    made.endian = "<" if orientation % 2 else ">"
    made[0x010F] = "Maker"
    made[0x0112] = orientation
    made.get_ifd(0x8769)[0x829A] = 0.25  # seconds of exposure
    made.get_ifd(0x8769)[0x927C] = b"note\0" * 5
    return made.tobytes()


def as_file(pixels: np.ndarray, format: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **settings)
    return file.getvalue()
