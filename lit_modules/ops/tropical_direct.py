"""The direct path of small tropical convolutions: an autograd function round the kernels of `_tropical_direct`.

Legend: B batch, A all channels, C channels per group, F filters, G groups of images cut together, H W input, N places of a
run, O P output height and width, K kernel positions, Q phases.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_modules.ops import _tropical_direct
from lit_modules.ops.geometry import Geometry

kernels: Any = _tropical_direct  # numba's dispatchers have no static signature
CODE = {"sum": kernels.SUM, "min": kernels.MIN, "max": kernels.MAX}
DUAL = {"sum": "sum", "min": "max", "max": "min"}
CHANNELS = 4  # of which a byte each, for the winners, is what one number of the output takes
PLACES = 2048  # of a run: enough for inner loops, little enough for the cache


def suits(shape: tuple[int, ...], geometry: Geometry, channels: int, padding: tuple[int, int]) -> bool:
    """Return whether the direct kernels are the better ones for an input (B, A, H, W), rather than the batch-last ones.

    They are for windows that fill at least half of the phases (a matrix product has one window in each row), for few
    channels, because a winner is stored for each, and for the kernels and strides that layers have.
    """
    if 0 in shape:
        return False
    rows, pitch = _phase(shape, geometry, padding)
    filled = 2 * geometry.output[0] * geometry.output[1] >= rows * pitch
    return filled and channels <= CHANNELS and geometry.stride[1] <= 2 and len(geometry.offsets) < kernels.NONE


def make_plan(shape: tuple[int, ...], geometry: Geometry, filters: int, channels: int, padding: tuple[int, int]) -> Any:
    """Return how the kernels cut an input (B, A, H, W) that is yet to be padded; `channels` are those of a group."""
    batch, total, high, wide = shape
    (s, t), (up, left) = geometry.stride, padding
    rows, pitch = _phase(shape, geometry, padding)
    images = min(max(PLACES // (rows * pitch), 1), batch)
    run, narrow = ceil(images * rows * pitch / kernels.STEP) * kernels.STEP, ceil(wide / t)

    def place(i: int, j: int) -> int:
        """Where pixel (i, j) of the first padded image lies."""
        return (i % s * t + j % t) * total * run + i // s * pitch + j // t

    taps = [place(k * geometry.dilation[0], q * geometry.dilation[1]) for k, q in geometry.offsets]
    blocks = [
        (
            i * narrow + j * images * total * high * narrow,
            place(i + up, j + left),
            ceil((high - i) / s),
            ceil((wide - j) / t),
        )
        for i in range(min(s, high))
        for j in range(min(t, wide))
    ]
    return kernels.Plan(
        stride_wide=t,
        filters=filters * channels // total,
        images=images,
        rows=rows,
        pitch=pitch,
        run=run,
        channels=total,
        image=high * narrow,
        combed=images * total * high * narrow,
        skip=s * narrow,
        size=s * t * total * run + max(taps),
        padded=up + left > 0,
        taps_K=np.array(taps),
        blocks_Q4=np.array(blocks),
    )


def _phase(shape: tuple[int, ...], geometry: Geometry, padding: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a phase of the padded image."""
    rows, columns = (ceil((shape[2 + i] + 2 * padding[i]) / geometry.stride[i]) for i in (0, 1))
    return rows, columns


def conv2d(
    x_BAHW: Tensor, w_FCKL: Tensor, inner: str, outer: str, plan: Any, padding: float, output: tuple[int, int]
) -> Tensor | None:
    """Return the tropical convolution of a float32 or float64 CPU input, or None if a sum of operands is not a number.

    Args:
        x_BAHW: the input, not padded; w_FCKL, inner, outer: as `lit_modules.ops.tropical.tropical_conv2d`, ties "first".
        plan: of `make_plan`.
        padding: what padded pixels hold.
        output: height and width.
    max is min of negated operands: y = sign * kernel(sign * x, sign * w), with min and max of channels swapped.
    """
    batch, (filters, channels) = len(x_BAHW), w_FCKL.shape[:2]
    differentiable = torch.is_grad_enabled() and (x_BAHW.requires_grad or w_FCKL.requires_grad)
    groups = -(-batch // plan.images) if differentiable else 0
    x, w = _array(x_BAHW), _array(w_FCKL)
    y_BFOP, winners_GFCN = (
        np.empty((batch, filters, *output), x.dtype),
        np.empty((groups, filters, channels, plan.run), np.uint8),
    )
    sign, code = (1, CODE[outer]) if inner == "min" else (-1, CODE[DUAL[outer]])
    total = kernels.forward(x, w, plan, padding, sign, code, y_BFOP, winners_GFCN)
    if total != total:
        return None
    y = torch.from_numpy(y_BFOP)
    if not differentiable:
        return y
    return _Conv2d.apply(x_BAHW, w_FCKL, _Found(y, torch.from_numpy(winners_GFCN)), plan)


class _Found(NamedTuple):
    """What the forward kernel has found; in a tuple so that autograd does not take it for inputs."""

    y_BFOP: Tensor
    winners_GFCN: Tensor


class _Conv2d(torch.autograd.Function):
    """The gradients of what has been found: the winners say all, the operands are not needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, found: _Found, plan: Any) -> Tensor:
        ctx.save_for_backward(found.winners_GFCN)
        ctx.shapes, ctx.plan = (x.shape, w.shape), plan
        return found.y_BFOP

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients are on only where a second derivative may be asked for; elsewhere the guard's microseconds are saved.
        return _guarded_gradients(ctx, g) if torch.is_grad_enabled() else _gradients(ctx, g)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (winners,) = ctx.saved_tensors
    x_shape, w_shape = ctx.shapes
    g_BFOP = _array(g)
    needed = ctx.needs_input_grad[0]  # a net's first layer needs no gradient of its images
    dx = np.empty(x_shape if needed else (0, 0, 0, 0), g_BFOP.dtype)
    dw = np.empty(w_shape, g_BFOP.dtype)
    kernels.backward(g_BFOP, winners.numpy(), ctx.plan, dx, dw)
    return torch.from_numpy(dx) if needed else None, torch.from_numpy(dw), None, None


_guarded_gradients = once_differentiable(_gradients)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()
