"""The compiled CPU path of the tropical convolution, as an autograd function round the kernels of `_tropical_numba`.

Legend: B batch, C channels per group, F filters, H W padded input, O P output, K L kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_modules.ops import _tropical_numba as kernels
from lit_modules.ops.geometry import Geometry

CODE = {"sum": kernels.SUM, "min": kernels.MIN, "max": kernels.MAX}
DUAL = {"sum": "sum", "min": "max", "max": "min"}


def conv2d(
    x_BCHW: Tensor, w_FCKL: Tensor, mix_FC: Tensor | None, inner: str, outer: str, geometry: Geometry, ties: str
) -> Tensor:
    """Return the tropical convolution of an already padded float32 or float64 CPU input, NaN-free.

    Args as `lit_modules.ops.tropical.tropical_conv2d`. Patches are never materialised and winners never stored: the
    memory is that of the operands and the output, in forward and in backward.
    """
    mix = mix_FC if mix_FC is not None else x_BCHW.new_empty(0, 0)
    return _Conv2d.apply(x_BCHW, w_FCKL, mix, inner, outer, geometry, ties)


def _innermost_batch(x_BCHW: Tensor, sign: int) -> np.ndarray:
    x_CHWB = x_BCHW.detach().permute(1, 2, 3, 0)
    return (x_CHWB.contiguous() if sign > 0 else -x_CHWB).contiguous().numpy()


class _Conv2d(torch.autograd.Function):
    """max is min of the negated operands: y = sign * kernel(sign * x, sign * w), with min and max of channels swapped."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, mix: Tensor, inner: str, outer: str, geometry: Geometry, ties: str
    ) -> Tensor:
        ctx.save_for_backward(x, w, mix)
        ctx.sign = 1 if inner == "min" else -1
        ctx.outer = CODE[outer if inner == "min" else DUAL[outer]]
        ctx.geometry, ctx.split = geometry, ties == "split"
        y_FOPB = np.empty((w.shape[0], *geometry.output, x.shape[0]), dtype=w.detach().numpy().dtype)
        kernels.forward(*_operands(x, w, mix, ctx.sign), y_FOPB, ctx.outer, *geometry.stride, *geometry.dilation)
        y_BFOP = torch.from_numpy(y_FOPB).permute(3, 0, 1, 2)
        return (y_BFOP if ctx.sign > 0 else -y_BFOP).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, mix = ctx.saved_tensors
        x_CHWB, w_FCKL, mix_FC = _operands(x, w, mix, ctx.sign)
        g_FOPB = g.permute(1, 2, 3, 0).contiguous().numpy()
        dx_CHWB = np.zeros_like(x_CHWB)
        dw_FCKL, dmix_FC = np.zeros(w_FCKL.shape), np.zeros(mix_FC.shape)
        steps = (*ctx.geometry.stride, *ctx.geometry.dilation)
        kernels.backward(
            x_CHWB, w_FCKL, mix_FC, g_FOPB, ctx.outer, ctx.split, *steps, dx_CHWB, dw_FCKL, dmix_FC
        )  # fmt: skip
        dx = torch.from_numpy(dx_CHWB).permute(3, 0, 1, 2)
        dw = torch.from_numpy(dw_FCKL).to(w.dtype)
        dmix = torch.from_numpy(ctx.sign * dmix_FC).to(w.dtype)
        return dx, dw, dmix if mix.numel() else None, None, None, None, None


def _operands(x: Tensor, w: Tensor, mix: Tensor, sign: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w_FCKL = (w.detach() if sign > 0 else -w.detach()).contiguous().numpy()
    return _innermost_batch(x, sign), w_FCKL, mix.detach().contiguous().numpy()
