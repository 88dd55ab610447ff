"""The compiled CPU path of the tropical convolution, as an autograd function round the kernels of `_tropical_numba`.

It takes all options and any shape; where it suits, `lit_modules.ops.tropical_direct` is the faster compiled path.

Legend: B batch, C channels per group, F filters, H W padded input, O P output height and width, K kernel positions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_modules.ops import _tropical_numba
from lit_modules.ops.geometry import Geometry

kernels: Any = _tropical_numba  # numba's dispatchers have no static signature
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


class _Conv2d(torch.autograd.Function):
    """max is min of negated operands: y = sign * kernel(sign * x, sign * w), with min and max of channels swapped."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, mix: Tensor, inner: str, outer: str, geometry: Geometry, ties: str
    ) -> Tensor:
        ctx.sign = 1 if inner == "min" else -1
        ctx.outer = CODE[outer if inner == "min" else DUAL[outer]]
        ctx.geometry, ctx.split, ctx.shape = geometry, ties == "split", x.shape
        x_NB = _batch_last(x, ctx.sign)
        ctx.save_for_backward(x_NB, w, mix)
        y_FPB = torch.empty(w.shape[0], geometry.output[0] * geometry.output[1], len(x), dtype=x.dtype)
        kernels.forward(*_operands(ctx, x_NB, w, mix), y_FPB.numpy(), ctx.outer, len(x))
        return _batch_first(y_FPB, ctx.sign).view(len(x), w.shape[0], *geometry.output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_NB, w, mix = ctx.saved_tensors
        filters, batch = w.shape[0], x_NB.shape[1]
        g_FPB = _batch_last(g, 1).view(filters, -1, batch).numpy()
        needed = ctx.needs_input_grad[0]  # a net's first layer needs no gradient of its images
        dx_NB = torch.zeros_like(x_NB) if needed else x_NB.new_empty(0, batch)
        dw_FCKL = np.zeros((filters, w.shape[1], w[0, 0].numel(), kernels.LANES))
        dmix_FC = np.zeros(tuple(mix.shape))
        operands = _operands(ctx, x_NB, w, mix)
        kernels.backward(*operands, g_FPB, ctx.outer, batch, ctx.split, dx_NB.numpy().reshape(-1), dw_FCKL, dmix_FC)
        dx = _batch_first(dx_NB, 1).view(ctx.shape) if needed else None
        dw = torch.from_numpy(dw_FCKL.sum(3)).to(w.dtype).view_as(w)
        dmix = torch.from_numpy(ctx.sign * dmix_FC).to(w.dtype) if mix.numel() else None
        return dx, dw, dmix, None, None, None, None


def _batch_last(x: Tensor, sign: int) -> Tensor:
    """Return sign * x as a contiguous (everything else, B); a copy wherever it is written to."""
    return _signed(x.detach().reshape(x.shape[0], -1).t(), sign)


def _batch_first(y: Tensor, sign: int) -> Tensor:
    """Return sign * y, given as (..., B), as a contiguous (B, everything else)."""
    return _signed(y.view(-1, y.shape[-1]).t(), sign)


def _signed(turned: Tensor, sign: int) -> Tensor:
    # A transposed single row is contiguous as it is, so contiguous() alone would hand out the caller's own memory.
    return turned.contiguous() if sign > 0 else turned.clone(memory_format=torch.contiguous_format).neg_()


def _operands(ctx: Any, x_NB: Tensor, w: Tensor, mix: Tensor) -> tuple[np.ndarray, ...]:
    """The kernels' first arguments: flat input, where windows, channels and taps lie in it, weights and channel weights."""
    w_FCK = (w.detach() if ctx.sign > 0 else -w.detach()).reshape(w.shape[0], w.shape[1], -1).contiguous().numpy()
    return x_NB.numpy().reshape(-1), *_layout(ctx.geometry, ctx.shape), w_FCK, mix.detach().contiguous().numpy()


@lru_cache(maxsize=256)
def _layout(geometry: Geometry, shape: torch.Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where windows (P), channels (C) and taps (K) start in the flat (C, H, W, B) input; read only, so it can be kept."""
    batch, channels, height, width = shape
    rows = np.arange(geometry.output[0]) * geometry.stride[0] * width
    columns = np.arange(geometry.output[1]) * geometry.stride[1]
    corners_P = (rows[:, None] + columns).reshape(-1) * batch
    planes_C = np.arange(channels) * (height * width * batch)
    steps = [k * geometry.dilation[0] * width + q * geometry.dilation[1] for k, q in geometry.offsets]
    return corners_P, planes_C, np.array(steps) * batch
