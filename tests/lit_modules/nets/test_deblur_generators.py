"""What every generator promises: images of any size in, images of that size out, the same in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets.counting import count_ops, count_params
from lit_modules.nets.deblur_layers import CountedConvTranspose2d, Generator, norm2d, upsample2d
from lit_modules.nets.deblur_naf import DeblurNAF
from lit_modules.nets.deblur_resnet import DeblurResNet
from lit_modules.nets.deblur_unet import DeblurFPN, DeblurUNet

Make = Callable[[], Generator]
STEADY: dict[str, Make] = {  # nothing in them depends on training or evaluation
    "resnet": lambda: DeblurResNet(width=4, blocks=2, dropout=0.0),
    "resnet_none": lambda: DeblurResNet(width=4, blocks=1, dropout=0.0, norm="none", global_skip=False),
    "resnet_shuffle": lambda: DeblurResNet(width=4, blocks=1, dropout=0.0, upsample="pixel_shuffle"),
    "resnet_transposed": lambda: DeblurResNet(width=4, blocks=1, dropout=0.0, upsample="transposed"),
    "naf": lambda: DeblurNAF(width=4),
    "naf_no_skip": lambda: DeblurNAF(width=4, encoder=[2], middle=0, decoder=[0], global_skip=False),
    "unet": lambda: DeblurUNet(width=4, levels=2),
    "unet_instance": lambda: DeblurUNet(width=4, norm="instance", upsample="pixel_shuffle", global_skip=False),
    "fpn": lambda: DeblurFPN(width=4, pyramid=8),
    "fpn_none": lambda: DeblurFPN(width=4, levels=2, pyramid=8, norm="none", global_skip=False),
}
BATCH: dict[str, Make] = {
    "resnet_batch": lambda: DeblurResNet(width=4, blocks=1, norm="batch"),
    "unet_batch": lambda: DeblurUNet(width=4, levels=2, norm="batch"),
    "fpn_batch": lambda: DeblurFPN(width=4, pyramid=8, norm="batch"),
    "fpn_mobilenet": lambda: DeblurFPN(pyramid=8, backbone="mobilenet_v2"),
}
ALL = STEADY | BATCH


def _net(name: str) -> Generator:
    """A net whose every branch does something, zero-initialised scales too."""
    torch.manual_seed(0)
    net = ALL[name]()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("name", ALL)
def test_any_size_comes_back_as_it_is(name: str) -> None:
    net = _net(name).eval()
    for H, W in ((1, 1), (7, 12), (33, 20)):
        x = torch.rand(2, 3, H, W)
        y = net(x)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", STEADY)
def test_an_odd_image_is_restored_as_part_of_its_reflection(name: str) -> None:
    net = _net(name)
    x = torch.rand(2, 3, 45, 50)
    whole = F.pad(x, (0, 64 - 50, 0, 64 - 45), mode="reflect")[..., : -(-45 // net.multiple) * net.multiple, :]
    whole = whole[..., : -(-50 // net.multiple) * net.multiple]
    torch.testing.assert_close(net(x), net(whole)[..., :45, :50])


@pytest.mark.parametrize("name", STEADY)
def test_training_and_evaluation_are_the_same_function(name: str) -> None:
    net, x = _net(name), torch.rand(2, 3, 20, 36)
    assert torch.equal(net.train()(x), net.eval()(x))
    torch.testing.assert_close(net(x)[:1], net(x[:1]))  # an image's result depends on no other image
    assert all("running" not in key for key in net.state_dict())


@pytest.mark.parametrize("name", BATCH)
def test_batch_norm_is_two_functions(name: str) -> None:
    net, x = _net(name), torch.rand(2, 3, 64, 64)
    trained = net.train()(x)
    assert not torch.allclose(trained, net.eval()(x))


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_every_parameter(name: str) -> None:
    net, x = _net(name).double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    net.train(name in STEADY)  # in training, batch norm removes every shift that another one has added before it
    net(x).sub(torch.rand_like(x)).square().sum().backward()
    idle = _biases_that_a_norm_removes(net)
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        largest = parameter.grad.abs().max()
        assert (largest < 1e-9) if key in idle else (largest > 1e-9), key


def _biases_that_a_norm_removes(net: nn.Module) -> set[str]:
    """Biases of convolutions that instance norm follows: published, counted, and without any effect."""
    found = set()
    for prefix, module in net.named_modules():
        layers = list(module.named_children()) if isinstance(module, nn.Sequential) else []
        for (name, layer), (_, after) in pairwise(layers):
            if isinstance(after, nn.InstanceNorm2d):
                inner = [layer, *layer.modules()]
                last = [m for m in inner if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)][-1]
                end = next(key for key, m in layer.named_modules() if m is last)
                shuffled = any(isinstance(m, nn.PixelShuffle) for m in inner)  # four biases, of which the mean goes
                found |= set() if shuffled else {".".join(filter(None, (prefix, name, end, "bias")))}
    return found


@pytest.mark.parametrize("name", ALL)
def test_all_have_a_price(name: str) -> None:
    net = _net(name)
    ops, four = count_ops(net, (3, 64, 64)), count_ops(net, (3, 128, 128))
    assert ops.comparisons == 0
    assert 0 < ops.additions <= ops.multiplications + 64 * 64 * count_params(net)
    assert four.multiplications / ops.multiplications == pytest.approx(4, rel=0.01)  # all but what pooled means meet
    assert count_ops(net, (3, 64, 65 - net.multiple)) == ops  # what is computed, not what is asked for
    assert net.training


@pytest.mark.parametrize("name", ALL)
def test_other_channels_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(2, 1, 16, 16\)"):
        _net(name)(torch.rand(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(3, 16, 16\)"):
        _net(name)(torch.rand(3, 16, 16))


@pytest.mark.parametrize("kind", ["resize_conv", "pixel_shuffle", "transposed"])
@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_doubles_and_counts_its_products(kind: str, bias: bool) -> None:
    layer = upsample2d(kind, 6, 4, bias)
    x = torch.rand(2, 6, 5, 7)
    assert layer(x).shape == (2, 4, 10, 14)
    assert any(key.endswith("bias") for key in layer.state_dict()) == bias
    products = {"resize_conv": 140 * 4 * 6 * 9, "pixel_shuffle": 35 * 16 * 6 * 9, "transposed": 35 * 6 * 4 * 9}[kind]
    ops = count_ops(nn.Sequential(layer), (6, 5, 7))
    assert ops.multiplications == products
    assert ops.additions == products - (0 if bias else 140 * 4)


def test_a_transposed_convolution_counts_what_a_scattered_one_does() -> None:
    """Each pixel meets each weight once; of the products that land on one output, all but the first are added."""
    layer = CountedConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, bias=False)
    x = torch.rand(1, 2, 4, 4)
    products = sum(layer.weight[c, f].numel() for c in range(2) for f in range(3)) * 16
    assert layer.scalar_ops(x).multiplications == products
    assert layer.scalar_ops(x).additions == products - layer(x).numel()


def test_a_resized_convolution_leaves_no_grid() -> None:
    """Of a flat image a transposed convolution makes a pattern of period two, resize and convolution a flat image."""
    torch.manual_seed(0)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    flat = torch.ones(1, 4, 8, 8)
    assert upsample2d("resize_conv", 4, 2)(flat)[inner].std((2, 3)).max() < 1e-6
    assert upsample2d("transposed", 4, 2)(flat)[inner].std((2, 3)).min() > 1e-2


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="norm must be one of instance, batch, none; got 'layer'"):
        norm2d("layer", 4)
    with pytest.raises(
        ValueError, match="upsample must be one of resize_conv, pixel_shuffle, transposed; got 'deconv'"
    ):
        upsample2d("deconv", 4, 4)


def test_a_configuration_builds_them() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {
            "_target_": "lit_modules.nets.deblur_naf.DeblurNAF",
            "width": 4,
            "encoder": [1, 2],
            "middle": 1,
            "decoder": [1, 1],
        }
    )
    net = instantiate(config)
    assert count_params(net) == count_params(DeblurNAF(4, (1, 2), 1, (1, 1)))
    x: Tensor = torch.rand(1, 3, 9, 9)
    assert net(x).shape == x.shape
