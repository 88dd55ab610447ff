"""Min-Max-Plus nets: the string they are written as, what they compute, and what no net of a type can do."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from lit_modules.nets.counting import count_ops, count_params
from lit_modules.nets.layers import TropicalConv2d, TropicalLinear
from lit_modules.nets.mmp import TYPES, ConvMMPNet, MMPNet, SpecError, parse, type_spec
from lit_modules.ops.tropical_reference import conv2d_reference


def _by_hand(net: MMPNet, x: Tensor) -> Tensor:
    """The layers as the definitions, sums written out by broadcasting."""
    x = x.flatten(1)
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = (layer.weight * x[:, None, :]).sum(-1) + layer.bias
        elif isinstance(layer, TropicalLinear):
            sums = x[:, None, :] + layer.weight
            x = sums.amin(-1) if layer.kind == "min" else sums.amax(-1)
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
    return x


def _net(spec: str, inputs: int, seed: int = 0, **options: str) -> MMPNet:
    torch.manual_seed(seed)
    return MMPNet(spec, inputs, **options).double()


def test_a_string_is_read_token_by_token() -> None:
    assert [tuple(t) for t in parse("L64 m32 M7 R L10")] == [("L", 64), ("m", 32), ("M", 7), ("R", 0), ("L", 10)]
    assert " ".join(map(str, parse("  L64\tm32 \n R  L1 "))) == "L64 m32 R L1"


WRONG = {
    "": "an empty net",
    "   ": "an empty net",
    "m0": r"token 1, 'm0'.*min-plus needs a width of at least 1, such as m64.*got '0'",
    "M": r"token 1, 'M'.*max-plus needs a width.*got ''",
    "L-3": r"token 1, 'L-3'.*linear needs a width of at least 1.*got '-3'",
    "L6.4": r"token 1, 'L6\.4'.*linear needs a width.*got '6\.4'",
    "L+6": r"token 1.*got '\+6'",
    "L007": r"token 1.*got '007'",
    "L1e3": r"token 1.*got '1e3'",
    "L²": r"token 1.*got '²'",
    "L٣": r"token 1.*got '٣'",
    "Lm64": r"token 1, 'Lm64'.*got 'm64'",
    "L64m64": r"token 1.*then a space; got '64m64'",
    "L64,m64": r"token 1, 'L64,m64'.*then a space; got '64,m64'",
    "L64, m64": r"token 1, 'L64,'.*got '64,'",
    "L 64": r"token 1, 'L'.*linear needs a width",
    "x64": r"token 1, 'x64'.*no layer starts with 'x'; known: L linear, m min-plus, M max-plus, R ReLU",
    "64": r"token 1, '64'.*no layer starts with '6'",
    "l64": r"token 1, 'l64'.*'l' \(nearest: 'L64'\)",
    "L64 r L10": r"token 2, 'r'.*nearest: 'R'",
    "L64 R5": r"token 2, 'R5'.*ReLU and has no width; got '5'",
    "R L10": r"token 1, 'R'.*a ReLU stands behind a layer",
    "L64 R R": r"token 3, 'R'.*behind a layer that has a width",
    "L64 x64 m0": r"token 2, 'x64', of 'L64 x64 m0'",
    "L64 m64 M64 L": r"token 4, 'L'",
    "L64 -> m64": r"token 2, '->'",
}


@pytest.mark.parametrize("spec", WRONG)
def test_the_first_wrong_token_is_named(spec: str) -> None:
    for read in (parse, lambda spec: MMPNet(spec, 5)):
        with pytest.raises(SpecError, match=WRONG[spec]):
            read(spec)


@pytest.mark.parametrize("spec", [None, 64, ["L64", "m64"]])
def test_what_is_no_string_is_no_net(spec: object) -> None:
    with pytest.raises(SpecError, match="a net is a string"):
        parse(spec)


ORDERS = {
    "general": ("L5 m5 M2", "L5 m5 M5 L5 m5 M2"),
    "type1": ("L5 M2", "L5 M5 L5 M2"),
    "type2": ("L5 m5 M2", "L5 m5 M5 m5 M2"),
    "type3": ("L5 m5 M5 L2", "L5 m5 M5 m5 M5 L2"),
    "type4": ("L5 M5 m2", "L5 M5 m5 M5 m2"),
    "type5": ("L5 M5 m5 L2", "L5 M5 m5 M5 m5 L2"),
    "pure": ("m5 M2", "m5 M5 m5 M2"),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_have_their_order_of_layers(name: str) -> None:
    assert tuple(type_spec(name, outputs=2, width=5, pairs=pairs) for pairs in (1, 2)) == ORDERS[name]
    assert type_spec(name, outputs=10).count("64") == len(ORDERS[name][0].split()) - 1


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("width", [1, 6])
def test_a_net_is_the_composition_of_the_definitions(name: str, pairs: int, width: int) -> None:
    net = _net(type_spec(name, 3, width, pairs), 12)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    assert (net.in_features, net.out_features) == (12, 3)
    torch.testing.assert_close(net(x), _by_hand(net, x), rtol=1e-12, atol=1e-12)
    tropical = sum(isinstance(layer, TropicalLinear) for layer in net)
    assert tropical == (pairs if name == "type1" else 2 * pairs)


def test_a_relu_net_is_torchs_own() -> None:
    net = _net("L7 R L3", 4)
    plain = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
    x = torch.randn(6, 4, dtype=torch.float64)
    assert torch.equal(net(x), plain(x))
    assert (plain(x) != plain[2](plain[0](x))).any()


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_pure_net_is_monotone_and_moves_with_its_input_so_no_slope_exceeds_one(pairs: int) -> None:
    """f(x + t) = f(x) + t and monotone in each input give a Lipschitz constant of 1 in the sup norm."""
    net = _net(type_spec("pure", 2, 8, pairs), 6)
    a, b = torch.randn(2, 300, 6, dtype=torch.float64)
    torch.testing.assert_close(net(a + 2.5), net(a) + 2.5)
    assert (net(torch.maximum(a, b)) >= net(a)).all()
    far = (a - b).abs().amax(1, keepdim=True)
    assert ((net(a) - net(b)).abs() <= far + 1e-12).all()


def test_one_linear_layer_in_front_lifts_that_bound() -> None:
    net = _net(type_spec("type2", 1, 8), 2)
    with torch.no_grad():
        net[1].weight.mul_(10)
    a, b = torch.randn(2, 300, 2, dtype=torch.float64)
    assert ((net(a) - net(b)).abs() / (a - b).abs().amax(1, keepdim=True)).max() > 3


@pytest.mark.parametrize("kind", ["m", "M"])
def test_two_layers_of_a_kind_are_one(kind: str) -> None:
    """Their weights' own product in the semiring."""
    net, one = _net(f"{kind}5 {kind}3", 4), _net(f"{kind}3", 4)
    inner, outer = net[1].weight, net[2].weight
    sums = outer[:, :, None] + inner[None]
    with torch.no_grad():
        one[1].weight.copy_(sums.amin(1) if kind == "m" else sums.amax(1))
    x = torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), one(x))


def test_min_after_max_is_not_one_layer() -> None:
    """A single layer is concave (min) or convex (max) along any line; the pair is neither."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None] * torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)

    def bends(spec: str) -> tuple[bool, bool]:
        y = _net(spec, 3, seed=2)(x)[:, 0]
        second = y[2:] - 2 * y[1:-1] + y[:-2]
        return bool((second < -1e-9).any()), bool((second > 1e-9).any())

    assert bends("m1") == (True, False)
    assert bends("M1") == (False, True)
    assert bends("m6 M1") == (True, True)


def test_it_drops_in_as_a_module() -> None:
    net = _net("L6 m5 M4 L3", 8)
    x = torch.randn(4, 2, 4, dtype=torch.float64)
    whole = nn.Sequential(nn.Conv1d(2, 2, 1).double(), net)
    whole(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in whole.parameters())
    again = MMPNet("L6 m5 M4 L3", 8).double()
    again.load_state_dict(net.state_dict())
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (again, copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), net(x))
    assert torch.equal(net[3:](net[:3](x)), net(x))
    assert type(net[:3]) is nn.Sequential
    assert net(x[:0]).shape == (0, 3)
    assert count_params(net) == (8 * 6 + 6) + 6 * 5 + 5 * 4 + (4 * 3 + 3)
    assert "'L6 m5 M4 L3'" in repr(net)


def test_only_linear_layers_multiply() -> None:
    pure, mixed = (count_ops(_net(spec, 12), (12,)) for spec in ("m9 M7 m2", "L9 m7 M5 L2"))
    assert pure.multiplications == 0
    assert (pure.additions, pure.comparisons) == (9 * 12 + 7 * 9 + 2 * 7, 9 * 11 + 7 * 8 + 2 * 6)
    assert mixed.multiplications == 12 * 9 + 5 * 2


LAWS = {"zeros": (0.0, 0.0), "normal:0.5": (0.0, 0.5), "uniform01": (0.5, 12**-0.5), "fan_in": (0.0, 3**-0.5 / 8)}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("which", ["init", "linear_init"])
def test_the_law_of_initial_weights_is_an_axis(law: str, which: str) -> None:
    torch.manual_seed(0)
    net = MMPNet("L64 m200 M64 L200", 64, **{which: law})
    mean, spread = LAWS[law]
    for layer in (net[1], net[4]) if which == "linear_init" else (net[2],):
        assert layer.weight.mean().item() == pytest.approx(mean, abs=0.02)
        assert layer.weight.std().item() == pytest.approx(spread, rel=0.05, abs=1e-9)
    other = net[2] if which == "linear_init" else net[1]
    assert 0 < other.weight.std() < 1.1  # the other kind of layer keeps its own law


def test_checking_a_law_draws_no_number() -> None:
    torch.manual_seed(0)
    net = MMPNet("L5", 7, init="normal:2.0")
    torch.manual_seed(0)
    plain = nn.Linear(7, 5)
    assert torch.equal(net[1].weight, plain.weight)
    assert torch.equal(net[1].bias, plain.bias)


def test_the_tie_rule_reaches_every_layer() -> None:
    for ties, winners in (("first", 1), ("split", 4)):
        net = _net("m3 M2", 4, init="zeros", ties=ties)
        x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        net(x).sum().backward()
        assert (x.grad != 0).sum() == winners
        assert (net[2].weight.grad != 0).sum() == 2 * (1 if ties == "first" else 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: type_spec("type6", 10), r"unknown type 'type6', nearest: 'type\d'; known: general"),
        (lambda: type_spec("type2", 0), "outputs must be at least 1, got 0"),
        (lambda: type_spec("type2", 10, width=-1), "width must be at least 1, got -1"),
        (lambda: type_spec("type2", 10, pairs=0), "pairs must be at least 1, got 0"),
        (lambda: MMPNet("L4", 0), "in_features must be an int of at least 1, got 0"),
        (lambda: MMPNet("m4", 2.5), "in_features.*2.5"),
        (lambda: MMPNet("L4", 3, init="gauss"), "unknown initialisation 'gauss'"),
        (lambda: MMPNet("m4", 3, linear_init="xavier"), "unknown initialisation 'xavier'"),
        (lambda: MMPNet("m4", 3, ties="all"), "ties must be 'first' or 'split', got 'all'"),
        (lambda: MMPNet("m4", 3)(torch.zeros(2, 4)), r"of 3 values per sample, got \(2, 4\)"),
        (lambda: MMPNet("m4", 3)(torch.zeros(3)), r"of 3 values per sample, got \(3,\)"),
        (lambda: ConvMMPNet([], "L2", 1, 8), r"at least one convolution.*got \[\]"),
        (lambda: ConvMMPNet("MinP-Min", "L2", 1, 8), "got 'MinP-Min'"),
        (lambda: ConvMMPNet(["MinP-Min"], "l2", 1, 8), "token 1, 'l2'"),
        (lambda: ConvMMPNet(["MinP"], "L2", 1, 8), "'MinP'"),
        (lambda: ConvMMPNet(["MinP-Min"], "L2", 1, 8, stride=[1, 2]), r"a stride for each.*\[1, 2\]"),
        (lambda: ConvMMPNet(["MinP-Min"], "L2", 1, 8, stride=0), "stride 1 must be at least 1, got 0"),
        (lambda: ConvMMPNet(["Conv2d"], "L2", 0, 8), "in_channels must be at least 1, got 0"),
        (lambda: ConvMMPNet(["Conv2d"], "L2", 1, 8)(torch.zeros(2, 1, 9, 9)), "128 values per sample"),
    ],
)
def test_impossible_values_are_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_convolutional_stack_is_the_composition_of_the_definitions() -> None:
    from lit_modules.ops.geometry import Geometry

    torch.manual_seed(0)
    net = ConvMMPNet(["Conv2d", "MinP-Min", "MaxP-Max"], "m6 L3", 2, 9, width=4, stride=[1, 2, 2]).double()
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    hidden = net.body[0](x)
    for layer, kind, side in ((net.body[1], "min", 5), (net.body[2], "max", 3)):
        assert isinstance(layer, TropicalConv2d)
        padded = nn.functional.pad(hidden, (1, 1, 1, 1), value={"min": math.inf, "max": -math.inf}[kind])
        geometry = Geometry((3, 3), (2, 2), (1, 1), 1, (side, side))
        hidden = conv2d_reference(padded, layer.weight, None, kind, kind, geometry, "first")
    assert hidden.shape == (3, 4, 3, 3)
    torch.testing.assert_close(net(x), _by_hand(net.head, hidden))
    net(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_head_fits_whatever_the_window(kernel: int, stride: int) -> None:
    net = ConvMMPNet(["MinP-Min", "MaxP-Max"], "L2", 1, 10, width=2, kernel_size=kernel, stride=stride)
    assert net(torch.rand(3, 1, 10, 10)).shape == (3, 2)


def test_a_stack_without_products_moves_with_its_input_and_has_no_multiplication() -> None:
    torch.manual_seed(0)
    net = ConvMMPNet(["MinP-Min", "MaxP-Max"], "m5 M3", 2, 8, width=4).double()
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net(x + 1.5), net(x) + 1.5)  # neutral padding: with zeros it would not
    assert count_ops(net, (2, 8, 8)).multiplications == 0
    zero = ConvMMPNet(["MinP-Min", "MaxP-Max"], "m5 M3", 2, 8, width=4, padding_value=0.0).double()
    zero.load_state_dict(net.state_dict())
    assert (zero(x + 1.5) - zero(x) - 1.5).abs().max() > 0.1


def test_shifts_double_the_inputs_exactly_and_cost_nothing() -> None:
    net = MMPNet("S4 m3 M2", (1, 2, 2))
    x = torch.randn(5, 1, 2, 2)
    assert torch.equal(net[1](x.flatten(1)), torch.cat([16 * x.flatten(1), -16 * x.flatten(1)], 1))
    assert net(x).shape == (5, 2)
    assert net.spec == "S4 m3 M2"
    assert parse(net.spec) == parse("S4 m3 M2")
    ops = count_ops(net, (1, 2, 2))
    assert (ops.multiplications, ops.additions, ops.comparisons) == (0, 8 * 3 + 3 * 2, 7 * 3 + 2 * 2)
    for wrong in ("S", "S21", "S-1", "Sx"):
        with pytest.raises(SpecError, match=f"token 1, '{wrong}'"):
            parse(f"{wrong} m3")


def test_a_convolutional_stack_may_have_relus() -> None:
    net = ConvMMPNet(["Conv2d", "R", "Conv2d", "R"], "L2", 1, 8, stride=[2, 1])
    assert [type(m).__name__ for m in net.body] == ["Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert net(torch.rand(3, 1, 8, 8)).shape == (3, 2)
    with pytest.raises(ValueError, match="start with a convolution"):
        ConvMMPNet(["R", "Conv2d"], "L2", 1, 8)
