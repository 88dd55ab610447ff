"""Operation counts by formula against an interpreter that counts while it computes each layer's definition."""

from __future__ import annotations

import itertools
from functools import reduce

import pytest
import torch
from torch import nn

from lit_modules.nets.counting import count_ops, count_params, module_ops
from lit_modules.nets.layers import CompoundConv2d, ParallelConv2d, TropicalConv2d, TropicalLinear
from lit_modules.nets.tcnn import TropicalLeNet5, TwoLayerTropicalCNN
from lit_modules.ops.counting import OpCount, tropical_linear_ops


class Counted:
    """A number that counts what is done to it. The first use of a running sum or min costs nothing: it is the start."""

    log: OpCount = OpCount()

    def __init__(self, value: float) -> None:
        self.value = value

    def __add__(self, other: Counted) -> Counted:
        Counted.log += OpCount(additions=1)
        return Counted(self.value + other.value)

    def __sub__(self, other: Counted) -> Counted:
        Counted.log += OpCount(additions=1)
        return Counted(self.value - other.value)

    def __mul__(self, other: Counted) -> Counted:
        Counted.log += OpCount(multiplications=1)
        return Counted(self.value * other.value)

    def lesser(self, other: Counted) -> Counted:
        Counted.log += OpCount(comparisons=1)
        return self if self.value <= other.value else other

    def greater(self, other: Counted) -> Counted:
        Counted.log += OpCount(comparisons=1)
        return self if self.value >= other.value else other


REDUCE = {"sum": Counted.__add__, "min": Counted.lesser, "max": Counted.greater}


def _numbers(tensor: torch.Tensor):
    array = tensor.detach()
    return {index: Counted(float(array[index])) for index in itertools.product(*map(range, array.shape))}


def _windows(module, x: torch.Tensor):
    """For each output (f, p, q): its channels' lists of (input, tap) pairs, as indices."""
    stride, dilation = module.stride, module.dilation
    high, wide = module(x[None]).shape[2:]
    per_group_in, per_group_out = module.in_channels // module.groups, module.out_channels // module.groups
    for f, p, q in itertools.product(range(module.out_channels), range(high), range(wide)):
        base = f // per_group_out * per_group_in
        yield (
            (f, p, q),
            [
                [
                    ((base + c, p * stride[0] + k * dilation[0], q * stride[1] + j * dilation[1]), (f, c, k, j))
                    for k in range(module.kernel_size[0])
                    for j in range(module.kernel_size[1])
                ]
                for c in range(per_group_in)
            ],
        )


def _interpret(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, OpCount]:
    """Compute a layer's output by its definition, counting."""
    Counted.log = OpCount()
    pad = module.padding
    padded = _numbers(torch.nn.functional.pad(x, (pad[1], pad[1], pad[0], pad[0])))
    weights = {name: _numbers(p) for name, p in module.named_parameters()}
    y = torch.zeros_like(module(x[None])[0]).detach()
    for index, channels in _windows(module, x):
        values = [_channel(module, weights, padded, pairs) for pairs in channels]
        total = reduce(REDUCE[getattr(module, "outer", "sum")], values)
        if "bias" in weights:
            total = total + weights["bias"][(index[0],)]
        y[index] = total.value
    return y, Counted.log


def _channel(module: nn.Module, weights, padded, pairs) -> Counted:
    def inner(kind: str, name: str) -> Counted:
        return reduce(REDUCE[kind], [padded[at] + weights[name][tap] for at, tap in pairs])

    f, c = pairs[0][1][:2]
    if isinstance(module, nn.Conv2d):
        return reduce(Counted.__add__, [padded[at] * weights["weight"][tap] for at, tap in pairs])
    if isinstance(module, TropicalConv2d):
        return inner(module.inner, "weight")
    if isinstance(module, CompoundConv2d):  # x + w is shared by the max and the min
        sums = [padded[at] + weights["weight"][tap] for at, tap in pairs]
        top, bottom = reduce(Counted.greater, sums), reduce(Counted.lesser, sums)
    else:
        top, bottom = inner("max", "weight_max"), inner("min", "weight_min")
    if module.mode == "constant":
        return top + bottom
    share = weights["mix_max"][f, c]
    if module.mode == "1p":
        return bottom + share * (top - bottom)
    return share * top + weights["mix_min"][f, c] * bottom


LAYERS = [
    *(
        lambda i=i, o=o, b=b, g=g: TropicalConv2d(2, 4, (2, 3), stride=2, padding=1, groups=g, bias=b, inner=i, outer=o)
        for i, o, b, g in [
            ("min", "sum", False, 1),
            ("max", "sum", True, 2),
            ("min", "max", True, 1),
            ("max", "max", False, 1),
        ]
    ),
    *(
        lambda m=m, b=b: CompoundConv2d(2, 4, (2, 3), padding=1, bias=b, mode=m)
        for m in ("1p", "2p", "constant")
        for b in (False, True)
    ),
    *(lambda m=m: ParallelConv2d(2, 4, (2, 3), dilation=(2, 1), mode=m) for m in ("1p", "2p", "constant")),
    lambda: nn.Conv2d(2, 4, (2, 3), stride=2, padding=1),
    lambda: nn.Conv2d(2, 4, (2, 3), groups=2, bias=False),
]


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: str(make())[:60])
def test_the_formula_counts_what_the_interpreter_does_and_the_layer_computes_it(make) -> None:
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    expected, counted = _interpret(module, x)
    y = module(x[None])
    torch.testing.assert_close(y[0].detach(), expected)
    assert module_ops(module, y) == counted


def test_linear_counts() -> None:
    assert module_ops(nn.Linear(7, 3), torch.zeros(1, 3)) == OpCount(21, 21, 0)
    assert module_ops(nn.Linear(7, 3, bias=False), torch.zeros(1, 3)) == OpCount(21, 18, 0)
    assert tropical_linear_ops(7, 3) == OpCount(0, 21, 18)
    assert module_ops(TropicalLinear(7, 3, kind="min"), torch.zeros(1, 3)) == OpCount(0, 21, 18)


def test_the_published_nets_have_the_known_counts() -> None:
    """Counts of arXiv 2103.02096's nets from their code, and of the follow-up's LeNets (without their biases)."""
    net1 = TwoLayerTropicalCNN()
    assert count_ops(net1, (1, 28, 28)) == OpCount(1_960, 16_660, 12_544)
    assert count_params(net1) == 2_150
    assert count_ops(TwoLayerTropicalCNN("MinP-Max", "MaxP-Min"), (1, 28, 28)) == OpCount(1_960, 16_072, 13_132)
    assert count_ops(TwoLayerTropicalCNN("MinP-S", "Conv2d"), (1, 28, 28)) == OpCount(9_016, 16_072, 6_272)
    bias_additions = 6 * 28 * 28 + 16 * 10 * 10
    tcnn1 = count_ops(TropicalLeNet5(), (1, 28, 28))
    assert tcnn1 == OpCount(58_920, 424_520 + bias_additions, 343_296)
    assert count_ops(TropicalLeNet5(bias=False), (1, 28, 28)).additions == 424_520
    assert count_ops(TropicalLeNet5("Compound-2p", "Compound-2p"), (1, 28, 28)).multiplications == 87_528
    assert count_ops(TropicalLeNet5("Compound-1p", "Compound-1p"), (1, 28, 28)).multiplications == 73_224
    ptcnn2 = count_ops(TropicalLeNet5("Parallel-2p", "Parallel-2p", bias=False), (1, 28, 28))
    assert (ptcnn2.multiplications, ptcnn2.additions) == (87_528, 796_424)


def test_an_unknown_layer_with_weights_is_refused() -> None:
    with pytest.raises(TypeError, match="_Odd"):
        count_ops(nn.Sequential(nn.Flatten(), _Odd()), (1, 4, 4))


class _Odd(nn.Bilinear):
    def __init__(self) -> None:
        super().__init__(16, 16, 2)

    def forward(self, x):  # type: ignore[override]
        return super().forward(x, x)


def test_counting_leaves_the_net_as_it_was() -> None:
    net = TwoLayerTropicalCNN(batch_norm=True).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    count_ops(net, (1, 28, 28))
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
