"""Functions to approximate on [0, 1]^d, with a Lipschitz constant that is known and a power of two.

Each name is a family: a seed chooses its phases, so that several seeds are several functions of one kind. Distances are in
the sup norm. Legend: N points, D dimensions.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A family of functions on [0, 1]^dims, all with Lipschitz constant at most `lipschitz` in the sup norm."""

    name: str
    dims: int
    lipschitz: float
    seed: int

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the values (N,) at points (N, D) of any floating type.

        Raises:
            ValueError: points of another dimension.
        """
        if x_ND.ndim != 2 or x_ND.shape[1] != self.dims:
            raise ValueError(f"{self.name} takes points (N, {self.dims}), got {tuple(x_ND.shape)}")
        phase_D = torch.rand(self.dims, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        shifted_ND = x_ND + phase_D.to(x_ND)
        if self.name == "sine_1d":  # slope at most 2 pi < 8
            return torch.sin(2 * math.pi * shifted_ND[:, 0])
        if self.name == "waves_2d":  # |df/dx| + |df/dy| = 2 pi (|cos cos| + |sin sin|) <= 2 pi < 8
            return torch.sin(2 * math.pi * shifted_ND[:, 0]) * torch.cos(2 * math.pi * shifted_ND[:, 1])
        # each of four terms has slopes pi (|cos sin| + |sin cos|) <= pi < 4 in the sup norm, and the mean no more
        return torch.sin(math.pi * shifted_ND).unflatten(1, (4, 2)).prod(2).mean(1)


FAMILIES: dict[str, tuple[int, float]] = {"sine_1d": (1, 8.0), "waves_2d": (2, 8.0), "waves_8d": (8, 4.0)}


def target(name: str, seed: int = 0) -> Target:
    """Return a member of a family.

    Args:
        name: "sine_1d" (sine), "waves_2d" (a product of waves) or "waves_8d" (a mean of four products of two waves).
        seed: of its phases.
    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.3)
        hint = f", nearest: {near[0]!r}" if near else ""
        raise ValueError(f"unknown target {name!r}{hint}; known: {', '.join(FAMILIES)}")
    dims, lipschitz = FAMILIES[name]
    return Target(name, dims, lipschitz, seed)
