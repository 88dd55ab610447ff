"""`fivefold deblur-synth`: blurred and sharp pairs made of anyone's sharp photographs, with all that they were made by.

Legend: B = 1 batch, C channels, H height, W width, K kernel side.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from datamodules import blur
from datamodules.blur import CAMERAS, Camera, Motion, crop_kernels, kernel_extent, key_of, motion_kernels
from datamodules.face_crops import NO_FACE
from datamodules.face_photos import TOO_SMALL, Refused, read_photo
from experiments.deblur.faces import find_faces, side_in_photograph
from experiments.deblur.files import Input, Outcome, check_outputs, collect, each_of
from experiments.errors import UserError
from experiments.store import write_atomically
from lit_modules.ops.image_quality import psnr

MANIFEST = "pairs.csv"
PATHS = ("angle_degrees", "exposure", "anxiety", "inertia", "gaussian", "impulse")
USED: dict[str, tuple[str, ...]] = {"shake": PATHS, "linear": PATHS[:2], "albumentations": PATHS[:1]}
PARTS = ("sharp", "blurred", "kernels")
Of = Literal["picture", "face"]


@dataclass(frozen=True)
class Law:
    """What pairs are drawn from: the motion's preset, the camera's, what extents are shares of, and the seed."""

    motion: str = "near_linear"
    camera: str = "sensor"
    of: Of = "picture"
    seed: int = 0

    def checked(self) -> tuple[Motion, Camera]:
        """Return the two laws.

        Raises:
            UserError: a name that is not known.
        """
        try:
            motion = blur.preset(self.motion)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.camera not in CAMERAS:
            raise UserError(f"unknown camera '{self.camera}'; known: {', '.join(CAMERAS)}")
        if self.of not in ("picture", "face"):
            raise UserError(f"extents are shares of 'picture' or 'face', got '{self.of}'")
        return motion, CAMERAS[self.camera]


def synthesise(words: Sequence[str], out: Path, law: Law, force: bool, console: Console) -> Outcome:
    """Write sharp/, blurred/ and kernels/ below `out`, PNGs with the same names, and pairs.csv with a row for each.

    A photograph's blur depends on the seed and on its path below what was asked for, and on no other photograph. Kernels are
    16-bit grey, their peak at white: divide by the sum. Photographs are made upright 8-bit RGB, over white where they are
    transparent.

    Raises:
        UserError: see `collect`, `check_outputs` and `Law.checked`.
    """
    motion, camera = law.checked()
    inputs = collect(words, out)
    targets = {each.name: [out / part / png_name(each.name) for part in PARTS] for each in inputs}
    files = [file for three in targets.values() for file in three]
    check_outputs([each.file for each in inputs], [*files, out / MANIFEST], force)
    rows: list[dict[str, Any]] = []

    def work(each: Input, tick: Callable[[float], None]) -> None:
        made, row = make_pair(each, law, motion, camera)
        for file, pixels in zip(targets[each.name], made, strict=True):
            write_atomically(file, _png(pixels))
        places = {part: f.relative_to(out).as_posix() for part, f in zip(PARTS, targets[each.name], strict=True)}
        rows.append({"photograph": each.name.as_posix(), **places, **row})

    outcome = each_of(inputs, work, lambda each: str(each.file), console)
    if rows:
        write_atomically(out / MANIFEST, _table(rows))
    return outcome


def png_name(name: Path) -> Path:
    """Return a name for a PNG: the photograph's own if it has that suffix, else with .png after it, so that no two meet."""
    return name if name.suffix.lower() == ".png" else name.with_name(f"{name.name}.png")


def make_pair(each: Input, law: Law, motion: Motion, camera: Camera) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return a photograph's sharp and blurred pixels uint8 (H, W, 3), its kernel uint16 (K, K), and what they were made by.

    Raises:
        Refused: see `read_photo`; no face where extents are shares of one; a photograph smaller than its kernel.
    """
    photo = read_photo(each.file.read_bytes())
    side = side_of(photo.pixels_HW3, law.of)
    key_1 = key_for(law.seed, each.name)
    kernel_1KK = crop_kernels(motion_kernels(motion, key_1, side))
    sharp_1CHW = torch.from_numpy(photo.pixels_HW3.copy()).permute(2, 0, 1)[None].float() / 255
    try:
        blurred_1CHW = blur.photograph(sharp_1CHW, kernel_1KK, camera, key_1)
    except ValueError as error:
        raise Refused(TOO_SMALL, str(error)) from None
    H, W = photo.pixels_HW3.shape[:2]
    drawn = blur.draw(motion, key_1, side)
    extent = float(kernel_extent(kernel_1KK))
    law_of_all = {"angle_degrees": 360 * float(drawn.turn) % 360}
    law_of_all |= {name: float(getattr(drawn, name)) for name in PATHS[1:]}
    row = {
        "width": W,
        "height": H,
        "preset": law.motion,
        "kind": motion.kind,
        "camera": law.camera,
        "seed": law.seed,
        "key": int(key_1),
        "side": side,
        "side_of": law.of,
        "kernel_side": kernel_1KK.shape[-1],
        "extent_px": extent,
        "extent_share": extent / side,
        f"drawn_{motion.parametrise}_px": float(drawn.size) if motion.kind != "none" else "",
        **{name: value if name in USED.get(motion.kind, ()) else "" for name, value in law_of_all.items()},
        "psnr_blurred": float(psnr(blurred_1CHW, sharp_1CHW)),
        "notes": "; ".join(photo.oddities),
    }
    blurred_HW3 = (blurred_1CHW[0].permute(1, 2, 0) * 255).round().byte().numpy()
    return [photo.pixels_HW3, blurred_HW3, kernel_values(kernel_1KK[0])], row


def key_for(seed: int, name: Path) -> Tensor:
    """Return the key (1,) of a photograph's blur, from the seed and its path."""
    digest = hashlib.sha256(name.as_posix().encode()).digest()
    return key_of(seed, "deblur-synth", int.from_bytes(digest[:8], "little") >> 1)


def side_of(pixels_HW3: np.ndarray, of: Of) -> int:
    """Return what extents are shares of, in pixels: the photograph's shorter side, or that of its most probable face's square.

    Raises:
        Refused: there is no face.
    """
    if of == "picture":
        return min(pixels_HW3.shape[:2])
    faces = find_faces(pixels_HW3)
    if not len(faces):
        raise Refused(NO_FACE, "nothing that extents could be shares of; give --of picture")
    return round(side_in_photograph(faces.points_F52[0].double().numpy()))


def kernel_values(kernel_KK: Tensor) -> np.ndarray:
    """Return a kernel as uint16 with its peak at white."""
    return (kernel_KK / kernel_KK.max() * 65535).round().numpy().astype(np.uint16)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _table(rows: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return file.getvalue()
