"""Paths of a shaken camera.

A path is that of a particle whose velocity is shaken, pulled back to where it started, and now and then reversed, at
constant speed: Boracchi and Foi's model, which DeblurGAN uses. Its equations, over samples t = 0 … M - 2 of a complex x:

    x_0 = 0,  v_0 = a e^(i phi), or s e^(i phi) where a = 0,  s = L / (M - 1)
    jump_t = 2 v_t e^(i (pi + u - 1/2)) with probability p a, else 0
    dv_t = jump_t + a (g (n_1 + i n_2) - c x_t) s
    v_(t+1) = s (v_t + dv_t) / |v_t + dv_t|,  x_(t+1) = x_t + v_(t+1)

with anxiety a, inertia c, Gaussian shake g, frequency of impulses p, path length L, u ~ U(0, 1) and n ~ N(0, 1). The real
part of x is the column, the imaginary part the row, so angles turn clockwise on the screen.

Departures:
    1. The equations are run at L = 60 px, DeblurGAN's, and the path is then scaled. As the pull c x is in pixels, the shape
       of a path would otherwise depend on the size of the image.
    2. At M samples instead of 2000, shakes are multiplied by r ** 0.5, and the pull and the probability of a jump by r, with
       r = 2000 / M: the same diffusion in coarser steps, so that anxiety means the same at every M.
    3. The size drawn is the path's extent, not its length (`parametrise`): at one length, anxiety 0.01 gives a quarter of
       the extent of anxiety 0.
    4. The exposed part of the path has its centroid at the origin, so that blur does not shift the image; the originals
       shift by whole pixels until the path lies inside the canvas.

Legend: B paths, M samples of a path, 2 = (column, row).
Source: Boracchi and Foi, Modeling the performance of image restoration from motion blur (IEEE TIP 21, 2012), by way of the
    authors' published script and of DeblurGAN's code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from datamodules.blur_motion import Draw, Motion, draw
from datamodules.counter_random import Stream, normal_pairs, square_root, unit_vector, words

PATHS = ("shake", "linear")
LENGTH = 60.0  # pixels: the L at which the equations are run
SAMPLES = 2000  # the M at which anxiety, inertia and impulses have their published meaning
GRID = 1 << 14  # a path's coordinates are multiples of 1 / GRID pixels: sums over them are exact, whatever their order
WEIGHT = 1 << 16  # and its weights of 1 / WEIGHT


def trajectories(motion: Motion, keys_B: Tensor, side: int) -> Tensor:
    """Return paths in pixels, float64 (B, M, 2), the centroid of the exposed part within 1 / GRID of the origin.

    Coordinates are multiples of 1 / GRID pixels. The same keys give the same bits in any batch and on any device.

    Args:
        motion: of a kind that has a path.
        keys_B: as `key_of` returns.
        side: of the image, in pixels.
    Raises:
        ValueError: a kind without a path; see `draw`.
        TypeError: see `datamodules.counter_random.words`.
    """
    if motion.kind not in PATHS:
        raise ValueError(f"a kernel of kind {motion.kind!r} has no path; kinds with one: {', '.join(PATHS)}")
    drawn, M = draw(motion, keys_B, side), motion.samples
    if motion.kind == "linear":
        steps_M = torch.arange(M, dtype=torch.float64, device=keys_B.device) * (LENGTH / (M - 1))
        path_BM2 = steps_M[None, :, None] * unit_vector(drawn.turn)[:, None]
    else:
        path_BM2 = _shaken(drawn, keys_B, M)
    weights_BM = exposed(drawn.exposure, M)
    if motion.parametrise == "extent":
        reached_B = _larger_side(path_BM2, weights_BM > 0)
    else:
        reached_B = torch.full_like(drawn.size, LENGTH)
    grid_BM2 = (path_BM2 * (drawn.size / reached_B * GRID)[:, None, None]).round().long()
    return (grid_BM2 - _centroid(grid_BM2, weights_BM)[:, None]).double() * (1 / GRID)


def exposed(exposure_B: Tensor, samples: int) -> Tensor:
    """Return how much of each sample's time is exposed, float64 (B, M) in [0, 1], multiples of 1 / WEIGHT.

    Sample t stands for the time from t to t + 1; the shutter is open from 0 to exposure * M.
    """
    t_M = torch.arange(samples, dtype=torch.float64, device=exposure_B.device)
    share_BM = (exposure_B[:, None] * samples - t_M).clamp(0, 1)
    return (share_BM * WEIGHT).round() * (1 / WEIGHT)


def _shaken(drawn: Draw, keys_B: Tensor, M: int) -> Tensor:
    """Run the equations with velocities in units of s: float64 (B, M, 2) in pixels at L = 60.

    Columns and rows are apart, (2, B), so that what is per path broadcasts over long rows.
    """
    step, coarser = LENGTH / (M - 1), SAMPLES / M
    words_MB4 = words(keys_B, 4 * (M - 1), Stream.SHAKE).unflatten(1, (M - 1, 4)).transpose(0, 1)
    shake_B = drawn.anxiety * drawn.gaussian * math.sqrt(coarser)
    noise_M2B = normal_pairs(words_MB4[..., 2], words_MB4[..., 3]).transpose(1, 2) * shake_B
    pull_B = drawn.anxiety * drawn.inertia * (coarser * step)
    jumps_MB = words_MB4[..., 0].double() * 2.0**-32 < drawn.anxiety * drawn.impulse * coarser
    jump_M2B = _jump(words_MB4[..., 1], jumps_MB)
    speed_B = (drawn.anxiety * (1 / step)).clamp_min(1e-100)  # of the start; its square must not vanish
    v_2B = unit_vector(drawn.turn).T * torch.where(drawn.anxiety > 0, speed_B, 1.0)
    x_2B = torch.zeros_like(v_2B)
    path = [x_2B]
    for noise_2B, jump_2B, jumped in zip(noise_M2B, jump_M2B, jumps_MB.any(1).tolist(), strict=True):
        if jumped:  # rare; for the others of the batch it is a multiplication by 1 + 0i, which changes no bit
            v_2B = _complex_product(v_2B, jump_2B)
        w_2B = v_2B + noise_2B - x_2B * pull_B
        square_2B = w_2B * w_2B
        v_2B = w_2B / square_root(square_2B[0] + square_2B[1])
        x_2B = x_2B + v_2B
        path.append(x_2B)
    return torch.stack(path).permute(2, 0, 1) * step


def _jump(words_MB: Tensor, jumps_MB: Tensor) -> Tensor:
    """Return 1 + 2 e^(i (pi + u - 1/2)) where there is a jump, else 1: what a velocity is multiplied by, (M, 2, B)."""
    turns = words_MB[jumps_MB].double() * (2.0**-32 / math.tau) + (0.5 - 0.5 / math.tau)
    factor_MB2 = torch.zeros(*words_MB.shape, 2, dtype=torch.float64, device=words_MB.device)
    factor_MB2[jumps_MB] = unit_vector(turns) * 2.0
    factor_MB2[..., 0] += 1.0
    return factor_MB2.transpose(1, 2)


def _complex_product(a_2B: Tensor, b_2B: Tensor) -> Tensor:
    """Multiply as complex numbers; torch's own product of them may be fused on a GPU."""
    (a, b), (c, d) = a_2B, b_2B
    return torch.stack((a * c - b * d, a * d + b * c))


def _larger_side(path_BM2: Tensor, mask_BM: Tensor) -> Tensor:
    """Return the larger side of the box round the masked samples, (B,)."""
    hidden_BM1 = ~mask_BM[..., None]
    high_B2 = path_BM2.masked_fill(hidden_BM1, -math.inf).amax(1)
    return (high_B2 - path_BM2.masked_fill(hidden_BM1, math.inf).amin(1)).amax(-1)


def _centroid(grid_BM2: Tensor, weights_BM: Tensor) -> Tensor:
    """Return the weighted mean of integer coordinates, rounded to integers, int64 (B, 2): exact, so of one value."""
    whole_BM1 = (weights_BM * WEIGHT).long()[..., None]
    total_B1 = whole_BM1.sum(1)
    return ((grid_BM2 * whole_BM1).sum(1) * 2 + total_B1).div(total_B1 * 2, rounding_mode="floor")
