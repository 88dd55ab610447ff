"""Two more generators: a plain U-Net and a feature pyramid.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets.deblur_layers import Generator, known, norm2d, restored, upsample2d
from lit_modules.nets.skeletons import check_sizes

Backbone = Literal["plain", "mobilenet_v2"]


class DeblurUNet(Generator):
    """A plain U-Net: x + net(x) on images in [0, 1]; the result may leave [0, 1] a little and is not clamped.

    Args:
        width: channels at full size, doubled by each halving.
        levels: halvings.
        norm: see norm2d; after every 3x3 convolution.
        upsample: see upsample2d.
        global_skip: whether the net predicts what to add to the image or the image itself.
        channels: of the images.
    Raises:
        ValueError: impossible sizes, an unknown norm or upsample.
    Source: U-Net (arXiv 1505.04597): two 3x3 convolutions per level, max-pooling, skips by concatenation. Padded rather
        than valid convolutions, the ways to double and the global skip are ours.
    """

    def __init__(
        self,
        width: int = 16,
        levels: int = 3,
        norm: str = "none",
        upsample: str = "resize_conv",
        global_skip: bool = True,
        channels: int = 3,
    ) -> None:
        check_sizes(width=width, levels=levels)
        super().__init__(channels, multiple=2**levels, least=2 ** (levels + 1))  # no norm can do with one pixel
        self.global_skip = global_skip
        widths = [width * 2**level for level in range(levels + 1)]
        inputs = [channels, *widths]
        self.encoder = nn.ModuleList([conv_twice(inputs[i], widths[i], norm) for i in range(levels)])
        self.middle = conv_twice(inputs[levels], widths[levels], norm)
        self.doublings = nn.ModuleList([upsample2d(upsample, 2 * wide, wide) for wide in widths[-2::-1]])
        self.decoder = nn.ModuleList([conv_twice(2 * wide, wide, norm) for wide in widths[-2::-1]])
        self.ending = nn.Conv2d(width, channels, 1)

    def restore(self, x_BCHW: Tensor) -> Tensor:
        """Map images to images; H and W multiples of 2 ** levels."""
        y_BCHW, skips = x_BCHW, []
        for level in self.encoder:
            skips.append(level(y_BCHW))
            y_BCHW = F.max_pool2d(skips[-1], 2)
        y_BCHW = self.middle(y_BCHW)
        for double, level in zip(self.doublings, self.decoder, strict=True):
            y_BCHW = level(torch.cat([skips.pop(), double(y_BCHW)], dim=1))
        y_BCHW = self.ending(y_BCHW)
        return x_BCHW + y_BCHW if self.global_skip else y_BCHW


class DeblurFPN(Generator):
    """A feature pyramid: clamp(x + net(x)) on [-1, 1], for images in [0, 1].

    A backbone gives features at 1/2, 1/4, … of the size. From the smallest up, each level is added to the doubled one below
    it; all from 1/4 on are brought to 1/4 and joined, and doubled twice, with the 1/2 level added in between.

    Args:
        width: channels of the plain backbone's first level, doubled by each of the others.
        levels: levels of the plain backbone.
        pyramid: channels of the pyramid's levels.
        backbone: "plain" (two 3x3 convolutions per level, the first of stride 2) or "mobilenet_v2" (torchvision's, from
            random weights; it has five levels and its own batch norms, and width and levels are not used).
        norm: see norm2d; outside MobileNet.
        global_skip: whether the net predicts what to add to the image (published) or the image itself.
        channels: of the images.
    Raises:
        ValueError: impossible sizes, fewer than two levels, an unknown norm or backbone; MobileNet for images that are
            not RGB.
    Source: DeblurGAN-v2 (arXiv 1908.03826), section 3.1. Departures: small widths, and no pre-trained backbone.
    """

    def __init__(
        self,
        width: int = 16,
        levels: int = 4,
        pyramid: int = 32,
        backbone: str = "plain",
        norm: str = "instance",
        global_skip: bool = True,
        channels: int = 3,
    ) -> None:
        check_sizes(width=width, levels=levels, pyramid=pyramid)
        known("backbone", backbone, Backbone)
        stages, widths = (
            _mobilenet_v2(channels) if backbone == "mobilenet_v2" else _plain(width, levels, norm, channels)
        )
        if len(stages) < 2:
            raise ValueError(f"a pyramid needs at least 2 levels, got {levels}")
        super().__init__(channels, multiple=2 ** len(stages), least=2 ** (len(stages) + 1))
        self.global_skip = global_skip
        head, coarse = max(1, pyramid // 2), range(1, len(stages))
        self.backbone = nn.ModuleList(stages)
        self.lateral = nn.ModuleList([nn.Conv2d(wide, head if i == 0 else pyramid, 1) for i, wide in enumerate(widths)])
        self.smooth = nn.ModuleList([conv(pyramid, pyramid, norm) for _ in coarse[:-1]])
        self.heads = nn.ModuleList([conv_twice(pyramid, head, norm) for _ in coarse])
        self.join, self.refine = conv(head * len(coarse), head, norm), conv(head, head, norm)
        self.ending = nn.Sequential(nn.Conv2d(head, channels, 3, padding=1), nn.Tanh())

    def restore(self, x_BCHW: Tensor) -> Tensor:
        """Map images in [0, 1] to images in [0, 1]; H and W multiples of 2 ** levels."""
        return restored(x_BCHW, self.pyramid, self.global_skip)

    def pyramid(self, y_BCHW: Tensor) -> Tensor:
        """Map images in [-1, 1] to values in (-1, 1) of the same shape."""
        sides = []
        for stage, lateral in zip(self.backbone, self.lateral, strict=True):
            y_BCHW = stage(y_BCHW)
            sides.append(lateral(y_BCHW))
        levels = [sides.pop()]  # smallest first
        for smooth in self.smooth:
            levels.append(smooth(sides.pop() + double(levels[-1])))
        factors = [2**i for i in reversed(range(len(levels)))]
        quarter = [double(head(level), factor) for head, level, factor in zip(self.heads, levels, factors, strict=True)]
        y_BCHW = self.refine(sides.pop() + double(self.join(torch.cat(quarter, dim=1))))
        return self.ending(double(y_BCHW))


def conv(channels: int, out: int, norm: str, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution, norm and ReLU."""
    layer = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=norm != "batch")
    return nn.Sequential(layer, norm2d(norm, out), nn.ReLU())


def conv_twice(channels: int, out: int, norm: str, stride: int = 1) -> nn.Sequential:
    """Return two 3x3 convolutions, each with norm and ReLU, the first with a stride."""
    return nn.Sequential(*conv(channels, out, norm, stride), *conv(out, out, norm))


def double(x_BCHW: Tensor, factor: int = 2) -> Tensor:
    """Repeat each pixel `factor` times in both directions."""
    return x_BCHW if factor == 1 else F.interpolate(x_BCHW, scale_factor=factor, mode="nearest")


def _plain(width: int, levels: int, norm: str, channels: int) -> tuple[list[nn.Module], list[int]]:
    widths = [width * 2**level for level in range(levels)]
    stages: list[nn.Module] = [
        conv_twice(inputs, wide, norm, stride=2) for inputs, wide in zip([channels, *widths], widths, strict=False)
    ]
    return stages, widths


def _mobilenet_v2(channels: int) -> tuple[list[nn.Module], list[int]]:
    """Return MobileNetV2's layers up to those of 160 channels, cut where the size is halved."""
    if channels != 3:
        raise ValueError(f"mobilenet_v2 takes RGB images, got channels {channels}")
    from torchvision.models import mobilenet_v2

    features = mobilenet_v2(weights=None).features
    cuts = [0, 2, 4, 7, 14, 17]
    return [features[a:b] for a, b in pairwise(cuts)], [16, 24, 32, 96, 160]
