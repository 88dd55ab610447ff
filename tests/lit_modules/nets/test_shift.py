"""No multiplication at all: integers, shifts, additions and comparisons, equal to the float64 net bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lit_modules.nets import shift
from lit_modules.nets.cone import ConeNet
from lit_modules.nets.counting import count_ops
from lit_modules.nets.layers import MinPlusLinear
from lit_modules.nets.mmp import MMPNet
from lit_modules.nets.shift import (
    IntegerTropical,
    ScalarOps,
    ShiftCone,
    ShiftLinear,
    ShiftNet,
    from_fixed,
    rounded,
    to_fixed,
)
from lit_modules.ops.counting import tropical_linear_ops


def _powers(spec: str, inputs: int, exponents: tuple[int, int], seed: int = 0) -> MMPNet:
    """A net whose linear weights are 0 or signed powers of two with exponents from `exponents`."""
    torch.manual_seed(seed)
    net = MMPNet(spec, inputs).double()
    for layer in net:
        if isinstance(layer, nn.Linear):
            power = 2.0 ** torch.randint(exponents[0], exponents[1] + 1, layer.weight.shape)
            sign = torch.randint(-1, 2, layer.weight.shape)
            layer.weight.data = (sign * power).double()
    return net


def _inputs(count: int, dims: int, bits: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return to_fixed(2 * torch.rand(count, dims, generator=generator, dtype=torch.float64) - 1, bits)


@pytest.mark.parametrize(("name", "per_axis"), [("sine_1d", 64), ("waves_2d", 9), ("waves_8d", 2)])
def test_the_cone_net_needs_no_multiplication(name: str, per_axis: int) -> None:
    net = ConeNet(name, 2, per_axis).net
    twin = ShiftNet(net, bits=20)
    v = _inputs(300, net.in_features, 20).abs()
    with ScalarOps() as count:
        y = twin(v)
    with torch.no_grad():
        expected = rounded(net, 20)(from_fixed(v, 20))
    assert torch.equal(from_fixed(y, twin.out_bits), expected)
    assert count.others == Counter()
    assert count.shifts > 0


@pytest.mark.parametrize("spec", ["L6 m5 M3", "L6 M5 m5 L4", "L5 m4 M4 L3 m4 M2", "m4 M3", "L4 L3 L2"])
@pytest.mark.parametrize("exponents", [(0, 0), (0, 3), (-3, 2), (-4, -1)])
@pytest.mark.parametrize("bits", [0, 8])
def test_it_equals_the_net_with_rounded_weights_in_every_bit(spec: str, exponents: tuple[int, int], bits: int) -> None:
    net = _powers(spec, 4, exponents)
    twin = ShiftNet(net, bits)
    v = 8 * _inputs(200, 4, bits) + torch.arange(4)
    with torch.no_grad():
        expected = rounded(net, bits)(from_fixed(v, bits))
        assert torch.equal(from_fixed(twin(v), twin.out_bits), expected)
    linear = sum(isinstance(layer, nn.Linear) for layer in net)
    assert 0 <= twin.guard <= linear * max(0, -exponents[0])
    assert (twin.guard > 0) == (linear > 0 and exponents[0] < 0)


def test_without_further_bits_a_right_shift_would_round() -> None:
    layer = nn.Linear(1, 1).double()
    layer.weight.data.fill_(0.25)
    layer.bias.data.zero_()
    v = torch.tensor([[1], [2], [3], [4]])
    assert ShiftLinear(layer, 0, 0)(v).flatten().tolist() == [0, 0, 0, 1]
    twin = ShiftNet(nn.Sequential(layer), bits=0)
    assert from_fixed(twin(v), twin.out_bits).flatten().tolist() == [0.25, 0.5, 0.75, 1.0]


def test_rounding_the_weights_costs_half_a_unit_each() -> None:
    """The unrounded net differs, by at most half a unit from each tropical layer and from the bias."""
    net = _powers("L6 m5 M3", 4, (0, 3))
    v = _inputs(300, 4, 10)
    twin = ShiftNet(net, bits=10)
    with torch.no_grad():
        error = (from_fixed(twin(v), 10) - net(from_fixed(v, 10))).abs().max()
    assert 0 < error <= 3 * 0.5 * 2**-10
    assert torch.equal(rounded(rounded(net, 10), 10)[2].weight, rounded(net, 10)[2].weight)
    assert not torch.equal(rounded(net, 10)[2].weight, net[2].weight)
    assert torch.equal(rounded(net, 10)[1].weight, net[1].weight)


def test_every_operation_is_counted() -> None:
    """As many as the formulas say, so nothing was done out of the counter's sight."""
    net = _powers("L6 m5 M3", 4, (-1, 2))
    twin = ShiftNet(net, bits=12)
    terms, batch = int(torch.count_nonzero(net[1].weight)), 7
    plain = int((net[1].weight.abs() == 1).sum())  # a weight of one is no shift
    v = _inputs(batch, 4, 12)
    with ScalarOps() as count:
        twin(v)
    lower, upper = tropical_linear_ops(6, 5), tropical_linear_ops(5, 3)
    assert twin.guard == 1
    assert count.shifts == batch * (terms - plain) + v.numel()  # and one per input, for the bit that is spare
    assert count.additions == batch * (terms + lower.additions + upper.additions)
    range_check = 2 * (v.numel() - 1)
    assert count.comparisons == batch * (lower.comparisons + upper.comparisons) + range_check
    assert count.others == Counter()


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda: nn.Linear(2, 3)(X), "addmm"),
        (lambda: nn.Linear(2, 3, bias=False)(X), "mm"),
        (lambda: nn.Conv1d(2, 1, 1)(X), "convolution"),
        (lambda: X * 2, "mul"),
        (lambda: X.clone().mul_(2), "mul_"),
        (lambda: X.long() * 3, "mul"),
        (lambda: torch.add(X, X, alpha=3), "add"),
        (lambda: torch.sub(X, X, alpha=-2), "sub"),
        (lambda: X.clone().add_(X, alpha=2), "add_"),
        (lambda: torch.addcmul(X, X, X), "addcmul"),
        (lambda: X.pow(2), "pow"),
        (lambda: X / 3, "div"),
        (lambda: torch.lerp(X, X, 0.3), "lerp"),
        (lambda: X.prod(), "prod"),
        (lambda: ConeNet("sine_1d", 0, 4)(X[:, :1]), "addmm"),
    ],
)
def test_the_counter_flags_what_multiplies(run: Callable[[], Tensor], name: str) -> None:
    with ScalarOps() as count:
        run()
    assert count.others[name] > 0


def test_the_counter_knows_what_does_not() -> None:
    v = torch.arange(12).reshape(3, 4)
    with ScalarOps() as count:
        (v << 2) + v - (v >> 1)
        torch.cat([v.amin(1), v.amax(0), v[:, 1]]).reshape(-1, 1)
    assert (count.shifts, count.additions, count.comparisons) == (24, 24, (12 - 3) + (12 - 4))
    assert count.others == Counter()


def test_inputs_up_to_the_limit_do_not_overflow_and_beyond_it_are_refused() -> None:
    net = _powers("L6 m5 M3", 4, (-2, 20))
    twin = ShiftNet(net, bits=6)
    w = [[[int(x) for x in row] for row in to_fixed(net[at].weight.data, 6).tolist()] for at in (2, 3)]
    bias = to_fixed(net[1].bias.data, 6).tolist()
    signs = [[1 - 2 * (i >> k & 1) for k in range(4)] for i in range(16)]
    v = twin.limit * torch.tensor(signs)
    spare = 1 << twin.guard
    for found, x in zip(twin(v).tolist(), v.tolist(), strict=True):  # in Python's integers, which never overflow
        rows = zip(net[1].weight.tolist(), bias, strict=True)
        f = [sum(int(a * spare) * b for a, b in zip(row, x, strict=True)) + c * spare for row, c in rows]
        g = [min(a + b * spare for a, b in zip(f, row, strict=True)) for row in w[0]]
        assert found == [max(a + b * spare for a, b in zip(g, row, strict=True)) for row in w[1]]
    for bad in (v + v.sign(), -v - v.sign()):
        with pytest.raises(ValueError, match=rf"takes magnitudes up to {twin.limit}"):
            twin(bad)
    assert twin.limit > 2**35  # and the limit is not idle: 63 bits less 20 of the steepest slope and few more


def test_a_bias_of_a_tropical_layer_is_not_lost() -> None:
    layer = MinPlusLinear(3, 2, bias=True, dtype=torch.float64)
    layer.bias.data = torch.tensor([0.5, -2.0], dtype=torch.float64)
    v = _inputs(20, 3, 6)
    expected = rounded(nn.Sequential(layer), 6)(from_fixed(v, 6))
    assert torch.equal(from_fixed(ShiftNet(nn.Sequential(layer), 6)(v), 6), expected)


def test_pieces_of_a_batch_join(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = ShiftNet(_powers("L6 m5 M3", 4, (0, 3)), bits=8)
    v = _inputs(23, 4, 8)
    whole = twin(v)
    monkeypatch.setattr(shift, "CHUNK", 90)
    assert torch.equal(twin(v), whole)
    assert twin(v[:0]).shape == (0, 3)


def test_fixed_point_is_the_nearest_multiple() -> None:
    x = torch.tensor([0.0, 1.0, -0.375, 0.1, 1.5 / 256, 2.5 / 256])
    assert to_fixed(x, 8).tolist() == [0, 256, -96, 26, 2, 2]  # halves go to the even neighbour
    v = torch.randint(-(2**50), 2**50, (100,))
    assert torch.equal(to_fixed(from_fixed(v, 20), 20), v)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ShiftNet(MMPNet("L2", 3)), ValueError, r"linear weight \[0, 0\] = .* is no signed power of two"),
        (lambda: ShiftNet(_filled("L2", 0.75)), ValueError, r"\[0, 0\] = 0.75"),
        (lambda: ShiftNet(_filled("L2", float("inf"))), ValueError, "= inf"),
        (lambda: ShiftNet(_filled("L2", float("nan"))), ValueError, "= nan"),
        (lambda: ShiftNet(_filled("m2", float("inf"))), ValueError, "inf has no fixed-point value"),
        (lambda: ShiftNet(_filled("m2", 1e30)), ValueError, "up to 1e[+]30 do not fit 20 fractional bits"),
        (lambda: ShiftNet(_filled("L2", 2.0**80)), ValueError, "leave no room"),
        (lambda: ShiftNet(_filled("L2", 2.0**-80)), ValueError, "80 for right shifts leave no room"),
        (lambda: ShiftNet(_filled("m2 M2", 2.0**35), bits=30), ValueError, "do not fit 30"),
        (lambda: ShiftNet(_filled("L2 R", 1.0)), ValueError, "got ReLU"),
        (lambda: ShiftNet(_filled("m2", 0.0), bits=41), ValueError, "between 0 and 40, got 41"),
        (lambda: ShiftNet(_filled("m2", 0.0))(torch.zeros(2, 3)), TypeError, "int64.*float32"),
        (lambda: ShiftNet(_filled("m2", 0.0))(torch.zeros(2, 4).long()), ValueError, r"\(B, 3\), got \(2, 4\)"),
        (lambda: ShiftNet(_filled("L2", 1.0))(torch.zeros(2, 4).long()), ValueError, r"\(B, 3\), got \(2, 4\)"),
        (lambda: to_fixed(torch.tensor([1.0, float("nan")]), 8), ValueError, "nan has no fixed-point"),
    ],
)
def test_what_has_no_integer_twin_is_named(call, error, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def _filled(spec: str, value: float) -> MMPNet:
    net = MMPNet(spec, 3).double()
    for name, parameter in net.named_parameters():
        parameter.data.fill_(value if name.endswith("weight") else 0.0)
    return net


def test_integers_stay_integers() -> None:
    twin = ShiftNet(_powers("L6 m5 M3", 4, (0, 3)), bits=8)
    assert twin(_inputs(5, 4, 8)).dtype == torch.int64
    assert [type(layer) for layer in twin.layers] == [ShiftLinear, IntegerTropical, IntegerTropical]
    assert not list(twin.parameters())


def test_the_integer_cone_is_the_cone_and_counts_no_multiplication() -> None:
    cone, shift = ConeNet("waves_2d", 3, 5), ShiftCone("waves_2d", 3, 5, bits=24)
    x_BD = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (cone(x_BD) - shift(x_BD)).abs().max() <= (8 + 1) * 2.0**-25
    assert cone.bound < shift.bound < cone.bound + 1e-6
    counted, formula = count_ops(shift, (2,)), count_ops(cone, (2,))
    assert counted.multiplications == 0
    assert formula.multiplications == 2 * 4
    assert counted.comparisons == formula.comparisons + 2 * (2 - 1)  # the check that nothing can overflow
    assert counted.additions > 0


def test_shifts_have_an_integer_twin() -> None:
    net = rounded(MMPNet("S3 m4 M2", 3, init="normal:1.0"), 10)
    twin = ShiftNet(net, 10)
    x_BK = (torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 2**10).round().double() / 2**10
    assert torch.equal(from_fixed(twin(to_fixed(x_BK, 10)), twin.out_bits), net(x_BK))
    assert twin.scalar_ops(to_fixed(x_BK[:1], 10)).multiplications == 0
