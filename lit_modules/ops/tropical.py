"""Tropical products: add in the place of multiply, min or max in the place of add.

`tropical_conv2d` is the convolution of arXiv 2103.02096 in all six forms, and with channel weights the building block of
the compound and parallel layers of arXiv 2504.06881; `tropical_matmul` is the matrix product of arXiv 2102.06358. One
kernel serves all: a matrix product is a convolution whose window is the whole row.

Legend: B batch, C channels per group, F filters, H W input, K L kernel, M outputs of a matrix product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_modules.ops import tropical_compiled, tropical_direct, tropical_portable
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
    options = _Options(
        inner, outer, _hashable(stride), _hashable(padding), _hashable(dilation), groups, padding_value, ties, backend
    )
    way = _settle(options, _spec(x_BCHW), _spec(w_FCKL), _spec(mix_FC), _spec(bias_F))
    if x_BCHW.shape[0] == 0:
        return _of_empty_batch((x_BCHW, w_FCKL, mix_FC, bias_F), (0, w_FCKL.shape[0], *way.geometry.output))
    y_BFHW = _conv2d(x_BCHW, w_FCKL, mix_FC, options, way)
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


class _Options(NamedTuple):
    inner: Inner
    outer: Outer
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    dilation: int | tuple[int, int]
    groups: int
    padding_value: PaddingValue
    ties: Ties
    backend: Backend


class _Way(NamedTuple):
    """How a call is done: by which path, and by which plan if small layers' direct kernels are the faster ones."""

    path: Literal["compiled", "portable", "reference"]
    geometry: Geometry
    padding: tuple[int, int]
    value: float | Literal["replicate"]
    plan: Any


_Spec = tuple[tuple[int, ...], torch.dtype, torch.device]


def _spec(tensor: Tensor | None) -> _Spec | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _hashable(value: int | tuple[int, int]) -> int | tuple[int, int]:
    return value if isinstance(value, int) else tuple(value)  # type: ignore[return-value]  # `pair` counts


@lru_cache(maxsize=512)
def _settle(options: _Options, x: _Spec, w: _Spec, mix: _Spec | None, bias: _Spec | None) -> _Way:
    """Check everything that can be said without looking at numbers; kept, because small layers are called often."""
    _check_choice("inner", options.inner, ("min", "max"))
    _check_choice("outer", options.outer, ("sum", "min", "max"))
    _check_choice("ties", options.ties, ("first", "split"))
    _check_choice("backend", options.backend, ("auto", "compiled", "portable", "reference"))
    _check_tensors(x, w, mix, bias, options)
    padding, value = pair(options.padding, "padding", 0), options.padding_value
    if isinstance(value, str) and value not in ("neutral", "replicate"):
        raise ValueError(f"padding_value must be a number, 'neutral' or 'replicate', got {value!r}")
    batch, channels, high, wide = x[0]
    size = high + 2 * padding[0], wide + 2 * padding[1]
    geometry = _geometry(size, (w[0][2], w[0][3]), options)
    path, plan = _choose(options.backend, x), None
    if path == "compiled" and options.ties == "first" and mix is None:
        shape, pads = ((batch, channels, *size), (0, 0)) if value == "replicate" else (x[0], padding)
        if tropical_direct.suits(shape, geometry, w[0][1], pads):
            plan = tropical_direct.make_plan(shape, geometry, w[0][0], w[0][1], pads)
    if value != "replicate":
        value = ZERO[options.inner] if value == "neutral" else float(value)
    return _Way(path, geometry, padding, value, plan)


def _conv2d(x_BCHW: Tensor, w_FCKL: Tensor, mix_FC: Tensor | None, options: _Options, way: _Way) -> Tensor:
    if way.value == "replicate":
        x_BCHW = _pad(x_BCHW, way)
    if way.plan is not None:
        value = 0.0 if way.value == "replicate" else way.value
        y = tropical_direct.conv2d(x_BCHW, w_FCKL, options.inner, options.outer, way.plan, value, way.geometry.output)
        if y is not None:
            return y
    if way.value != "replicate":
        x_BCHW = _pad(x_BCHW, way)
    path = way.path
    if path == "compiled" and options.backend == "auto" and _has_nan(x_BCHW, w_FCKL):
        path = "portable"  # a comparison drops NaN where min and max must keep it
    conv2d = {"compiled": tropical_compiled.conv2d, "portable": tropical_portable.conv2d, "reference": conv2d_reference}
    return conv2d[path](x_BCHW, w_FCKL, mix_FC, options.inner, options.outer, way.geometry, options.ties)


def _has_nan(x_BCHW: Tensor, w_FCKL: Tensor) -> bool:
    return bool(torch.isnan(x_BCHW.detach().sum() + w_FCKL.detach().sum()))


def _choose(backend: Backend, x: _Spec) -> Literal["compiled", "portable", "reference"]:
    _, dtype, device = x
    compilable = device.type == "cpu" and dtype in (torch.float32, torch.float64)
    if backend == "compiled" and not compilable:
        raise ValueError(f"the compiled path is for CPU float32 or float64, got {device} {dtype}")
    if backend in ("portable", "reference"):
        return backend
    return "compiled" if compilable else "portable"


def _pad(x_BCHW: Tensor, way: _Way) -> Tensor:
    high, wide = way.padding
    if high == wide == 0:
        return x_BCHW
    sides = (wide, wide, high, high)
    return F.pad(x_BCHW, sides, mode="replicate") if way.value == "replicate" else F.pad(x_BCHW, sides, value=way.value)


def _geometry(size: tuple[int, int], kernel: tuple[int, int], options: _Options) -> Geometry:
    stride, dilation = pair(options.stride, "stride", 1), pair(options.dilation, "dilation", 1)
    output = tuple((size[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    if min(output) < 1:
        raise ValueError(
            f"the window {kernel} with dilation {dilation} does not fit the padded input {size}: "
            "use a smaller kernel or dilation, or more padding"
        )
    return Geometry(kernel, stride, dilation, options.groups, (output[0], output[1]))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_tensors(x: _Spec, w: _Spec, mix: _Spec | None, bias: _Spec | None, options: _Options) -> None:
    shape, weight, groups = tuple(x[0]), tuple(w[0]), options.groups
    if len(shape) != 4 or len(weight) != 4:
        raise ValueError(
            f"the input must be (B, C, H, W) and the weight (F, C / groups, K, L); got {shape} and {weight}"
        )
    filters, channels = weight[:2]
    if groups < 1 or shape[1] != channels * groups or filters % max(groups, 1):
        raise ValueError(
            f"{shape[1]} input channels, {groups} groups and weight {weight} do not fit: "
            "the weight's second size is channels / groups, and groups must divide the filters"
        )
    if 0 in weight:
        raise ValueError(f"nothing to reduce: input {shape}, weight {weight}")
    if mix is not None and options.outer != "sum":
        raise ValueError(f"mix weights the channels of a sum; with outer={options.outer!r} it has no meaning")
    for name, spec, expected in (("mix", mix, (filters, channels)), ("bias", bias, (filters,)), ("weight", w, weight)):
        if spec is None:
            continue
        if tuple(spec[0]) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(spec[0])}")
        if not spec[1].is_floating_point or spec[1:] != x[1:]:
            raise TypeError(
                f"input and {name} must share one floating type and device; "
                f"got {x[1]} on {x[2]} and {spec[1]} on {spec[2]}"
            )
