"""The plain U-Net and the feature pyramid: sizes, wiring, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_modules.nets.counting import count_ops, count_params
from lit_modules.nets.deblur_unet import DeblurFPN, DeblurUNet, double


def test_the_sizes_are_those_of_their_layers() -> None:
    def twice(c: int, f: int) -> int:
        return 9 * c * f + f + 9 * f * f + f

    unet = twice(3, 4) + twice(4, 8) + twice(8, 16) + (9 * 16 * 8 + 8) + twice(16, 8) + (9 * 8 * 4 + 4) + twice(8, 4)
    assert count_params(DeblurUNet(width=4, levels=2)) == unet + 4 * 3 + 3
    fpn = twice(3, 4) + twice(4, 8) + twice(8, 16) + (4 * 5 + 5) + (8 * 10 + 10) + (16 * 10 + 10)  # backbone, laterals
    fpn += (9 * 10 * 10 + 10) + 2 * twice(10, 5) + (9 * 10 * 5 + 5) + (9 * 5 * 5 + 5) + (9 * 5 * 3 + 3)
    assert count_params(DeblurFPN(width=4, levels=3, pyramid=10)) == fpn


def test_the_prices_are_those_of_their_layers() -> None:
    def twice(c: int, f: int, pixels: int) -> int:
        return pixels * 9 * (c * f + f * f)

    full, half, quarter, eighth = (32 * 24 // 4**i for i in range(4))
    unet = twice(3, 4, full) + twice(4, 8, half) + twice(8, 16, quarter) + half * 9 * 16 * 8 + twice(16, 8, half)
    unet += full * 9 * 8 * 4 + twice(8, 4, full) + full * 4 * 3
    assert count_ops(DeblurUNet(width=4, levels=2), (3, 32, 24)).multiplications == unet
    fpn = twice(3, 4, half) + twice(4, 8, quarter) + twice(8, 16, eighth)
    fpn += half * 4 * 5 + quarter * 8 * 10 + eighth * 16 * 10
    fpn += quarter * 9 * 10 * 10 + twice(10, 5, quarter) + twice(10, 5, eighth)
    fpn += quarter * 9 * 10 * 5 + half * 9 * 5 * 5 + full * 9 * 5 * 3
    assert count_ops(DeblurFPN(width=4, levels=3, pyramid=10), (3, 32, 24)).multiplications == fpn


def test_every_level_of_the_unet_is_used() -> None:
    """A skip carries what the smallest level cannot: with the middle cut off, the result still depends on each pixel."""
    torch.manual_seed(0)
    net = DeblurUNet(width=4, levels=2, global_skip=False).double()
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    for cut in (None, net.middle, net.doublings[1]):
        if cut is not None:
            for parameter in cut.parameters():
                nn.init.zeros_(parameter)
        (grad,) = torch.autograd.grad(net(x)[0, 0, 8, 8], x)
        rows = (grad.abs().sum((0, 1, 3)) > 0).sum().item()
        # two convolutions, down and up: 3 + 3 pixels more per level
        assert rows == {None: 16, net.middle: 16, net.doublings[1]: 9}[cut]


def test_every_level_of_the_pyramid_is_used() -> None:
    torch.manual_seed(0)
    net = DeblurFPN(width=4, levels=4, pyramid=8, norm="none").double()
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    before = net(x)
    layer: Any
    for layer in net.lateral:
        kept = layer.bias.detach().clone()
        with torch.no_grad():
            layer.bias += 0.5
            assert not torch.allclose(net(x), before)
            layer.bias.copy_(kept)
    assert torch.equal(net(x), before)


def test_results_of_the_pyramid_are_images() -> None:
    torch.manual_seed(0)
    net = DeblurFPN(width=4, pyramid=8)
    last: Any = net.ending[0]
    with torch.no_grad():
        last.weight.mul_(100)
    y = net(torch.rand(1, 3, 64, 64))
    assert 0 <= y.min() < 0.02 < 0.98 < y.max() <= 1


def test_a_net_that_adds_nothing_is_the_identity() -> None:
    x = torch.rand(1, 3, 32, 32)
    for net in (DeblurUNet(width=4), DeblurFPN(width=4, pyramid=8)):
        last = net.ending if isinstance(net.ending, nn.Conv2d) else net.ending[0]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(net(x), x)


def test_mobilenet_halves_five_times_from_random_weights() -> None:
    torch.manual_seed(0)
    net = DeblurFPN(pyramid=8, backbone="mobilenet_v2")
    assert net.multiple == 32
    sides, y = [], torch.rand(1, 3, 64, 64)
    for stage in net.backbone.eval():
        y = stage(y)
        sides.append(tuple(y.shape[1:]))
    assert sides == [(16, 32, 32), (24, 16, 16), (32, 8, 8), (96, 4, 4), (160, 2, 2)]
    torch.manual_seed(1)
    other = DeblurFPN(pyramid=8, backbone="mobilenet_v2")
    one, two = (next(n.backbone.parameters()) for n in (net, other))
    assert not torch.equal(one, two)


def test_doubling_repeats_pixels() -> None:
    x = torch.rand(1, 2, 3, 4)
    assert torch.equal(double(x, 4), x.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert double(x, 1) is x


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="levels must be an int of at least 1, got 0"):
        DeblurUNet(levels=0)
    with pytest.raises(ValueError, match="a pyramid needs at least 2 levels, got 1"):
        DeblurFPN(levels=1)
    with pytest.raises(ValueError, match="backbone must be one of plain, mobilenet_v2; got 'inception'"):
        DeblurFPN(backbone="inception")
    with pytest.raises(ValueError, match="mobilenet_v2 takes RGB images, got channels 1"):
        DeblurFPN(backbone="mobilenet_v2", channels=1)
    with pytest.raises(ValueError, match="norm must be one of instance, batch, none; got 'layer'"):
        DeblurUNet(norm="layer")
