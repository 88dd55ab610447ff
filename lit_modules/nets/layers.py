"""Drop-in tropical layers with torch's signatures.

    from lit_modules.nets.layers import MinPlusSumConv2d, MaxPlusLinear

    net = nn.Sequential(MinPlusSumConv2d(3, 16, kernel_size=3, stride=2, padding=1), nn.Flatten(), nn.Linear(16 * 16 * 16, 10))

Each takes images (B, C, H, W) as nn.Conv2d does, or rows (..., K) as nn.Linear does. Legend: F filters, C channels per
group, K L kernel, M outputs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn

from lit_modules.ops.geometry import pair
from lit_modules.ops.tropical import Inner, Outer, PaddingValue, Ties, tropical_conv2d, tropical_matmul

Mode = Literal["1p", "2p", "constant"]
Size = int | tuple[int, int]
LAWS = ("uniform01", "fan_in", "normal:S", "zeros")


class Options(TypedDict, total=False):
    """What every tropical convolution takes by keyword: see TropicalConv2d."""

    padding_value: PaddingValue
    ties: Ties
    init: str
    device: torch.device | str | None
    dtype: torch.dtype | None


def _among(known: Iterable[str], value: object) -> str:
    """Say what may stand in the place of `value`, the nearest first."""
    names = list(known)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.3)
    return f"{f'nearest: {near[0]!r}; ' if near else ''}known: {', '.join(names)}"


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; {_among(known, value)}")


def _check_padding_value(value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if not number and value not in ("neutral", "replicate"):
        hint = _among(("neutral", "replicate"), value)
        raise ValueError(f"padding_value must be a number, 'neutral' or 'replicate', got {value!r}; {hint}")


def init_weight_(weight: Tensor, law: str) -> Tensor:
    """Fill a weight in place by a named law and return it.

    Args:
        weight: (F, ...); the fan-in is the product of all sizes but the first.
        law: "uniform01" (U[0, 1), the published code), "fan_in" (U(+-1 / sqrt(fan_in)), the follow-up's code and
            torch's default), "normal:S" (N(0, S ** 2)) or "zeros".
    Raises:
        ValueError: an unknown law or a negative S.
    """
    name, _, scale = str(law).partition(":")
    if name == "uniform01" and not scale:
        return nn.init.uniform_(weight, 0.0, 1.0)
    if name == "fan_in" and not scale:
        bound = 1 / math.sqrt(weight[0].numel())
        return nn.init.uniform_(weight, -bound, bound)
    if name == "zeros" and not scale:
        return nn.init.zeros_(weight)
    if name == "normal" and scale.replace(".", "", 1).isdigit():
        return nn.init.normal_(weight, 0.0, float(scale))
    raise ValueError(f"unknown initialisation {law!r}; {_among(LAWS, law)}, with S such as 0.1")


class _TropicalConv2d(nn.Module):
    """What every tropical convolution shares: geometry, bias, padding value, tie rule and initialisation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        padding_value: PaddingValue = 0.0,
        ties: Ties = "first",
        init: str = "uniform01",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        _check_padding_value(padding_value)
        _check_choice("ties", ties, get_args(Ties))
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self.stride, self.padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
        self.dilation = pair(dilation, "dilation", 1)
        self.padding_value, self.ties, self.init = padding_value, ties, init
        self._factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = nn.Parameter(torch.empty(out_channels, **self._factory)) if bias else None

    def _new_weight(self) -> nn.Parameter:
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return nn.Parameter(torch.empty(*shape, **self._factory))

    def _new_mix(self) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.out_channels, self.in_channels // self.groups, **self._factory))

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels // self.groups * math.prod(self.kernel_size))
            nn.init.uniform_(self.bias, -bound, bound)

    def _conv(self, x_BCHW: Tensor, w_FCKL: Tensor, inner: Inner, outer: Outer, mix_FC: Tensor | None = None) -> Tensor:
        return tropical_conv2d(
            x_BCHW,
            w_FCKL,
            inner=inner,
            outer=outer,
            mix_FC=mix_FC,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_value=self.padding_value,
            ties=self.ties,
        )

    def _add_bias(self, y_BFHW: Tensor) -> Tensor:
        return y_BFHW if self.bias is None else y_BFHW + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_value={self.padding_value!r}, ties={self.ties!r}, init={self.init!r}"
        )


class TropicalConv2d(_TropicalConv2d):
    """One of the six tropical convolutions: x + w reduced over the kernel by `inner`, over channels by `outer`.

    Args:
        inner: "min" or "max"; outer: "sum", "min" or "max"; the rest as nn.Conv2d (no bias by default, as published).
        padding_value: a number, "neutral" or "replicate"; ties: "first" or "split"; init: see `init_weight_`.
    Shape: (B, in_channels, H, W) to (B, out_channels, H', W'), sizes as nn.Conv2d.
    Raises:
        ValueError: impossible sizes, or an unknown choice, with the nearest one.
    Source: the co-author's code of arXiv 2103.02096.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        inner: Inner,
        outer: Outer,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)
        _check_choice("inner", inner, get_args(Inner))
        _check_choice("outer", outer, get_args(Outer))
        self.inner, self.outer = inner, outer
        self.weight = self._new_weight()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again from torch's global generator."""
        init_weight_(self.weight, self.init)
        self._reset_bias()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, F, H', W')."""
        return self._add_bias(self._conv(x_BCHW, self.weight, self.inner, self.outer))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inner={self.inner!r}, outer={self.outer!r}"


MinPlusSumConv2d = partial(TropicalConv2d, inner="min", outer="sum")
MaxPlusSumConv2d = partial(TropicalConv2d, inner="max", outer="sum")
MinPlusMaxConv2d = partial(TropicalConv2d, inner="min", outer="max")
MaxPlusMinConv2d = partial(TropicalConv2d, inner="max", outer="min")
MinPlusMinConv2d = partial(TropicalConv2d, inner="min", outer="min")
MaxPlusMaxConv2d = partial(TropicalConv2d, inner="max", outer="max")


class _MixedConv2d(_TropicalConv2d):
    """A max- and a min-convolution, mixed per (filter, channel) and summed over channels.

    mode "2p": a * max + b * min; "1p": a * max + (1 - a) * min; "constant": max + min. a and b are trainable (F, C), drawn
    from N(0, 1), unconstrained.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        mode: Mode = "2p",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)
        _check_choice("mode", mode, get_args(Mode))
        self.mode = mode
        self.mix_max = self._new_mix() if mode != "constant" else None
        self.mix_min = self._new_mix() if mode == "2p" else None
        self._make_kernels()
        self.reset_parameters()

    def _make_kernels(self) -> None:
        raise TypeError(f"{type(self).__name__} does not say which kernels it has")

    def kernels(self) -> tuple[Tensor, Tensor]:
        """The kernels of the max and of the min part, each (F, C, K, L)."""
        raise TypeError(f"{type(self).__name__} does not say which kernels it has")

    def reset_parameters(self) -> None:
        """Draw all parameters again, mixing weights included."""
        for kernel in {id(k): k for k in self.kernels()}.values():
            init_weight_(kernel, self.init)
        for mix in (self.mix_max, self.mix_min):
            if mix is not None:
                nn.init.normal_(mix)
        self._reset_bias()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, F, H', W')."""
        w_max, w_min = self.kernels()
        mix_min = 1 - self.mix_max if self.mode == "1p" and self.mix_max is not None else self.mix_min
        y_max = self._conv(x_BCHW, w_max, "max", "sum", self.mix_max)
        return self._add_bias(y_max + self._conv(x_BCHW, w_min, "min", "sum", mix_min))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


class CompoundConv2d(_MixedConv2d):
    """Max and min over one kernel, mixed. Arguments as TropicalConv2d, and `mode` "1p", "2p" or "constant".

    Source: OpenTCNN, CompoundMinMaxPlusSumConv2d (arXiv 2504.06881).
    """

    def _make_kernels(self) -> None:
        self.weight = self._new_weight()

    def kernels(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight


class ParallelConv2d(_MixedConv2d):
    """Max over one kernel and min over another, mixed. Arguments as TropicalConv2d, and `mode` "1p", "2p" or "constant".

    Source: OpenTCNN, ParallelMinMaxPlusSumConv2d (arXiv 2504.06881).
    """

    def _make_kernels(self) -> None:
        self.weight_max, self.weight_min = self._new_weight(), self._new_weight()

    def kernels(self) -> tuple[Tensor, Tensor]:
        return self.weight_max, self.weight_min


class TropicalLinear(nn.Module):
    """y[m] = min or max over k of x[k] + w[m, k], a drop-in for nn.Linear.

    Args:
        in_features, out_features: sizes, at least 1.
        kind: "min" or "max".
        bias: off by default: a bias per output is w + c for all k, so it adds nothing.
        ties, init: as TropicalConv2d.
    Shape: (..., in_features) to (..., out_features).
    Raises:
        ValueError: impossible sizes, or an unknown choice, with the nearest one.
    Source: arXiv 2102.06358, abstract.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        kind: Inner,
        ties: Ties = "first",
        init: str = "fan_in",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        _check_choice("kind", kind, get_args(Inner))
        _check_choice("ties", ties, get_args(Ties))
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.ties, self.init = kind, ties, init
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again from torch's global generator."""
        init_weight_(self.weight, self.init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BK: Tensor) -> Tensor:
        """Map (..., K) to (..., M)."""
        y_BM = tropical_matmul(x_BK, self.weight, kind=self.kind, ties=self.ties)
        return y_BM if self.bias is None else y_BM + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.kind!r}, ties={self.ties!r}"


MinPlusLinear = partial(TropicalLinear, kind="min")
MaxPlusLinear = partial(TropicalLinear, kind="max")

LAYER_KINDS: dict[str, Callable[..., nn.Module]] = {
    "MinP-S": MinPlusSumConv2d,
    "MaxP-S": MaxPlusSumConv2d,
    "MinP-Max": MinPlusMaxConv2d,
    "MaxP-Min": MaxPlusMinConv2d,
    "MinP-Min": MinPlusMinConv2d,
    "MaxP-Max": MaxPlusMaxConv2d,
    "Compound-1p": partial(CompoundConv2d, mode="1p"),
    "Compound-2p": partial(CompoundConv2d, mode="2p"),
    "Compound-const": partial(CompoundConv2d, mode="constant"),
    "Parallel-1p": partial(ParallelConv2d, mode="1p"),
    "Parallel-2p": partial(ParallelConv2d, mode="2p"),
    "Parallel-const": partial(ParallelConv2d, mode="constant"),
}

GEOMETRY = ("stride", "padding", "dilation", "groups", "device", "dtype")  # what an ordinary convolution takes too
OPTIONS = (*GEOMETRY, "bias", "inner", "outer", "mode", "padding_value", "ties", "init")


def make_layer(kind: str, *sizes: Any, conv_bias: bool = True, **options: Any) -> nn.Module:
    """Build a layer by the name people use for it.

    Args:
        kind: a key of LAYER_KINDS, or "Conv2d" for an ordinary convolution, which ignores the tropical options.
        sizes, options: as TropicalConv2d; geometry options go to an ordinary convolution too.
        conv_bias: whether an ordinary convolution has a bias (`bias` is for the tropical ones).
    Raises:
        ValueError: an unknown kind or option, with the nearest one.
    """
    _check_choice("layer kind", kind, ("Conv2d", *LAYER_KINDS))
    for name in options:
        _check_choice(f"option of {kind}:", name, OPTIONS)
    if kind == "Conv2d":
        geometry: dict[str, Any] = {name: value for name, value in options.items() if name in GEOMETRY}
        return nn.Conv2d(*sizes, **geometry, bias=conv_bias)  # type: ignore[misc]
    return LAYER_KINDS[kind](*sizes, **options)
