"""Layers drop in where torch's stand; the nets are those of the published code."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_modules.nets.cnn import LeNet5, ResNet18, TwoLayerCNN
from lit_modules.nets.counting import count_ops, count_params
from lit_modules.nets.layers import (
    LAYER_KINDS,
    CompoundConv2d,
    MaxPlusLinear,
    MinPlusLinear,
    MinPlusSumConv2d,
    ParallelConv2d,
    TropicalConv2d,
    TropicalLinear,
    init_weight_,
    make_layer,
)
from lit_modules.nets.tcnn import TropicalLeNet5, TropicalResNet18, TwoLayerTropicalCNN
from lit_modules.ops.tropical_reference import conv2d_reference

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = {
    "net1": ("MinP-S", "MaxP-S", 2_150),
    "net2": ("MinP-Max", "MaxP-Min", 2_150),
    "net3": ("MinP-S", "Conv2d", 2_154),
    "net4": ("MinP-Min", "MaxP-Max", 2_150),
    "net5": ("MinP-Min", "Conv2d", 2_154),
    "net6": ("MinP-Max", "Conv2d", 2_154),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_nets_have_the_published_parameters(name: str) -> None:
    first, second, parameters = PUBLISHED[name]
    net = TwoLayerTropicalCNN(first, second)
    assert count_params(net) == parameters
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert TwoLayerTropicalCNN(first, second, in_channels=3, image_size=32)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    tropical = [m for m in net.modules() if isinstance(m, TropicalConv2d)]
    assert all(m.bias is None and m.weight.min() >= 0 and m.weight.max() < 1 for m in tropical)
    assert not [m for m in net.modules() if isinstance(m, nn.ReLU | nn.BatchNorm2d)]


def test_net0_is_a_linear_map_and_relu_is_not() -> None:
    x, y = torch.rand(2, 3, 1, 28, 28, dtype=torch.float64)
    for activation, linear in (("none", True), ("relu", False)):
        net = TwoLayerCNN(activation=activation).double()
        assert count_params(net) == 2_158
        zero = net(torch.zeros_like(x))
        gap = (net(x + y) - zero) - (net(x) - zero) - (net(y) - zero)
        assert (gap.abs().max() < 1e-10) == linear


def test_net1_is_the_composition_of_the_definitions() -> None:
    torch.manual_seed(0)
    net = TwoLayerTropicalCNN().double()
    first, second, _, head = net.body
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    from lit_modules.ops.geometry import Geometry

    hidden = x
    for layer, inner, side in ((first, "min", 14), (second, "max", 7)):
        geometry = Geometry((3, 3), (2, 2), (1, 1), 1, (side, side))
        padded = torch.nn.functional.pad(hidden, (1, 1, 1, 1))
        hidden = conv2d_reference(padded, layer.weight, None, inner, "sum", geometry, "first")
    torch.testing.assert_close(net(x), head(hidden.flatten(1)))


def test_with_one_input_channel_net3_net5_and_net6_are_one_function() -> None:
    """Their first layers differ only in how channels are joined, and MNIST has one."""
    x = torch.rand(4, 1, 28, 28)
    nets = []
    for name in ("net3", "net5", "net6"):
        torch.manual_seed(0)
        nets.append(TwoLayerTropicalCNN(*PUBLISHED[name][:2]))
    assert torch.equal(nets[0](x), nets[1](x))
    assert torch.equal(nets[0](x), nets[2](x))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_layers_drop_in_for_conv2d(kind: str) -> None:
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": True}
    layer, plain = make_layer(kind, 4, 6, 3, **options), nn.Conv2d(4, 6, 3, **options)
    x = torch.rand(2, 4, 11, 9)
    assert layer(x).shape == plain(x).shape
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    again = make_layer(kind, 4, 6, 3, **options)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert "stride=(2, 2)" in repr(layer)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_reset_draws_every_parameter_again(kind: str) -> None:
    torch.manual_seed(5)
    fresh = make_layer(kind, 2, 3, 3, bias=True)
    used = make_layer(kind, 2, 3, 3, bias=True)
    with torch.no_grad():
        for parameter in used.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(5)
    used.reset_parameters()
    for (name, a), b in zip(fresh.named_parameters(), used.parameters(), strict=True):
        assert not (b == 7.0).any(), name
        assert a.shape == b.shape
    torch.manual_seed(5)
    fresh.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))


def test_mixing_weights_give_the_published_formulas() -> None:
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    for kind in ("Compound", "Parallel"):
        layer = make_layer(f"{kind}-2p", 2, 3, 3).double()
        w_max, w_min = layer.kernels()
        single = make_layer("MaxP-S", 2, 3, 3).double()
        with torch.no_grad():
            single.weight.copy_(w_max)
            layer.mix_max.fill_(1.0)
            layer.mix_min.fill_(0.0)
        torch.testing.assert_close(layer(x), single(x))
        constant = make_layer(f"{kind}-const", 2, 3, 3).double()
        for a, b in zip(constant.kernels(), (w_max, w_min), strict=True):
            a.data.copy_(b)
        layer.mix_min.data.fill_(1.0)
        torch.testing.assert_close(layer(x), constant(x))
        one = make_layer(f"{kind}-1p", 2, 3, 3).double()
        for a, b in zip(one.kernels(), (w_max, w_min), strict=True):
            a.data.copy_(b)
        layer.mix_max.data.normal_()
        one.mix_max.data.copy_(layer.mix_max)
        layer.mix_min.data.copy_(1 - layer.mix_max)
        torch.testing.assert_close(layer(x), one(x))


def test_linear_layers_are_the_products_of_the_semirings() -> None:
    x = torch.randn(3, 4, 5)
    low, high = MinPlusLinear(5, 2), MaxPlusLinear(5, 2, bias=True)
    torch.testing.assert_close(low(x), (x[..., None, :] + low.weight).amin(-1))
    high.bias.data.fill_(1.5)
    torch.testing.assert_close(high(x), (x[..., None, :] + high.weight).amax(-1) + 1.5)


def test_initialisation_laws() -> None:
    weight = torch.empty(2000, 4, 3, 3)
    assert 0 <= init_weight_(weight, "uniform01").min() < 0.01 < 0.99 < weight.max() < 1
    bound = 1 / 6
    assert weight is init_weight_(weight, "fan_in")
    assert -bound <= weight.min() < -0.99 * bound
    assert abs(init_weight_(weight, "normal:0.1").std() - 0.1) < 0.002
    assert not init_weight_(weight, "zeros").any()
    with pytest.raises(ValueError, match="normal:S"):
        init_weight_(weight, "normal")


def test_lenet_and_resnet_families_run_on_their_images() -> None:
    for size, channels in ((28, 1), (32, 3)):
        shape = {"in_channels": channels, "image_size": size}
        x = torch.rand(2, channels, size, size)
        for net in (LeNet5(**shape), TropicalLeNet5("Parallel-1p", "Conv2d", **shape)):
            assert net(x).shape == (2, 10)
    assert count_params(LeNet5()) == 61_706
    assert count_ops(LeNet5(), (1, 28, 28)).multiplications == 416_520
    x = torch.rand(2, 3, 32, 32)
    assert count_params(ResNet18()) == 11_181_642
    for block in ("type1", "type2"):
        net = TropicalResNet18("Compound-2p", block, width=8)
        assert net(x).shape == (2, 10)
        assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == 1  # the stem's: blocks have none


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TwoLayerTropicalCNN("MinPS"), "'MinPS'.*'MinP-S'"),
        (lambda: TwoLayerTropicalCNN(width=0), "width.*0"),
        (lambda: TwoLayerCNN(activation="relux"), "relux"),
        (lambda: TwoLayerTropicalCNN(init="uniform"), "uniform01"),
        (lambda: make_layer("MinP-S", 3, 4, 3, groups=2), "groups=2"),
        (lambda: make_layer("MinP-S", 3, 4, 0), "kernel_size"),
        (lambda: TropicalResNet18(block="type3"), "type3"),
        (lambda: MinPlusLinear(0, 3), "in_features"),
        (lambda: LeNet5(image_size=8), "image_size"),
        (lambda: make_layer("Compound-2p", 1, 1, 3, mode="3p"), "'3p'; nearest: '[12]p'"),
        (lambda: TropicalConv2d(1, 1, 3, inner="mim", outer="sum"), "inner 'mim'; nearest: 'min'"),
        (lambda: TropicalConv2d(1, 1, 3, inner="min", outer="mux"), "outer 'mux'; nearest: 'max'"),
        (lambda: MinPlusSumConv2d(1, 1, 3, ties="all"), "ties 'all'; known: first, split"),
        (lambda: MinPlusSumConv2d(1, 1, 3, ties="splt"), "ties 'splt'; nearest: 'split'"),
        (lambda: MinPlusSumConv2d(1, 1, 3, padding_value="neutrl"), "padding_value.*'neutrl'; nearest: 'neutral'"),
        (lambda: MinPlusSumConv2d(1, 1, 3, padding_value=float("nan")), "padding_value.*nan"),
        (lambda: MinPlusSumConv2d(1, 1, 3, padding_value=None), "padding_value.*None"),
        (lambda: MinPlusSumConv2d(1, 1, 3, init="fanin"), "'fanin'; nearest: 'fan_in'"),
        (lambda: MinPlusSumConv2d(1, 1, 3, init=3), "initialisation 3"),
        (lambda: TropicalLinear(2, 3, kind="mni"), "kind 'mni'; nearest: 'min'"),
        (lambda: MinPlusLinear(2, 3, ties="frist"), "ties 'frist'; nearest: 'first'"),
        (lambda: make_layer("Conv2d", 1, 1, 3, strid=2), "'strid'; nearest: 'stride'"),
        (lambda: make_layer("MinP-S", 1, 1, 3, tie="split"), "'tie'; nearest: 'ties'"),
        (lambda: ResNet18(image_size=16), "image_size must be at least 17.*16"),
        (lambda: TropicalResNet18(image_size=0), "image_size.*0"),
    ],
)
def test_impossible_values_are_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("layer", [TropicalConv2d, CompoundConv2d, ParallelConv2d])
def test_layers_name_their_arguments_in_torchs_order(layer: type[nn.Module]) -> None:
    names = [p.name for p in inspect.signature(layer).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == list(inspect.signature(nn.Conv2d).parameters)[: len(names)]
    assert names[-1] == "bias"
    with pytest.raises(TypeError, match="strid"):
        layer(1, 2, 3, strid=2, **({"inner": "min", "outer": "sum"} if layer is TropicalConv2d else {}))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_an_empty_batch_gives_what_torch_gives(kind: str) -> None:
    options = {"stride": 2, "padding": 1, "bias": True}
    layer, plain = make_layer(kind, 2, 6, 3, **options), nn.Conv2d(2, 6, 3, **options)
    x = torch.empty(0, 2, 9, 8, requires_grad=True)
    y = layer(x)
    assert y.shape == plain(x).shape == (0, 6, 5, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("net", [LeNet5, ResNet18, TwoLayerCNN, TropicalLeNet5, TropicalResNet18, TwoLayerTropicalCNN])
def test_public_nets_say_what_they_take_and_refuse(net: type[nn.Module]) -> None:
    text = inspect.getdoc(net) or ""
    assert "Raises:" in text
    for name in inspect.signature(net).parameters:
        assert f"{name}" in text.partition("Args:")[2], name


def test_plain_nets_do_not_load_tropical_code() -> None:
    code = "import sys, lit_modules.nets.cnn; print([m for m in sys.modules if 'tropical' in m or m.endswith('nets.layers')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
