"""The tropical convolution written as its definition: broadcast every patch, then reduce. Slow, for tests and peers.

Legend: B batch, G groups, C channels per group, F filters per group, P output positions, O kernel offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_modules.ops.geometry import Geometry


def conv2d_reference(
    x_BCHW: Tensor, w_FCKL: Tensor, mix_FC: Tensor | None, inner: str, outer: str, geometry: Geometry, ties: str
) -> Tensor:
    """Return the tropical convolution of an already padded input by broadcasting; gradients are autograd's.

    Args and errors: as `lit_modules.ops.tropical.tropical_conv2d`. Memory is O(B F C K L P): that is its point.
    Ties: `min(dim)` hands the gradient to one index, `amin(dim)` shares it evenly.
    """
    groups, filters = geometry.groups, w_FCKL.shape[0] // geometry.groups
    patches_BGCOP = _patches(x_BCHW, geometry).unflatten(1, (groups, -1))
    w_GFCO = w_FCKL.flatten(2).unflatten(0, (groups, filters))
    sums = patches_BGCOP[:, :, None] + w_GFCO[None, ..., None]  # B G F C O P
    value_BGFCP = _reduce(sums, 4, inner, ties)
    if mix_FC is not None:
        value_BGFCP = value_BGFCP * mix_FC.unflatten(0, (groups, filters))[None, ..., None]
    y_BGFP = value_BGFCP.sum(3) if outer == "sum" else _reduce(value_BGFCP, 3, outer, ties)
    return y_BGFP.flatten(1, 2).unflatten(2, geometry.output)


def _patches(x_BCHW: Tensor, geometry: Geometry) -> Tensor:
    """Every kernel offset's view of the input, stacked: (B, C, O, P)."""
    return torch.stack([geometry.view(x_BCHW, k, q).flatten(2) for k, q in geometry.offsets], dim=2)


def _reduce(values: Tensor, dim: int, kind: str, ties: str) -> Tensor:
    if ties == "split":
        return values.amin(dim) if kind == "min" else values.amax(dim)
    return values.min(dim).values if kind == "min" else values.max(dim).values
