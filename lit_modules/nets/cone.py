"""Universal approximation by construction: an envelope of cones, as a net of a linear, a min-plus and a max-plus layer.

For f with Lipschitz constant c in the sup norm and centres x_i of covering radius r,

    g(x) = max over i of min over k, s in {+, -} of ( s c x_k + f(x_i) - s c x_ik )

satisfies 0 <= f - g <= 2 c r: each cone touches f at its centre and lies below f elsewhere. The linear layer has only the 2 d
fixed rows s c e_k, whatever the accuracy; with c a power of two they are shifts, and nothing is multiplied at all.

Legend: I centres, D dimensions, S = 2 D slopes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_modules.nets.layers import TropicalLinear
from lit_modules.nets.mmp import MMPNet
from lit_modules.ops.targets import target


def grid_centres(per_axis: int, dims: int) -> Tensor:
    """Return the middles of per_axis ** dims equal cubes (I, D), float64; their covering radius is 1 / (2 per_axis)."""
    if per_axis < 1 or dims < 1:
        raise ValueError(f"per_axis and dims must be at least 1, got {per_axis} and {dims}")
    axis = (torch.arange(per_axis, dtype=torch.float64) + 0.5) / per_axis
    return torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)


def cone_net(f: Callable[[Tensor], Tensor], centres_ID: Tensor, lipschitz: float) -> MMPNet:
    """Return the float64 net "L2d mI M1" that approximates f from below.

    Args:
        f: maps points (I, D) to values (I,).
        centres_ID: points, float64.
        lipschitz: c > 0, at least f's Lipschitz constant in the sup norm (with a smaller one, nothing is promised).
    Raises:
        ValueError: no centres, a constant that is not positive and finite, or values of another shape or not finite.
    Source: ours, the lattice form of the Stone-Weierstrass theorem made explicit (McShane's extension with sup-norm cones).
    """
    if centres_ID.ndim != 2 or not centres_ID.numel():
        raise ValueError(f"centres must be (I, D) with at least one, got {tuple(centres_ID.shape)}")
    if not 0 < lipschitz < float("inf"):
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz}")
    centres_ID = centres_ID.double()
    count, dims = centres_ID.shape
    values_I = f(centres_ID).double()
    if values_I.shape != (count,):
        raise ValueError(f"the function must map {tuple(centres_ID.shape)} to ({count},), got {tuple(values_I.shape)}")
    finite_I = torch.isfinite(values_I)
    if not finite_I.all():
        worst = int((~finite_I).nonzero()[0])
        raise ValueError(f"the function is {values_I[worst].item()} at centre {centres_ID[worst].tolist()}")
    net = MMPNet(f"L{2 * dims} m{count} M1", dims).double()
    linear, lower, upper = net[1], net[2], net[3]
    assert isinstance(linear, nn.Linear)
    assert isinstance(lower, TropicalLinear)
    assert isinstance(upper, TropicalLinear)
    axes_DD = torch.eye(dims, dtype=torch.float64)
    slopes_SD = lipschitz * torch.cat([axes_DD, -axes_DD])
    with torch.no_grad():
        linear.weight.copy_(slopes_SD)
        linear.bias.zero_()
        lower.weight.copy_(values_I[:, None] - centres_ID @ slopes_SD.T)
        upper.weight.zero_()
    return net


class ConeNet(nn.Module):
    """The cone net of a named target on a grid of centres, ready to be tested.

    Args:
        name, seed: of the target, see `lit_modules.ops.targets.target`.
        per_axis: centres per dimension.
    Attributes:
        bound: 2 c r = c / per_axis, which no error on [0, 1]^D exceeds.
    Shape: (B, D) to (B, 1), float64.
    """

    def __init__(self, name: str, seed: int, per_axis: int) -> None:
        super().__init__()
        chosen = target(name, seed)
        self.net = cone_net(chosen, grid_centres(per_axis, chosen.dims), chosen.lipschitz)
        self.bound = chosen.lipschitz / per_axis

    def forward(self, x_BD: Tensor) -> Tensor:
        """Map points (B, D) to values (B, 1)."""
        return self.net(x_BD.double())
