"""Blur kernels: paths drawn onto pixels, and the few other shapes.

A kernel is (K, K) with K odd, at least 0 everywhere, of sum 1, and its centroid is its centre pixel: blur then neither
darkens nor shifts an image. All mass is added up in integers, so a kernel has the same bits in any batch and on any device
(the exponential of "gaussian" apart, which is the library's).

Legend: B kernels, K kernel side, M samples of a path, 2 = (column, row).
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from datamodules.blur_motion import Draw, Motion, draw
from datamodules.blur_paths import GRID, PATHS, WEIGHT, exposed, trajectories
from datamodules.counter_random import square_root

FINE = 1 << 30  # parts in which the weights of shapes without a path are counted


def motion_kernels(
    motion: Motion, keys_B: Tensor, side: int, device: torch.device | str | None = None, size: int | None = None
) -> Tensor:
    """Draw a kernel for each key: float32 (B, K, K).

    The sum is 1 within 1e-6. The centroid is within 1e-4 px of the centre pixel (paths are rounded to 2 ** -14 px, values
    to float32).

    Args:
        motion: the law.
        keys_B: as `datamodules.counter_random.key_of` returns.
        side: of the image in pixels, which extents are shares of.
        device: where kernels are made, by default where the keys are.
        size: K; by default `kernel_size`, which holds whatever may be drawn.
    Raises:
        ValueError: a size that is even or too small for what was drawn, naming one that is not; see `draw`.
        TypeError: see `datamodules.counter_random.words`.
    """
    keys_B = keys_B if device is None else keys_B.to(device)
    size = kernel_size(motion, side) if size is None else size
    _check_size(size)
    drawn = draw(motion, keys_B, side)
    if not len(keys_B):
        return drawn.size.new_zeros(0, size, size).float()
    if motion.kind in PATHS:
        return rasterise(trajectories(motion, keys_B, side), size, exposed(drawn.exposure, motion.samples))
    if motion.kind == "albumentations":
        return _library_lines(drawn, size)
    return _round(motion.kind, drawn.size, size)


def kernel_size(motion: Motion, side: int) -> int:
    """Return the least K that holds any kernel of this law at this side, wherever its centroid lies; odd.

    Few kernels fill it: where the size of a batch may depend on what was drawn, `crop_kernels` saves time.
    """
    if motion.kind == "none":
        return 1
    reach = (motion.extent if motion.parametrise == "extent" else motion.length)[1] * side
    if motion.kind == "albumentations":
        return _line_size(reach)
    half = {"disk": math.floor(reach / 2 + 0.5), "gaussian": math.floor(reach / 2)}.get(
        motion.kind, math.floor(reach) + 1
    )
    return 2 * half + 1


def rasterise(path_BM2: Tensor, size: int, weights_BM: Tensor | None = None) -> Tensor:
    """Draw paths as kernels, float32 (B, K, K): each sample's weight is spread bilinearly over its four nearest pixels.

    The origin is the centre pixel. The centroid of a kernel is that of its path, exactly up to rounding; nothing is
    dropped at the border or piled up there. Without a gradient.

    Args:
        path_BM2: floating (column, row) in pixels, taken to 1 / GRID of a pixel.
        size: K, odd.
        weights_BM: floating in [0, 1], taken to 1 / WEIGHT; 1 by default. Where it is 0 the path may leave the kernel.
    Raises:
        ValueError: an even size; weights outside [0, 1] or all 0 for a path; a path that leaves the kernel.
    """
    _check_size(size)
    B, M, _ = path_BM2.shape
    weights_BM = path_BM2.new_ones(B, M) if weights_BM is None else weights_BM
    whole_BM = (weights_BM.double() * WEIGHT).round().long()
    if not bool(((whole_BM >= 0) & (whole_BM <= WEIGHT)).all() & (whole_BM.sum(1) > 0).all()):
        raise ValueError("weights must lie in [0, 1], and each path must have one above 0")
    seen_BM = whole_BM > 0
    grid_BM2 = (path_BM2.double() * GRID).round().long().masked_fill(~seen_BM[..., None], 0)
    reach = int(grid_BM2.abs().amax()) if grid_BM2.numel() else 0
    if reach > size // 2 * GRID:
        least = 2 * math.ceil(reach / GRID) + 1
        raise ValueError(
            f"a path reaches {reach / GRID:.2f} px from its centroid: size must be {least} or more, got {size}"
        )
    cell_BM2, part_BM2 = (grid_BM2 // GRID + size // 2).unbind(-1), (grid_BM2 % GRID).unbind(-1)
    mass_BKK = grid_BM2.new_zeros(B, size * size)
    for right in (0, 1):
        for down in (0, 1):
            share_BM = whole_BM * _tent(part_BM2[0], right) * _tent(part_BM2[1], down)
            at_BM = (cell_BM2[1] + down) * size + cell_BM2[0] + right
            mass_BKK.scatter_add_(1, at_BM.masked_fill(share_BM == 0, 0), share_BM)
    return _normalised(mass_BKK.view(B, size, size))


def kernel_extent(kernels_BKK: Tensor, floor: float = 1e-4) -> Tensor:
    """Measure the larger side, in pixels, of the box round the path that a kernel shows: float64 (B,).

    Bilinear spreading widens the box of pixels by one to two. So each edge is placed inside its pixel where it would be if
    the path crossed the last two pixels evenly: with q the ratio of their masses, (1 - sqrt(q + 2 q ** 2)) / (1 + q) from
    the outer pixel's centre, or at its centre if that is negative. Right within 0.1 px for straight lines longer than 2 px
    and, for shakes, within 0.75 px, mostly 0.15 px too much.

    Args:
        kernels_BKK: of any origin; sums need not be 1.
        floor: share of the mass below which a row or column counts as empty, for kernels kept in 8 bits.
    """
    mass_BKK = kernels_BKK.double()
    sides = []
    for across in (1, 2):
        profile_BK = mass_BKK.sum(across)
        profile_BK = profile_BK.masked_fill(profile_BK <= floor * profile_BK.sum(1, keepdim=True), 0.0)
        last = profile_BK.shape[1] - 1
        sides.append(last - _first_edge(profile_BK.flip(1)) - _first_edge(profile_BK))
    return torch.stack(sides).amax(0).clamp_min(0)


def crop_kernels(kernels_BKK: Tensor) -> Tensor:
    """Cut the empty margin that all kernels of a batch share off, the same on all four sides: K stays odd."""
    size = kernels_BKK.shape[-1]
    filled_KK = (kernels_BKK != 0).any(0)
    rows = torch.nonzero(filled_KK.any(0) | filled_KK.any(1)).flatten()
    if not len(rows):
        return kernels_BKK
    margin = min(int(rows[0]), size - 1 - int(rows[-1]))
    return kernels_BKK[:, margin : size - margin, margin : size - margin]


def embed_kernels(kernels_BKK: Tensor, size: int) -> Tensor:
    """Put kernels in the middle of larger ones.

    Raises:
        ValueError: a size that is even or below theirs.
    """
    _check_size(size)
    margin = (size - kernels_BKK.shape[-1]) // 2
    if margin < 0:
        raise ValueError(f"kernels of {kernels_BKK.shape[-1]} px do not fit into size {size}")
    return torch.nn.functional.pad(kernels_BKK, (margin,) * 4)


def _check_size(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel's size must be odd, so that it has a centre pixel, got {size}")


def _tent(part: Tensor, upper: int) -> Tensor:
    return part if upper else GRID - part


def _normalised(mass_BKK: Tensor) -> Tensor:
    return (mass_BKK.double() / mass_BKK.sum((1, 2), keepdim=True).double()).float()


def _first_edge(profile_BK: Tensor) -> Tensor:
    """Return where the path begins along a profile, see `kernel_extent`; float64 (B,)."""
    first_B1 = (profile_BK > 0).byte().argmax(1, keepdim=True)
    outer_B = profile_BK.gather(1, first_B1)[:, 0]
    inner_B = profile_BK.gather(1, (first_B1 + 1).clamp_max(profile_BK.shape[1] - 1))[:, 0]
    q_B = torch.where(inner_B > 0, outer_B / inner_B, 0.5)
    return first_B1[:, 0] + ((1 - (q_B + 2 * q_B * q_B).sqrt()) / (1 + q_B)).clamp(0, 1)


def _round(kind: str, extent_B: Tensor, size: int) -> Tensor:
    """Return shapes about the centre. A disk's pixels fade over one pixel at its edge; a Gaussian ends at 3 sigma per axis."""
    away_K = torch.arange(size, dtype=torch.float64, device=extent_B.device) - size // 2
    radius_B11 = extent_B[:, None, None] * 0.5
    if kind == "none":
        mass_BKK = ((away_K[:, None] == 0) & (away_K == 0)).double().expand(len(extent_B), size, size)
        reach = 0.0
    elif kind == "disk":
        square_KK = away_K[:, None] * away_K[:, None] + away_K * away_K
        distance_KK = square_root(square_KK.clamp_min(1e-30))  # of 0 there is none
        mass_BKK = (radius_B11 + 0.5 - distance_KK).clamp(0, 1)
        reach = float(radius_B11.max()) + 0.5
    else:
        inside_BK = away_K.abs() <= radius_B11[:, 0]
        profile_BK = (-4.5 * (away_K / radius_B11[:, 0].clamp_min(1e-3)).square()).exp() * inside_BK
        mass_BKK = profile_BK[:, :, None] * profile_BK[:, None, :]
        reach = float(radius_B11.max())
    if math.floor(reach) > size // 2:
        raise ValueError(
            f"{kind} kernels reach {reach:.2f} px: size must be {2 * math.floor(reach) + 1} or more, got {size}"
        )
    return _normalised((mass_BKK * FINE).round().long())


def _line_size(extent: float) -> int:
    """Return the odd size of albumentations' kernel that is nearest an extent in pixels; it makes none below 3."""
    return max(3, 2 * round((extent - 1) / 2) + 1)


def _library_lines(drawn: Draw, size: int) -> Tensor:
    """Return the kernels of albumentations' MotionBlur: pixels along a centred line, unweighted.

    Size and angle are our draws and the rest is switched off, for its shifts would move the image: nothing is left to
    the library's own random numbers.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the net for a newer version when imported
    import albumentations

    kernels = []
    for extent, turn in zip(drawn.size.tolist(), drawn.turn.tolist(), strict=True):
        K, angle = _line_size(extent), turn * 360 % 360
        blur = albumentations.MotionBlur((K, K), False, (angle, angle), (0.0, 0.0), p=1.0)
        kernel_1KK = torch.from_numpy(blur.get_params()["kernel"])[None]
        kernels.append(embed_kernels(_normalised((kernel_1KK.double() * FINE).round().long()), size))
    return torch.cat(kernels).to(drawn.size.device)
