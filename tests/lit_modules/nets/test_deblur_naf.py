"""NAFNet: its published sizes, its block's equations, and that a new block does nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets.counting import count_ops, count_params
from lit_modules.nets.deblur_naf import ChannelNorm, DeblurNAF, NAFBlock, SimpleGate, SimplifiedChannelAttention


@pytest.mark.parametrize(("width", "params"), [(32, 17_111_907), (64, 67_888_835)])
def test_the_published_sizes(width: int, params: int) -> None:
    """17.1 and 67.9 million weights."""
    with torch.device("meta"):
        assert count_params(DeblurNAF(width, [1, 1, 1, 28], 1, [1, 1, 1, 1])) == params


def test_the_published_price() -> None:
    """16 GMACs for an image of 256 pixels: 64 times those of 32 pixels, but for the attentions' means."""
    net = DeblurNAF(32, [1, 1, 1, 28], 1, [1, 1, 1, 1])
    assert 64 * count_ops(net, (3, 32, 32)).multiplications == pytest.approx(16e9, rel=0.02)


def test_the_size_for_small_faces() -> None:
    assert count_params(DeblurNAF()) == 438_387


def _reference(block: NAFBlock, x_BCHW: Tensor) -> Tensor:
    """The block's equations with einsum."""
    p = {key: value.detach() for key, value in block.named_parameters()}

    def normed(x: Tensor, key: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-6).sqrt() * p[f"{key}.weight"][:, None, None] + p[f"{key}.bias"][:, None, None]

    def pointwise(x: Tensor, key: str) -> Tensor:
        return torch.einsum("fc,bchw->bfhw", p[f"{key}.weight"][..., 0, 0], x) + p[f"{key}.bias"][:, None, None]

    def gate(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half] * x[:, half:]

    x = pointwise(normed(x_BCHW, "mix.0"), "mix.1")
    x = gate(F.conv2d(x, p["mix.2.weight"], p["mix.2.bias"], padding=1, groups=x.shape[1]))
    x = x * pointwise(x.mean((2, 3), keepdim=True), "mix.4.linear")
    y_BCHW = x_BCHW + p["beta"] * pointwise(x, "mix.5")
    x = gate(pointwise(normed(y_BCHW, "feed.0"), "feed.1"))
    return y_BCHW + p["gamma"] * pointwise(x, "feed.3")


@pytest.mark.parametrize("expansion", [2, 4])
def test_a_block_is_its_equations(expansion: int) -> None:
    torch.manual_seed(0)
    block = NAFBlock(6, expansion).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), _reference(block, x))


def test_a_new_block_does_nothing_and_learns_its_scales_first() -> None:
    torch.manual_seed(0)
    block = NAFBlock(8)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    moved = {key for key, p in block.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"beta", "gamma"}


def test_a_new_net_is_one_linear_map_beside_the_image() -> None:
    torch.manual_seed(0)
    net = DeblurNAF(width=4).double()
    x, y = torch.rand(2, 1, 3, 16, 16, dtype=torch.float64)
    change = [net(z) - z for z in (x, y, x + y, torch.zeros_like(x))]
    torch.testing.assert_close(change[0] + change[1], change[2] + change[3])
    with torch.no_grad():
        net.ending.weight.zero_()
        net.ending.bias.zero_()  # type: ignore[union-attr]
    assert torch.equal(net(x), x)


def test_gates_halve_and_attention_scales_channels() -> None:
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(SimpleGate()(x), x[:, :3] * x[:, 3:])
    attention = SimplifiedChannelAttention(6)
    with torch.no_grad():
        attention.linear.weight.copy_(torch.eye(6)[..., None, None])
        attention.linear.bias.zero_()  # type: ignore[union-attr]
    torch.testing.assert_close(attention(x), x * x.mean((2, 3), keepdim=True))


def test_the_norm_is_over_the_channels_of_each_pixel() -> None:
    x = 5 + 3 * torch.randn(2, 16, 4, 4)
    y = ChannelNorm(16)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 4, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 4, 4), rtol=0, atol=1e-4)
    assert not torch.allclose(ChannelNorm(16)(x[..., :2, :2] + torch.arange(16.0)[:, None, None]), y[..., :2, :2])


def test_the_price_is_that_of_its_layers() -> None:
    C, full, half = 4, 32 * 24, 16 * 12

    def block(c: int, pixels: int) -> int:
        return pixels * (2 * c * c + 9 * 2 * c + c * c) + c * c + pixels * (2 * c * c + c * c)

    expected = full * 27 * C + block(C, full) + half * 4 * C * 2 * C + 2 * block(2 * C, half)
    expected += half * 2 * C * 4 * C + block(C, full) + full * 27 * C
    assert count_ops(DeblurNAF(C, [1], 2, [1]), (3, 32, 24)).multiplications == expected


def test_mixed_precision_gives_finite_images() -> None:
    torch.manual_seed(0)
    net, x = DeblurNAF(width=8), torch.rand(2, 3, 16, 16)
    for block in (m for m in net.modules() if isinstance(m, NAFBlock)):
        nn.init.ones_(block.beta)
        nn.init.ones_(block.gamma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    y.float().square().mean().backward()
    torch.testing.assert_close(y.float(), net(x), rtol=0, atol=0.05)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match=r"equally long lists .*; got \[1, 1\], \[1\] and 1"):
        DeblurNAF(4, [1, 1], 1, [1])
    with pytest.raises(ValueError, match=r"got \[1\], \[1\] and -1"):
        DeblurNAF(4, [1], -1, [1])
    with pytest.raises(ValueError, match="width must be an int of at least 1, got 0"):
        DeblurNAF(0)
    with pytest.raises(ValueError, match="gates halve channels, but expansion 1 times width 3 is odd"):
        NAFBlock(3, 1)
