"""Test-time noise on images in [0, 1]: six kinds, each a pure function of the image and a generator.

Legend: B batch, C channels, H height, W width. The kinds and levels are our choice: those of arXiv 2103.02096 are unknown.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor

NOISE_SUITE: tuple[tuple[str, float], ...] = (
    *(("gaussian", sigma) for sigma in (0.1, 0.2, 0.3, 0.5)),
    *(("salt_pepper", share) for share in (0.02, 0.05, 0.1, 0.2)),
    ("salt", 0.05),
    ("pepper", 0.05),
    *(("speckle", sigma) for sigma in (0.3, 0.6)),
    *(("uniform", half) for half in (0.2, 0.4)),
)


def gaussian(x_BCHW: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Add N(0, sigma ** 2) to every value."""
    return x_BCHW + sigma * _normal(x_BCHW, generator)


def speckle(x_BCHW: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Multiply every value by 1 + N(0, sigma ** 2)."""
    return x_BCHW * (1 + sigma * _normal(x_BCHW, generator))


def uniform(x_BCHW: Tensor, half: float, generator: Generator) -> Tensor:
    """Add U(-half, half) to every value."""
    return x_BCHW + half * (2 * _uniform(x_BCHW, generator) - 1)


def salt_pepper(x_BCHW: Tensor, share: float, generator: Generator) -> Tensor:
    """Set each value with probability `share` to an extreme: half of them to 1, half to 0."""
    draw = _uniform(x_BCHW, generator)
    salted = torch.where(draw < share / 2, torch.ones_like(x_BCHW), x_BCHW)
    return torch.where((draw >= share / 2) & (draw < share), torch.zeros_like(x_BCHW), salted)


def salt(x_BCHW: Tensor, share: float, generator: Generator) -> Tensor:
    """Set each value with probability `share` to 1."""
    return torch.where(_uniform(x_BCHW, generator) < share, torch.ones_like(x_BCHW), x_BCHW)


def pepper(x_BCHW: Tensor, share: float, generator: Generator) -> Tensor:
    """Set each value with probability `share` to 0."""
    return torch.where(_uniform(x_BCHW, generator) < share, torch.zeros_like(x_BCHW), x_BCHW)


KINDS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    f.__name__: f for f in (gaussian, salt_pepper, salt, pepper, speckle, uniform)
}


def add_noise(x_BCHW: Tensor, kind: str, level: float, generator: Generator, clip: bool = True) -> Tensor:
    """Return a noisy copy of images in [0, 1].

    Args:
        x_BCHW: images (B, C, H, W), floating, on the generator's device.
        kind: "gaussian" or "speckle" (level: standard deviation), "uniform" (level: half width), "salt_pepper", "salt"
            or "pepper" (level: share of the values, at most 1).
        level: not negative.
        generator: the only source of randomness.
        clip: keep the result in [0, 1].
    Raises:
        ValueError: an unknown kind, nearest one included, or an impossible level.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.3)
        raise ValueError(
            f"unknown noise '{kind}'{f', nearest: {near[0]!r}' if near else ''}; known: {', '.join(KINDS)}"
        )
    highest = 1.0 if kind in ("salt_pepper", "salt", "pepper") else float("inf")
    if not 0 <= level <= highest:
        raise ValueError(f"the level of {kind} must lie between 0 and {highest:g}, got {level}")
    noisy_BCHW = KINDS[kind](x_BCHW, level, generator)
    return noisy_BCHW.clamp(0, 1) if clip else noisy_BCHW


def noise_generator(seed: int, kind: str, level: float, batch_index: int) -> Generator:
    """Return the CPU generator of one batch under one condition: the same for every net, whatever ran before."""
    key = hashlib.sha256(f"{seed}|{kind}|{level:g}|{batch_index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def _normal(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
