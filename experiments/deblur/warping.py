"""Pictures turned, scaled and moved, in floating point.

Legend: H height, W width, C channels. Points are complex numbers z = x + iy in pixels, the centre of the first pixel at 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from experiments.deblur.tiles import as_floats

ROWS = 256  # of a shrunk picture, made at once


def warp(source_HWC: np.ndarray, a: complex, b: complex, height: int, width: int) -> np.ndarray:
    """Return the image whose pixel w is the source's at a w + b, float32; beyond the source its reflection.

    Bicubic, after a filter of the same kind where the source is shrunk, so that fine detail does not turn into patterns.
    """
    source_1CHW = torch.from_numpy(np.ascontiguousarray(source_HWC, np.float32)).permute(2, 0, 1)[None]
    factor_2 = np.ones(2)
    if (scale := abs(a)) > 1:
        H, W = source_HWC.shape[:2]
        size = [max(1, round(H / scale)), max(1, round(W / scale))]
        source_1CHW = F.interpolate(source_1CHW, size=size, mode="bicubic", antialias=True)
        factor_2 = np.array([size[1] / W, size[0] / H])
    axes = zip(plane(a, b, 0, height, 0, width), factor_2, source_1CHW.shape[:1:-1], strict=True)
    # in units in which the source reaches from -1 to 1
    grid_HW2 = np.stack([2 * factor * (along_HW + 0.5) / length - 1 for along_HW, factor, length in axes], -1)
    grid_1HW2 = torch.from_numpy(grid_HW2.astype(np.float32))[None]
    out_1CHW = F.grid_sample(source_1CHW, grid_1HW2, mode="bicubic", padding_mode="reflection", align_corners=False)
    return out_1CHW[0].permute(1, 2, 0).numpy()


def plane(a: complex, b: complex, top: int, bottom: int, left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of a w + b for each pixel w of a box, float64 (H, W)."""
    z_HW = a * (np.arange(left, right)[None, :] + 1j * np.arange(top, bottom)[:, None]) + b
    return z_HW.real, z_HW.imag


def shrink(pixels_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Return a picture at 1 / `factor` of its size, float32, made a strip at a time."""
    H, W = pixels_HWC.shape[:2]
    height, width = max(1, round(H / factor)), max(1, round(W / factor))
    strips, room = [], math.ceil(4 * factor)
    for top in range(0, height, ROWS):
        bottom = min(height, top + ROWS)
        first, last = max(0, math.floor(top * factor) - room), math.ceil(bottom * factor) + room
        b = middle(factor) + 1j * (factor * top - first)
        strips.append(warp(as_floats(pixels_HWC[first:last]), factor, b, bottom - top, width))
    return np.concatenate(strips).clip(0, 1)


def enlarge_rows(small_HWC: np.ndarray, factor: float, top: int, bottom: int, width: int) -> np.ndarray:
    """Return rows of a picture that is `factor` times as large, float32."""
    return warp(small_HWC, 1 / factor, middle(1 / factor) + 1j * top / factor, bottom - top, width)


def middle(factor: float) -> complex:
    """Return b of z = factor w + b, by which pictures of which one is `factor` times as large cover one another."""
    return (factor - 1) / 2 * (1 + 1j)
