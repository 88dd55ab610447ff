"""Learning-rate schedules as pure functions of the epoch: each maker returns `factor(epoch) -> multiplier`.

`epoch` is real-valued (epochs completed so far, counted in optimiser steps), so the same law works per step and per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def step_decay(gamma: float, every: int) -> Schedule:
    """Return the published law of the tropical CNN code: epoch e runs at gamma ** floor((e + 1) / every).

    The published script calls StepLR.step() at the start of each epoch, hence the + 1.

    Args:
        gamma: factor per decay, in (0, 1].
        every: epochs between decays, at least 1.
    Raises:
        ValueError: gamma or every out of range.
    Source: co-author's code of arXiv 2103.02096: Adam 0.02, StepLR(2, 0.95).
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    if every < 1:
        raise ValueError(f"every must be at least 1 epoch, got {every}")
    return lambda epoch: gamma ** ((math.floor(epoch) + 1) // every)


def exponential_decay(gamma: float) -> Schedule:
    """Return gamma ** floor(epoch), the follow-up's ExponentialLR (arXiv 2504.06881, its code: gamma 0.9).

    Raises:
        ValueError: gamma out of (0, 1].
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    return lambda epoch: gamma ** math.floor(epoch)


def cosine(epochs: float, floor: float = 0.0, warmup: float = 0.0, start: float = 0.0) -> Schedule:
    """Return a linear warm-up from `start` to 1 over `warmup` epochs, then a half cosine from 1 to `floor` at `epochs`.

    Raises:
        ValueError: epochs not above warmup, or floor or start out of [0, 1].
    """
    if epochs <= warmup or warmup < 0:
        raise ValueError(f"epochs ({epochs}) must be above warmup ({warmup}), and warmup at least 0")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}")
    if not 0 <= start <= 1:
        raise ValueError(f"start must lie in [0, 1], got {start}")

    def factor(epoch: float) -> float:
        if epoch < warmup:
            return start + (1 - start) * epoch / warmup
        progress = min(1.0, (epoch - warmup) / (epochs - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def token_cosine(epochs: float, floor: float = 0.0, warmup: float = 0.0, start: float = 0.0) -> Schedule:
    """Return the same law with the warm-up as a share of the whole: 0.05 of the tokens, say, whatever their number.

    Raises:
        ValueError: warmup out of [0, 1), or what `cosine` refuses.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share of the training in [0, 1), got {warmup}")
    return cosine(epochs, floor, warmup * epochs, start)


def linear_decay(epochs: float, constant: float = 0.5) -> Schedule:
    """Return 1 for a share of the training, then a straight line to 0 at `epochs`.

    Raises:
        ValueError: epochs not above 0, or constant out of [0, 1).
    Source: DeblurGAN's code (arXiv 1711.07064): constant for 150 epochs, then to 0 within another 150.
    """
    if epochs <= 0:
        raise ValueError(f"epochs must be above 0, got {epochs}")
    if not 0 <= constant < 1:
        raise ValueError(f"constant is a share of the training in [0, 1), got {constant}")
    return lambda epoch: min(1.0, max(0.0, (1 - epoch / epochs) / (1 - constant)))
