"""How a camera moves while it exposes: the laws that blur kernels are drawn from, and what is drawn once per kernel.

Legend: B kernels.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from datamodules.counter_random import Stream, uniform

Kind = Literal["shake", "linear", "albumentations", "disk", "gaussian", "none"]
Parametrise = Literal["extent", "length"]
FACE_WIDTH = 0.54  # of the image's side: MTCNN's box on the 206 test crops of `faces`, mean 0.537, sd 0.020


@dataclass(frozen=True)
class Motion:
    """The law that blur kernels are drawn from.

    Args:
        kind: "shake", the model of `datamodules.blur_paths`; "linear", straight at constant speed; "albumentations", the
            lines of its MotionBlur; "disk", defocus; "gaussian"; "none", no blur.
        extent: range of the larger side of the box round the exposed path, as a share of the image's side. For a disk its
            diameter, for a Gaussian six standard deviations, where it is cut off; for albumentations the size of its kernel.
        anxiety: one is drawn; 0 is a straight line.
        exposures: one is drawn; the share of the path, from its start, that is exposed.
        samples: M, at how many points a path is known.
        parametrise: "extent": paths are scaled until the exposed part has the drawn extent. "length": until the whole path
            has the drawn length.
        length: range of the whole path's length as a share of the image's side, for parametrise="length".
        angle: range of the direction of the start, degrees from the column axis, clockwise on the screen.
        inertia: range of c, the pull back to the start.
        gaussian: range of g, the strength of the shake.
        impulse: range of p, the frequency of impulses.
    Raises:
        ValueError: what cannot be drawn from, naming the field.
    """

    kind: Kind = "shake"
    extent: tuple[float, float] = (0.08, 0.22)
    anxiety: tuple[float, ...] = (0.0, 0.001, 0.003)
    exposures: tuple[float, ...] = (1.0,)
    samples: int = 500
    parametrise: Parametrise = "extent"
    length: tuple[float, float] = (60 / 256, 60 / 256)
    angle: tuple[float, float] = (0.0, 360.0)
    inertia: tuple[float, float] = (0.0, 0.7)
    gaussian: tuple[float, float] = (0.0, 10.0)
    impulse: tuple[float, float] = (0.0, 0.2)

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in ("kind", "samples", "parametrise"):
                object.__setattr__(self, field.name, as_tuple(field.name, getattr(self, field.name)))
        for name, choices in (("kind", get_args(Kind)), ("parametrise", get_args(Parametrise))):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(choices)}")
        for name, low, high in (
            ("extent", 0, 1),
            ("length", 0, 1),
            ("angle", -360, 360),
            ("inertia", 0, math.inf),
            ("gaussian", 0, math.inf),
            ("impulse", 0, 1),
        ):
            check_range(name, getattr(self, name), low, high)
        if not self.anxiety or not all(0 <= a <= 1 for a in self.anxiety):
            raise ValueError(f"anxiety must list numbers in [0, 1], got {self.anxiety}")
        if not 2 <= self.samples <= 1 << 16:
            raise ValueError(f"samples must lie in [2, {1 << 16}], got {self.samples}")
        if not self.exposures or not all(2 / self.samples <= e <= 1 for e in self.exposures):
            least = f"2 / samples = {2 / self.samples:g}"
            raise ValueError(
                f"exposures must list numbers in [{least}, 1], so that two are exposed, got {self.exposures}"
            )
        if self.parametrise == "length" and self.kind not in ("shake", "linear"):
            raise ValueError(f"a kernel of kind {self.kind!r} has no path length: set parametrise to 'extent'")


def as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Return a list, as configuration files hold, as a tuple.

    Raises:
        ValueError: something else, naming it.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of numbers, got {value!r}")
    return tuple(value)


def check_range(name: str, value: tuple[float, ...], low: float, high: float) -> None:
    """Refuse what is not a range (a, b) with low <= a <= b <= high.

    Raises:
        ValueError: naming it.
    """
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name} must be a range (a, b) with {low:g} <= a <= b <= {high:g}, got {tuple(value)}")


def of_face(low: float, high: float, width: float = FACE_WIDTH) -> tuple[float, float]:
    """Return a range given in face widths as shares of the image's side, of which a face's box takes `width`."""
    return low * width, high * width


DEBLURGAN_ANXIETY = (0.01, 0.009, 0.008, 0.007, 0.005, 0.003)
PRESETS: dict[str, Motion] = {
    # Where MTCNN goes from finding most faces to finding few, on straight motion and crops of 128 px.
    "near_linear": Motion(extent=of_face(0.25, 0.45)),
    "mild": Motion(extent=(0.08, 0.15)),
    "severe": Motion(extent=(0.13, 0.24)),
    # To train on: everything above, and down to nearly sharp.
    "training": Motion(extent=(0.03, 0.24)),
    # 60 px of path in crops of 256 px, of which a tenth, half or all is exposed; mostly 14 to 25 px wide when all is.
    "deblurgan": Motion(anxiety=DEBLURGAN_ANXIETY, exposures=(0.1, 0.5, 1.0), samples=2000, parametrise="length"),
    "linear": Motion(kind="linear"),
    "albumentations": Motion(kind="albumentations"),
    "disk": Motion(kind="disk", extent=(0.03, 0.12)),
    "gaussian": Motion(kind="gaussian"),
    "none": Motion(kind="none"),
}


def preset(name: str, **changes: Any) -> Motion:
    """Return a preset, with some fields changed.

    Raises:
        ValueError: an unknown preset, nearest one included, or see `Motion`.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        hint = f", nearest: {near[0]!r}" if near else ""
        raise ValueError(f"unknown preset {name!r}{hint}; known: {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


class Draw(NamedTuple):
    """What is drawn once per kernel, float64 (B,) each; what a kind does not use is drawn all the same."""

    size: Tensor  # pixels: the extent, or with parametrise="length" the length
    turn: Tensor  # direction of the start in full turns
    anxiety: Tensor
    exposure: Tensor
    inertia: Tensor
    gaussian: Tensor
    impulse: Tensor


def draw(motion: Motion, keys_B: Tensor, side: int) -> Draw:
    """Draw the parameters of each key's kernel: for a manifest, or to sort images by severity.

    Kinds share their draws: under one key a line and a shake have the same extent and the same first direction.

    Raises:
        ValueError: an image's side below 1.
        TypeError: see `datamodules.counter_random.words`.
    """
    if side < 1:
        raise ValueError(f"the image's side must be at least 1 pixel, got {side}")
    u_B7 = uniform(keys_B, 7, Stream.MOTION, torch.float64)
    size = motion.extent if motion.parametrise == "extent" else motion.length
    ranges = (tuple(x * side for x in size), tuple(x * (1 / 360) for x in motion.angle))
    spread = [low + u_B * (high - low) for (low, high), u_B in zip(ranges, u_B7.T[:2], strict=True)]
    chosen = [
        torch.tensor(options, dtype=torch.float64, device=u_B.device)[(u_B * len(options)).long()]
        for options, u_B in zip((motion.anxiety, motion.exposures), u_B7.T[2:4], strict=True)
    ]
    strengths = (motion.inertia, motion.gaussian, motion.impulse)
    rest = [low + u_B * (high - low) for (low, high), u_B in zip(strengths, u_B7.T[4:], strict=True)]
    return Draw(*spread, *chosen, *rest)
