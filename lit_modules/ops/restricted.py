"""The restricted normalisation of a tropical layer: the tightest weights that leave its outputs on given samples unchanged.

For a min-plus layer g = min over j of (W_ij + f_j) and a finite set D of samples, W'_ij = max over D of (g_i - f_j); for a
max-plus layer W'_ij = min over D of (g_i - f_j). This is a tropical product over the sample axis, so the layer's own
kernel computes it.

Legend: N samples, K inputs and M outputs of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_modules.ops.tropical import Inner, tropical_matmul

DUAL: dict[str, Inner] = {"min": "max", "max": "min"}


def restricted_weight(f_NK: Tensor, g_NM: Tensor, kind: Inner) -> Tensor:
    """Return W' (M, K), the restricted normal form of a layer on these samples.

    Args:
        f_NK: the layer's own inputs on the samples (not the net's), float.
        g_NM: its outputs there, same type and device.
        kind: "min" for a min-plus layer, "max" for a max-plus layer.
    Returns:
        W' (M, K). For "min" W' <= W, and W'_ij + f_j >= g_i on all samples with equality on at least one; dually for "max";
        all of it up to rounding.
    Raises:
        ValueError: another kind, shapes that do not fit, no samples, no inputs or outputs, or a value that is not finite,
            with its place.
    Source: arXiv 2102.06358 names a normalisation that improves convergence; the formula is that of two public
        re-implementations, which agree. That the samples' axis makes it a tropical product is ours.
    """
    if kind not in DUAL:
        raise ValueError(f"kind must be min or max, got {kind!r}")
    if f_NK.ndim != 2 or g_NM.ndim != 2 or len(f_NK) != len(g_NM):
        raise ValueError(f"f (N, K) and g (N, M) must share N, got {tuple(f_NK.shape)} and {tuple(g_NM.shape)}")
    if not len(f_NK):
        raise ValueError(
            "the restricted normalisation needs at least one sample, got 0: nothing would bound the weights"
        )
    if not f_NK.shape[1] or not g_NM.shape[1]:
        raise ValueError(f"a tropical layer of {f_NK.shape[1]} inputs and {g_NM.shape[1]} outputs has no normal form")
    require_finite(f_NK, "input")
    require_finite(g_NM, "output")
    w_MK = tropical_matmul(g_NM.t().contiguous(), -f_NK.t(), kind=DUAL[kind])
    require_finite(w_MK, "normal form")
    return w_MK


def tighter(one_MK: Tensor, other_MK: Tensor, kind: Inner) -> Tensor:
    """Join the normal forms of two sets of samples into that of their union."""
    return torch.maximum(one_MK, other_MK) if kind == "min" else torch.minimum(one_MK, other_MK)


def require_finite(x: Tensor, what: str) -> None:
    """Do nothing if all of `x` is finite.

    Raises:
        ValueError: the first value that is not, and its place.
    """
    finite = torch.isfinite(x)
    if not finite.all():
        place = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{what} {place} is {x[tuple(place)].item()}: the restricted normalisation takes finite values"
        )
