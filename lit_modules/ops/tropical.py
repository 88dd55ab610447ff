"""Tropical products: add in the place of multiply, min or max in the place of add.

`tropical_conv2d` is the convolution of arXiv 2103.02096 in all six forms, and with channel weights the building block of
the compound and parallel layers of arXiv 2504.06881; `tropical_matmul` is the matrix product of arXiv 2102.06358. One
kernel serves all: a matrix product is a convolution whose window is the whole row.

Legend: B batch, C channels per group, F filters, H W input, K L kernel, M outputs of a matrix product.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_modules.ops import tropical_compiled, tropical_portable
from lit_modules.ops.geometry import Geometry, pair
from lit_modules.ops.tropical_reference import conv2d_reference

Inner = Literal["min", "max"]
Outer = Literal["sum", "min", "max"]
Ties = Literal["first", "split"]
Backend = Literal["auto", "compiled", "portable", "reference"]
PaddingValue = float | Literal["neutral", "replicate"]

ZERO = {"min": float("inf"), "max": float("-inf")}  # the semiring's zero element: it never wins


def tropical_conv2d(
    x_BCHW: Tensor,
    w_FCKL: Tensor,
    *,
    inner: Inner,
    outer: Outer,
    mix_FC: Tensor | None = None,
    bias_F: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_value: PaddingValue = 0.0,
    ties: Ties = "first",
    backend: Backend = "auto",
) -> Tensor:
    """Reduce x + w over each channel's window by `inner`, then over channels by `outer`.

    y[b, f, p] = outer over c of ( mix[f, c] * inner over offsets o of ( x[b, c, stride * p + dilation * o - padding]
    + w[f, c, o] ) ) + bias[f]. It is a cross-correlation, like torch's.

    Args:
        x_BCHW: input (B, groups * C, H, W), any floating type.
        w_FCKL: weights (F, C, K, L), the input's type and device.
        inner: "min" or "max", over the window.
        outer: "sum", "min" or "max", over channels.
        mix_FC: weight of each channel's value (F, C), only with outer="sum".
        bias_F: added per filter (F,).
        stride, padding, dilation: pixels, an int or (height, width).
        groups: the channels and filters are cut into this many independent groups.
        padding_value: what padded pixels hold: a number (0 in the published code, where it is not neutral), "neutral"
            (+inf for min, -inf for max) or "replicate" (the edge pixel).
        ties: who gets the gradient where several win: "first" (kernel order, then channel order) or "split" (evenly).
        backend: "compiled" (CPU, float32 or float64), "portable" (any device and type), "reference" (slow) or "auto".
    Returns:
        y (B, F, H', W'), H' and W' as torch's conv2d. NaN comes out where NaN goes in. Memory is O(input + output).
        As with torch, a batch of none gives an output of none, and gradients of 0.
    Raises:
        ValueError, TypeError: naming the argument and what it may be.
    Source: the co-author's code of arXiv 2103.02096 (six forms); OpenTCNN for arXiv 2504.06881 (channel weights). Groups,
        dilation, the padding value and the tie rule as options are ours.
    """
    _check_choice("inner", inner, ("min", "max"))
    _check_choice("outer", outer, ("sum", "min", "max"))
    _check_choice("ties", ties, ("first", "split"))
    _check_choice("backend", backend, ("auto", "compiled", "portable", "reference"))
    _check_tensors(x_BCHW, w_FCKL, mix_FC, bias_F, groups, outer)
    padding = pair(padding, "padding", 0)
    padded_BCHW = _pad(x_BCHW, padding, padding_value, inner)
    geometry = _geometry(padded_BCHW, w_FCKL, stride, dilation, groups)
    if x_BCHW.shape[0] == 0:
        return _of_empty_batch((x_BCHW, w_FCKL, mix_FC, bias_F), (0, w_FCKL.shape[0], *geometry.output))
    chosen = _choose(backend, padded_BCHW, w_FCKL)
    if chosen == "reference":
        y_BFHW = conv2d_reference(padded_BCHW, w_FCKL, mix_FC, inner, outer, geometry, ties)
    else:
        conv2d = tropical_compiled.conv2d if chosen == "compiled" else tropical_portable.conv2d
        y_BFHW = conv2d(padded_BCHW, w_FCKL, mix_FC, inner, outer, geometry, ties)
    return y_BFHW if bias_F is None else y_BFHW + bias_F[:, None, None]


def tropical_matmul(
    x_BK: Tensor, w_MK: Tensor, *, kind: Inner, ties: Ties = "first", backend: Backend = "auto"
) -> Tensor:
    """Return the min-plus or max-plus product: y[..., m] = min or max over k of x[..., k] + w[m, k].

    Args:
        x_BK: (..., K), any floating type; leading dimensions are kept.
        w_MK: (M, K), the weights, as in nn.Linear.
        kind: "min" (zero element +inf) or "max" (zero element -inf).
        ties, backend: as in `tropical_conv2d`.
    Returns:
        y (..., M).
    Raises:
        ValueError: a product over no terms, or shapes that do not fit.
    Source: arXiv 2102.06358, abstract: the min-plus and max-plus layers.
    """
    if w_MK.ndim != 2 or x_BK.ndim < 1 or x_BK.shape[-1] != w_MK.shape[-1]:
        raise ValueError(f"x (..., K) and w (M, K) must share K; got {tuple(x_BK.shape)} and {tuple(w_MK.shape)}")
    if w_MK.shape[1] == 0:
        raise ValueError("a tropical product over zero inputs has no value: K must be at least 1")
    lead = x_BK.shape[:-1]
    if 0 in lead:
        return _of_empty_batch((x_BK, w_MK), (*lead, w_MK.shape[0]))
    x_B11K = x_BK.reshape(-1, 1, 1, x_BK.shape[-1])
    y_BM11 = tropical_conv2d(x_B11K, w_MK[:, None, None, :], inner=kind, outer="sum", ties=ties, backend=backend)
    return y_BM11.reshape(*lead, w_MK.shape[0])


def _of_empty_batch(operands: tuple[Tensor | None, ...], shape: tuple[int, ...]) -> Tensor:
    """An output without elements that still depends on its operands, so that each of them gets a gradient of 0."""
    given = [tensor for tensor in operands if tensor is not None]
    return torch.stack([tensor.sum() for tensor in given]).sum() * given[0].new_zeros(shape)


def _choose(backend: Backend, x_BCHW: Tensor, w_FCKL: Tensor) -> str:
    compilable = x_BCHW.device.type == "cpu" and x_BCHW.dtype in (torch.float32, torch.float64)
    if backend == "compiled" and not compilable:
        raise ValueError(f"the compiled path is for CPU float32 or float64, got {x_BCHW.device} {x_BCHW.dtype}")
    if backend in ("portable", "reference"):
        return backend
    if not compilable:
        return "portable"
    # A comparison drops NaN where min and max must keep it; such inputs take the path that keeps it.
    has_nan = bool(torch.isnan(x_BCHW.detach().sum() + w_FCKL.detach().sum()))
    return "portable" if has_nan else "compiled"


def _pad(x_BCHW: Tensor, padding: tuple[int, int], value: PaddingValue, inner: Inner) -> Tensor:
    if isinstance(value, str) and value not in ("neutral", "replicate"):
        raise ValueError(f"padding_value must be a number, 'neutral' or 'replicate', got {value!r}")
    high, wide = padding
    if high == wide == 0:
        return x_BCHW
    sides = (wide, wide, high, high)
    if value == "replicate":
        return F.pad(x_BCHW, sides, mode="replicate")
    return F.pad(x_BCHW, sides, value=ZERO[inner] if value == "neutral" else float(value))


def _geometry(
    padded_BCHW: Tensor, w_FCKL: Tensor, stride: int | tuple[int, int], dilation: int | tuple[int, int], groups: int
) -> Geometry:
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    kernel = (w_FCKL.shape[2], w_FCKL.shape[3])
    size = padded_BCHW.shape[2:]
    output = tuple((size[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    if min(output) < 1:
        raise ValueError(
            f"the window {kernel} with dilation {dilation} does not fit the padded input {tuple(size)}: "
            "use a smaller kernel or dilation, or more padding"
        )
    return Geometry(kernel, stride, dilation, groups, (output[0], output[1]))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_tensors(
    x_BCHW: Tensor, w_FCKL: Tensor, mix_FC: Tensor | None, bias_F: Tensor | None, groups: int, outer: Outer
) -> None:
    if x_BCHW.ndim != 4 or w_FCKL.ndim != 4:
        shapes = f"{tuple(x_BCHW.shape)} and {tuple(w_FCKL.shape)}"
        raise ValueError(f"the input must be (B, C, H, W) and the weight (F, C / groups, K, L); got {shapes}")
    filters, channels = w_FCKL.shape[:2]
    if groups < 1 or x_BCHW.shape[1] != channels * groups or filters % max(groups, 1):
        raise ValueError(
            f"{x_BCHW.shape[1]} input channels, {groups} groups and weight {tuple(w_FCKL.shape)} do not fit: "
            "the weight's second size is channels / groups, and groups must divide the filters"
        )
    if 0 in w_FCKL.shape:
        raise ValueError(f"nothing to reduce: input {tuple(x_BCHW.shape)}, weight {tuple(w_FCKL.shape)}")
    if mix_FC is not None and outer != "sum":
        raise ValueError(f"mix weights the channels of a sum; with outer={outer!r} it has no meaning")
    expected = {"mix": (mix_FC, (filters, channels)), "bias": (bias_F, (filters,)), "weight": (w_FCKL, None)}
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != x_BCHW.dtype or tensor.device != x_BCHW.device:
            raise TypeError(
                f"input and {name} must share one floating type and device; "
                f"got {x_BCHW.dtype} on {x_BCHW.device} and {tensor.dtype} on {tensor.device}"
            )
