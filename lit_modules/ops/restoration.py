"""Losses between a restored and a sharp image: L1, L2, Charbonnier, and the PSNR itself.

Legend: B batch, C channels, H height, W width. All return a scalar, computed in float32 (float64 for float64 images).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def l1(restored_BCHW: Tensor, sharp_BCHW: Tensor) -> Tensor:
    """Return the mean absolute difference."""
    return _difference(restored_BCHW, sharp_BCHW).abs().mean()


def l2(restored_BCHW: Tensor, sharp_BCHW: Tensor) -> Tensor:
    """Return the mean squared difference."""
    return _difference(restored_BCHW, sharp_BCHW).square().mean()


def charbonnier(restored_BCHW: Tensor, sharp_BCHW: Tensor, eps: float = 1e-3) -> Tensor:
    """Return the mean of sqrt(difference^2 + eps^2): L1 with a round bottom; eps, not 0, for equal images.

    Raises:
        ValueError: eps not above 0.
    Source: LapSRN (arXiv 1710.01992), eq. 6, whose eps is 1e-3.
    """
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    return (_difference(restored_BCHW, sharp_BCHW).square() + eps**2).sqrt().mean()


def psnr_loss(restored_BCHW: Tensor, sharp_BCHW: Tensor) -> Tensor:
    """Return minus the mean over images of their PSNR in dB, for data range 1 and floored at an MSE of 1e-8 (80 dB).

    A logarithm per image: its gradient does not shrink as the image gets better, and hard images do not drown easy ones.

    Source: HINet (arXiv 2105.06086), as NAFNet (arXiv 2204.04676) trains; the floor is NAFNet's code's.
    """
    mse_B = _difference(restored_BCHW, sharp_BCHW).square().flatten(1).mean(1)
    return 10 / math.log(10) * (mse_B + 1e-8).log().mean()


LOSSES: dict[str, Loss] = {"l1": l1, "l2": l2, "charbonnier": charbonnier, "psnr": psnr_loss}


def restoration_loss(kind: str, eps: float | None = None) -> Loss:
    """Return the loss of a name in LOSSES, as f(restored, sharp) -> scalar.

    Args:
        eps: of Charbonnier; None for its default.
    Raises:
        ValueError: an unknown kind, or eps for a loss that has none.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown restoration loss {kind!r}; known: {', '.join(LOSSES)}")
    if eps is None:
        return LOSSES[kind]
    if kind != "charbonnier":
        raise ValueError(f"only charbonnier has an eps, not {kind}")
    return partial(charbonnier, eps=eps)


def _difference(restored_BCHW: Tensor, sharp_BCHW: Tensor) -> Tensor:
    """Return restored - sharp; broadcasting two shapes would hide a mistake."""
    if restored_BCHW.shape != sharp_BCHW.shape:
        raise ValueError(
            f"restored and sharp images must match, got {tuple(restored_BCHW.shape)} and {tuple(sharp_BCHW.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(restored_BCHW.dtype, sharp_BCHW.dtype), torch.float32)
    return restored_BCHW.to(dtype) - sharp_BCHW.to(dtype)
