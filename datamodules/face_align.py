"""Faces brought to one place: a similarity transform that takes five points to a template, and the crop that it gives.

Legend: N faces, H height, W width, S side of a crop with its margins. Points are (x, y) in pixels, the centre of the first
pixel at (0, 0), in the order left eye, right eye, nose, left and right corner of the mouth, left and right as one looks at
the picture.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

TEMPLATE_52 = np.array([[0.375, 0.42], [0.625, 0.42], [0.5, 0.567], [0.38, 0.675], [0.62, 0.675]])
"""Where the points lie in the unit square: the mean shape of MTCNN's points over the 783 photographs of `faces`, rounded
and made symmetric. The eyes are a quarter of the side apart, so MTCNN's box of a face is about 0.54 by 0.74 of the side."""

MARGIN = 1 / 8
"""Of the side, kept on every side of it: what a motion carries into the picture comes from there, not from a reflection."""

MAX_ENLARGEMENT = 1.0
"""A face whose crop would have to be enlarged by more than this is too small to stand for a sharp one."""


class Crop(NamedTuple):
    """A crop uint8 (S, S, 3), the points in it (5, 2), and whether it reaches beyond its picture without the margins."""

    pixels_SS3: np.ndarray
    points_52: np.ndarray
    reaches_out: bool


class TooSmall(ValueError):
    """The face has fewer pixels than its crop."""


def margin_of(size: int) -> int:
    """Return the margin in pixels round a crop of `size` pixels."""
    return math.ceil(MARGIN * size)


def fit_similarity(points_N2: np.ndarray, target_N2: np.ndarray) -> tuple[complex, complex]:
    """Return (a, b) of the similarity z -> a z + b, z = x + iy, that takes points nearest to their targets.

    Least squares over rotation, scale and shift; never a reflection. |a| is the scale.

    Raises:
        ValueError: fewer than two different points, which fix no similarity.
    Source: Umeyama 1991 in two dimensions, where complex numbers make it a regression on one variable.
    """
    z, w = points_N2 @ [1, 1j], target_N2 @ [1, 1j]
    z_centred = z - z.mean()
    spread = (abs(z_centred) ** 2).sum()
    if not spread > 1e-12:
        raise ValueError(f"the points {points_N2.tolist()} do not differ: they fix no similarity transform")
    a = (z_centred.conj() * (w - w.mean())).sum() / spread
    return complex(a), complex(w.mean() - a * z.mean())


def template_points(size: int) -> np.ndarray:
    """Return where the five points go in a crop of `size` pixels with its margins, float64 (5, 2)."""
    return TEMPLATE_52 * size - 0.5 + margin_of(size)


def cut_face(picture_HW3: np.ndarray, points_52: np.ndarray, size: int) -> Crop:
    """Return the face of a picture, aligned, `size` pixels wide and as high, with margins on every side.

    The picture is first shrunk by the Lanczos filter, which keeps fine detail from turning into patterns, then turned
    and moved by bicubic interpolation. What lies beyond its edges is its reflection.

    Args:
        picture_HW3: uint8 RGB.
        points_52: five points in the picture.
        size: side of the crop without the margins.
    Raises:
        TooSmall: the crop would have to be enlarged beyond `MAX_ENLARGEMENT`.
        ValueError: the points do not differ.
    """
    side, target_52 = size + 2 * margin_of(size), template_points(size)
    a, b = fit_similarity(points_52, target_52)
    if abs(a) > MAX_ENLARGEMENT * (1 + 1e-6):  # not for a rounding error
        raise TooSmall(f"the face must be enlarged {abs(a):.2f} times to fill a crop of {size} pixels")
    source_42 = _corners(a, b, 0, side)
    padded_HW3, shift = _reflect(picture_HW3, source_42, room=math.ceil(4 / min(1.0, abs(a))))
    shrunk, scale = _shrink(Image.fromarray(padded_HW3), min(1.0, abs(a)))
    pixels_SS3 = _transform(shrunk, side, _affine(np.array([1 / a, -b / a]), shift, scale))
    core_42 = _corners(a, b, margin_of(size), side - margin_of(size))
    high_2 = np.array(picture_HW3.shape[1::-1]) - 1
    points = (points_52 @ [1, 1j]) * a + b
    return Crop(
        pixels_SS3,
        np.stack([points.real, points.imag], -1),
        bool((core_42 < -1e-6).any() or (core_42 > high_2 + 1e-6).any()),
    )


def _corners(a: complex, b: complex, low: float, high: float) -> np.ndarray:
    """The corners of a square of the crop, in the picture's coordinates (4, 2)."""
    w = np.array([complex(x, y) for x in (low, high - 1) for y in (low, high - 1)])
    z = (w - b) / a
    return np.stack([z.real, z.imag], -1)


def _reflect(picture_HW3: np.ndarray, source_42: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of a picture that the crop looks at, and `room` for the filters, completed beyond the edges; and what
    must be added to the picture's coordinates to have those of the part.
    """
    low_2 = np.floor(source_42.min(0)).astype(int) - room
    high_2 = np.ceil(source_42.max(0)).astype(int) + room + 1
    before_2 = np.maximum(0, -low_2)
    after_2 = np.maximum(0, high_2 - np.array(picture_HW3.shape[1::-1]))
    if (before_2 + after_2).any():  # of the whole picture: what is reflected may lie deeper in it than the crop looks
        width, height = zip(before_2, after_2, strict=True)
        picture_HW3 = np.pad(picture_HW3, [height, width, (0, 0)], mode="reflect")
    (x0, y0), (x1, y1) = low_2 + before_2, high_2 + before_2
    return picture_HW3[y0:y1, x0:x1], -low_2


def _shrink(picture: Image.Image, scale: float) -> tuple[Image.Image, np.ndarray]:
    """Shrink to whole pixels; return the exact factors of width and height with it."""
    size_2 = np.maximum(1, np.round(np.array(picture.size) * scale)).astype(int)
    factors_2 = size_2 / np.array(picture.size)
    if (factors_2 == 1).all():
        return picture, factors_2
    return picture.resize((int(size_2[0]), int(size_2[1])), Image.Resampling.LANCZOS), factors_2


def _transform(picture: Image.Image, side: int, affine: tuple[float, ...]) -> np.ndarray:
    """Interpolate in floating point and round: on bytes Pillow cuts off, which darkens by half a level."""
    channels = [
        np.asarray(
            channel.convert("F").transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
        )
        for channel in picture.split()
    ]
    return np.stack(channels, -1).round().clip(0, 255).astype(np.uint8)


def _affine(to_source: np.ndarray, shift_2: np.ndarray, scale_2: np.ndarray) -> tuple[float, ...]:
    """Pillow's six numbers, which take a crop's coordinates to those of the shrunk picture; it puts pixel centres at 1/2."""
    c, d = to_source
    rows = []
    for axis, (x, y, rest) in enumerate(((c.real, -c.imag, d.real), (c.imag, c.real, d.imag))):
        offset = rest - 0.5 * (x + y) + shift_2[axis] + 0.5
        rows += [scale_2[axis] * x, scale_2[axis] * y, scale_2[axis] * offset]
    return tuple(float(number) for number in rows)
