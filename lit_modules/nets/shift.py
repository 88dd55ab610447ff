"""A Min-Max-Plus net on integers: shifts, additions and comparisons, and no multiplication at all.

Values are fixed-point: an integer v stands for v / 2 ** bits. Linear weights must be 0 or a signed power of two.

Legend: B batch, K inputs and M outputs of a layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_modules.nets.cone import ConeNet
from lit_modules.nets.layers import TropicalLinear
from lit_modules.nets.mmp import MMPNet, SignedShifts
from lit_modules.ops.counting import OpCount
from lit_modules.ops.targets import target

CHUNK = 1 << 22  # sums held at once by a tropical layer
TOP = 2**63 - 1  # the largest int64


class ShiftNet(nn.Module):
    """The integer twin of an MMPNet whose linear weights are 0 or signed powers of two.

    A weight below 1 shifts to the right; the numbers carry enough further fractional bits that no such shift drops any. So
    the twin computes exactly what `rounded(net, bits)` computes, as long as float64 holds that exactly.

    Args:
        net: layers L, m, M and S.
        bits: fractional bits of inputs and additive weights, which are rounded to the nearest multiple of 2 ** -bits.
    Attributes:
        out_bits: fractional bits of the outputs, `bits` and those that right shifts need.
        limit: the largest magnitude of an input integer for which no sum can overflow.
    Shape: (B, K) int64 with `bits` fractional bits to (B, M) int64 with `out_bits`; see `to_fixed` and `from_fixed`.
    Raises:
        ValueError: a linear weight that is no signed power of two, another kind of layer, or weights that are not finite or
            do not fit; on a call, an input of another width or too large.
    Source: arXiv 2102.06358, abstract, claims that multiplications may be cut to none; this construction is ours.
    """

    def __init__(self, net: nn.Sequential, bits: int = 20) -> None:
        super().__init__()
        if not 0 <= bits <= 40:
            raise ValueError(f"bits must lie between 0 and 40, got {bits}")
        layers = [layer for layer in net if not isinstance(layer, nn.Flatten)]
        self.guard = sum(_right_shifts(layer) for layer in layers)
        self.bits, self.out_bits = bits, bits + self.guard
        twins = [_twin(layer, bits, self.guard) for layer in layers]
        self.limit = _limit(twins) >> self.guard
        if self.limit < 1:
            raise ValueError(
                f"{bits} fractional bits and {self.guard} for right shifts leave no room for any input in int64"
            )
        self.layers = nn.ModuleList(twins)

    def scalar_ops(self, x_BK: Tensor) -> OpCount:
        """Count what is really executed; a shift counts as an addition, anything that is not known as a multiplication."""
        with ScalarOps() as ops:
            self.forward(x_BK)
        return OpCount(sum(ops.others.values()), ops.additions + ops.shifts, ops.comparisons)

    def forward(self, x_BK: Tensor) -> Tensor:
        """Map fixed-point int64 (B, K) to fixed-point int64 (B, M)."""
        if x_BK.dtype != torch.int64:
            raise TypeError(f"the input must be int64 fixed-point (see to_fixed), got {x_BK.dtype}")
        if x_BK.numel():
            low, high = int(x_BK.amin()), int(x_BK.amax())
            if not -self.limit <= low <= high <= self.limit:
                raise ValueError(
                    f"inputs from {low} to {high} may overflow; this net takes magnitudes up to {self.limit}"
                )
        if self.guard:
            x_BK = x_BK << self.guard
        for layer in self.layers:
            x_BK = layer(x_BK)
        return x_BK


class ShiftLinear(nn.Module):
    """y[m] = sum over k of +- (x[k] << s[m, k]) + b[m], for the k whose weight is not 0."""

    def __init__(self, layer: nn.Linear, bits: int, guard: int) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.rows = _terms(layer)
        bias = layer.bias.detach() if layer.bias is not None else torch.zeros(layer.out_features)
        self.bias = [int(value) << guard for value in to_fixed(bias, bits).tolist()]
        self.gain = max(sum((Fraction(2) ** s for _, s, _ in row), Fraction(0)) for row in self.rows)
        self.offset = max(map(abs, self.bias))

    def forward(self, x_BK: Tensor) -> Tensor:
        _check_width(x_BK, self.in_features)
        columns = []
        for terms, bias in zip(self.rows, self.bias, strict=True):
            total = torch.full_like(x_BK[:, 0], bias)
            for k, exponent, negative in terms:
                term = x_BK[:, k]
                if exponent:
                    term = term << exponent if exponent > 0 else term >> -exponent
                total = total - term if negative else total + term
            columns.append(total)
        return torch.stack(columns, 1)


class IntegerTropical(nn.Module):
    """y[m] = min or max over k of x[k] + w[m, k] on integers; a bias is in w."""

    gain = Fraction(1)

    def __init__(self, layer: TropicalLinear, bits: int, guard: int) -> None:
        super().__init__()
        self.kind, self.in_features = layer.kind, layer.in_features
        w_MK = to_fixed(layer.weight.detach(), bits)
        if layer.bias is not None:
            w_MK = w_MK + to_fixed(layer.bias.detach(), bits)[:, None]
        self.offset = int(w_MK.abs().max()) << guard
        self.register_buffer("w_MK", w_MK << guard)

    def forward(self, x_BK: Tensor) -> Tensor:
        _check_width(x_BK, self.in_features)
        w_MK: Any = self.w_MK
        step = max(1, CHUNK // w_MK.numel())
        parts = [x_BK[low : low + step, None, :] + w_MK for low in range(0, max(1, len(x_BK)), step)]
        return torch.cat([part.amin(2) if self.kind == "min" else part.amax(2) for part in parts])


class IntegerShifts(nn.Module):
    """(x << exponent, -(x << exponent)), the twin of SignedShifts; the negative is a subtraction."""

    offset = 0

    def __init__(self, layer: SignedShifts) -> None:
        super().__init__()
        self.exponent = layer.exponent
        self.gain = Fraction(2) ** layer.exponent

    def forward(self, x_BK: Tensor) -> Tensor:
        shifted_BK = x_BK << self.exponent
        return torch.cat([shifted_BK, torch.full_like(shifted_BK, 0) - shifted_BK], 1)


class ShiftCone(nn.Module):
    """The cone net of a named target, run on integers: no multiplication between its input and its output.

    Args:
        name, seed, per_axis: as `lit_modules.nets.cone.ConeNet`.
        bits: fractional bits of inputs and weights.
    Attributes:
        bound: the cone net's own, and what rounding inputs and weights can add to it.
    Shape: (B, D) to (B, 1), float64.
    """

    def __init__(self, name: str, seed: int, per_axis: int, bits: int = 20) -> None:
        super().__init__()
        cone = ConeNet(name, seed, per_axis)
        self.net = ShiftNet(cone.net, bits)
        self.bound = cone.bound + (target(name, seed).lipschitz + 1) * 2.0 ** -(bits + 1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Map points (B, D) to values (B, 1)."""
        return from_fixed(self.net(to_fixed(x_BD, self.net.bits)), self.net.out_bits)


def rounded(net: MMPNet, bits: int) -> MMPNet:
    """Return a float64 copy whose biases and tropical weights are the nearest multiples of 2 ** -bits.

    Raises:
        ValueError: as `to_fixed`.
    """
    copy = deepcopy(net).double()
    for layer in copy.modules():
        if isinstance(layer, nn.Linear | TropicalLinear):
            for weight in (layer.bias, layer.weight if isinstance(layer, TropicalLinear) else None):
                if weight is not None:
                    weight.data = from_fixed(to_fixed(weight.data, bits), bits)
    return copy


Twin = ShiftLinear | IntegerTropical | IntegerShifts


def _twin(layer: nn.Module, bits: int, guard: int) -> Twin:
    if isinstance(layer, SignedShifts):
        return IntegerShifts(layer)
    if isinstance(layer, nn.Linear):
        return ShiftLinear(layer, bits, guard)
    if isinstance(layer, TropicalLinear):
        return IntegerTropical(layer, bits, guard)
    raise ValueError(f"only shifts, linear and tropical layers have an integer twin, got {type(layer).__name__}")


def _limit(twins: Sequence[Twin]) -> int:
    """The largest X such that inputs of magnitude up to X give no sum above TOP in any layer."""
    gain, offset, limit = Fraction(1), Fraction(0), TOP
    for twin in twins:
        gain, offset = gain * twin.gain, offset * twin.gain + twin.offset
        limit = min(limit, int((TOP - offset) // gain) if gain else TOP if offset <= TOP else 0)
    return max(0, limit)


def _check_width(x_BK: Tensor, width: int) -> None:
    if x_BK.ndim != 2 or x_BK.shape[1] != width:
        raise ValueError(f"this layer takes (B, {width}), got {tuple(x_BK.shape)}")


def _terms(layer: nn.Linear) -> list[list[tuple[int, int, bool]]]:
    """Per output, (input, exponent, negative) of every weight that is not 0."""
    rows = layer.weight.detach().double().tolist()
    return [[(k, *_exponent(w, m, k)) for k, w in enumerate(row) if w != 0] for m, row in enumerate(rows)]


def _right_shifts(layer: nn.Module) -> int:
    exponents = [exponent for row in _terms(layer) for _, exponent, _ in row] if isinstance(layer, nn.Linear) else []
    return max(0, -min(exponents, default=0))


def _exponent(value: float, m: int, k: int) -> tuple[int, bool]:
    mantissa, exponent = math.frexp(abs(value)) if math.isfinite(value) else (0.0, 0)
    if mantissa != 0.5:
        raise ValueError(f"linear weight [{m}, {k}] = {value!r} is no signed power of two, so it is no shift")
    return exponent - 1, value < 0


def to_fixed(x: Tensor, bits: int) -> Tensor:
    """Return the nearest multiples of 2 ** -bits as int64.

    Raises:
        ValueError: a value that is not finite, or that int64 cannot hold with room for sums.
    """
    finite = torch.isfinite(x)
    if not finite.all():
        raise ValueError(f"{x[~finite][0].item()} has no fixed-point value")
    scaled = x.double() * 2.0**bits
    if scaled.numel() and scaled.abs().max() >= 2**56:
        raise ValueError(f"values up to {x.abs().max().item():g} do not fit {bits} fractional bits")
    return scaled.round().to(torch.int64)


def from_fixed(v: Tensor, bits: int) -> Tensor:
    """Return what fixed-point integers stand for, float64; exact below 2 ** 53."""
    return v.double() * 2.0**-bits


class ScalarOps(TorchDispatchMode):
    """Count the scalar operations that torch really performs inside the context, by the operator's name.

    `shifts`, `additions` and `comparisons` are what they say; everything else that computes is in `others`, by name, so no
    operator of torch can hide a multiplication: not an addition with a factor, nor one in place. Views, copies and reading
    a value out compute nothing. What is done outside torch, as by the compiled tropical kernels, is not seen: compare with
    the count that a net must have.
    """

    SHIFTS = ("__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift")
    ADDITIONS = ("add", "sub")
    REDUCTIONS = ("amin", "amax")
    MOVES = (
        *("view", "_unsafe_view", "select", "slice", "unsqueeze", "stack", "cat", "full_like", "full", "fill_"),
        *(
            "expand",
            "detach",
            "clone",
            "empty",
            "lift_fresh",
            "_to_copy",
            "scalar_tensor",
            "alias",
            "_local_scalar_dense",
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.shifts = self.additions = self.comparisons = 0
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in self.SHIFTS:
            self.shifts += out.numel()
        elif name in self.ADDITIONS and kwargs.get("alpha", 1) == 1:
            self.additions += out.numel()
        elif name in self.REDUCTIONS:
            self.comparisons += args[0].numel() - out.numel()
        elif name not in self.MOVES:
            self.others[name] += out.numel() if isinstance(out, Tensor) else 1
        return out
