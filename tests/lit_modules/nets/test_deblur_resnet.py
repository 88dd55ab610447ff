"""DeblurGAN's generator: its size, its formula, its switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets.counting import count_ops, count_params
from lit_modules.nets.deblur_resnet import DeblurResNet

SMALL: dict[str, Any] = {"width": 4, "blocks": 2}


def _published(net: DeblurResNet, x_BCHW: Tensor) -> Tensor:
    """The published layers, one by one and in double precision, in evaluation mode."""
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    w = iter([(m.weight.detach().double(), m.bias.detach().double()) for m in layers if m.bias is not None])

    def normed(x: Tensor) -> Tensor:
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()

    def reflected(x: Tensor, by: int) -> Tensor:
        return F.conv2d(F.pad(x, (by, by, by, by), mode="reflect"), *next(w))

    start = x = 2 * x_BCHW.double() - 1
    x = normed(reflected(x, 3)).relu()
    for _ in range(2):
        x = normed(F.conv2d(x, *next(w), stride=2, padding=1)).relu()
    for _ in range(SMALL["blocks"]):
        x = x + normed(reflected(normed(reflected(x, 1)).relu(), 1))
    for _ in range(2):
        x = normed(F.conv_transpose2d(x, *next(w), stride=2, padding=1, output_padding=1)).relu()
    x = reflected(x, 3).tanh()
    assert next(w, None) is None
    return ((start + x).clamp(-1, 1) + 1) / 2


def test_it_is_the_published_formula() -> None:
    torch.manual_seed(0)
    net = DeblurResNet(**SMALL, upsample="transposed").eval()
    x = torch.rand(2, 3, 24, 16)
    torch.testing.assert_close(net(x).double(), _published(net, x), rtol=0, atol=1e-5)
    assert (net(x) - x).abs().max() > 0.05


@pytest.mark.parametrize("upsample", ["transposed", "resize_conv"])
def test_the_published_size(upsample: str) -> None:
    with torch.device("meta"):
        net = DeblurResNet(upsample=upsample)
    by_hand = (3 * 49 * 64 + 64) + (9 * 64 * 128 + 128) + (9 * 128 * 256 + 256) + 9 * 2 * (9 * 256 * 256 + 256)
    by_hand += (9 * 256 * 128 + 128) + (9 * 128 * 64 + 64) + (49 * 64 * 3 + 3)
    assert count_params(net) == by_hand == 11_378_179
    assert count_params(DeblurResNet(width=16, blocks=6)) == 494_083


def test_the_price_is_that_of_its_layers() -> None:
    for upsample, doubled in (("transposed", 1), ("resize_conv", 4)):
        net = DeblurResNet(width=4, blocks=2, upsample=upsample)
        full, half, quarter = 64 * 48, 32 * 24, 16 * 12
        expected = full * 147 * 4 + half * 9 * 4 * 8 + quarter * 9 * 8 * 16 + 2 * 2 * quarter * 9 * 16 * 16
        expected += doubled * (quarter * 9 * 16 * 8 + half * 9 * 8 * 4) + full * 49 * 4 * 3
        ops = count_ops(net, (3, 64, 48))
        assert ops.multiplications == ops.additions == expected  # biases: as many additions as products


def test_weights_are_drawn_as_published() -> None:
    torch.manual_seed(0)
    net = DeblurResNet(width=16, blocks=4, norm="batch")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.weight.mean().abs() < 3e-3
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.02)
    final = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert len(final) == 1  # batch norm has a shift of its own: only the last convolution has a bias
    assert (final[0].bias == 0).all()  # type: ignore[union-attr]


def test_results_are_images_with_and_without_the_skip() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    for skip in (True, False):
        net = DeblurResNet(**SMALL, global_skip=skip, dropout=0.0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(20)
        y = net(x)
        assert 0 <= y.min() < 0.02 < 0.98 < y.max() <= 1
    with torch.no_grad():  # a net that adds nothing: the skip is the identity, and without it all is grey
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(net(x), torch.full_like(x, 0.5))
    net.global_skip = True
    torch.testing.assert_close(net(x), x)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    net = DeblurResNet(**SMALL)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    without = DeblurResNet(**SMALL, dropout=0.0)
    keys = dict(zip(net.state_dict(), without.state_dict(), strict=True))
    without.load_state_dict({keys[key]: tensor for key, tensor in net.state_dict().items()})
    assert torch.equal(without.train()(x), net(x))


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be an int of at least 1, got 0"):
        DeblurResNet(width=0)
    with pytest.raises(ValueError, match="blocks must be an int of at least 1, got 0"):
        DeblurResNet(blocks=0)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        DeblurResNet(**SMALL, dropout=1.0)
    with pytest.raises(ValueError, match="norm must be one of instance, batch, none; got 'group'"):
        DeblurResNet(**SMALL, norm="group")
    with pytest.raises(ValueError, match="upsample must be one of"):
        DeblurResNet(**SMALL, upsample="bilinear")
