"""Critics: scores of how real an image looks, one per patch or one per image, and whether they may be penalised.

Legend: B batch, C channels, H height, W width. A critic returns a list of score maps (B, 1, h, w), one per scale, without a
sigmoid; see lit_modules.ops.adversarial for what is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lit_modules.nets.deblur_layers import known
from lit_modules.nets.deblur_resnet import init_normal_
from lit_modules.nets.skeletons import check_sizes

Norm = Literal["instance", "layer", "batch", "none"]


class PatchCritic(nn.Module):
    """PatchGAN: each score sees a square of `receptive_field` pixels.

    Convolutions 4x4 with LeakyReLU 0.2: `layers` of stride 2, whose channels double up to eight times the first, one more of
    stride 1, and one of stride 1 that gives the scores.

    Args:
        width: channels of the first layer.
        layers: those of stride 2; 3 sees 70 pixels, 5 (DeblurGAN-v2's critic of whole images) sees 286.
        norm: "instance", "layer" (over channels and pixels of each image), "batch" or "none"; not after the first layer,
            nor on scores. Only batch norm has weights of its own, and check_penalty refuses it.
        conditional: whether the critic sees the blurred image beside the restored or sharp one. The published one does not,
            although it is called conditional.
        channels: of the images.
    Raises:
        ValueError: impossible sizes, an unknown norm; in forward, a conditional critic that gets no blurred images.
    Source: DeblurGAN (arXiv 1711.07064) and its public code, which pads by 2; PatchGAN is pix2pix's (arXiv 1611.07004).
    """

    def __init__(
        self,
        width: int = 64,
        layers: int = 3,
        norm: str = "instance",
        conditional: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(width=width, layers=layers, channels=channels)
        known("norm", norm, Norm)
        self.conditional, self.layers = conditional, layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        stages: list[nn.Module] = []
        for i, (inputs, wide) in enumerate(zip([channels * (1 + conditional), *widths], widths, strict=False)):
            bias = norm != "batch" or i == 0
            stages.append(nn.Conv2d(inputs, wide, 4, stride=2 if i < layers else 1, padding=2, bias=bias))
            stages += ([_norm(norm, wide)] if i else []) + [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, padding=2))
        self.apply(init_normal_)

    @property
    def receptive_field(self) -> int:
        """Side, in pixels, of what one score sees."""
        return 9 * 2**self.layers - 2

    def forward(self, x_BCHW: Tensor, blurred_BCHW: Tensor | None = None) -> list[Tensor]:
        """Return one score map for images in [0, 1]; blurred ones are used by a conditional critic only."""
        if self.conditional:
            if blurred_BCHW is None:
                raise ValueError("a conditional critic needs the blurred images too: critic(images, blurred)")
            x_BCHW = torch.cat([x_BCHW, blurred_BCHW], dim=1)
        return [self.net(2 * x_BCHW - 1)]


class DoubleScaleCritic(nn.Module):
    """A critic of patches and one of (almost) whole images, each with its own scores; losses take the mean over both.

    Args:
        width, norm, conditional, channels: of both, see PatchCritic.
        patch_layers, image_layers: their layers. The published 3 and 5 are for 256 pixels; 64 pixels need 2 and 3.
    Raises:
        ValueError: as PatchCritic.
    Source: DeblurGAN-v2 (arXiv 1908.03826), section 3.2.
    """

    def __init__(
        self,
        width: int = 64,
        patch_layers: int = 3,
        image_layers: int = 5,
        norm: str = "instance",
        conditional: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            [PatchCritic(width, layers, norm, conditional, channels) for layers in (patch_layers, image_layers)]
        )

    def forward(self, x_BCHW: Tensor, blurred_BCHW: Tensor | None = None) -> list[Tensor]:
        """Return two score maps, of patches and of whole images."""
        return [score for critic in self.critics for score in critic(x_BCHW, blurred_BCHW)]


class ScorePool(nn.Module):
    """The mean score of the last critic steps, as a relativistic loss compares with; kept in checkpoints.

    Args:
        size: steps that are remembered.
        scales: score maps that the critic returns.
    Raises:
        ValueError: a size below 1; in push, another number of maps; in mean, nothing has been pushed.
    Source: DeblurGAN-v2's public code, which remembers the last 50.
    """

    pushed: Tensor
    means_NS: Tensor

    def __init__(self, size: int = 50, scales: int = 1) -> None:
        super().__init__()
        check_sizes(size=size, scales=scales)
        self.register_buffer("means_NS", torch.zeros(size, scales))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    def push(self, scores: Sequence[Tensor]) -> None:
        """Remember the mean of each map and forget the oldest one."""
        if len(scores) != self.means_NS.shape[1]:
            raise ValueError(f"the pool is for {self.means_NS.shape[1]} score maps, got {len(scores)}")
        self.means_NS[self.pushed % len(self.means_NS)] = torch.stack([s.detach().float().mean() for s in scores])
        self.pushed += 1

    def mean(self) -> list[Tensor]:
        """Return the mean of what is remembered, a scalar per map, without gradient."""
        if not self.pushed:
            raise ValueError("the pool is empty: push scores before asking for their mean")
        return list(self.means_NS[: int(self.pushed)].mean(0))


def check_penalty(critic: nn.Module) -> None:
    """Refuse a critic that a gradient penalty cannot be taken of.

    Raises:
        ValueError: it has batch norm, which makes the score of one image depend on the others, while the penalty asks how
            one score changes with one image.
    Source: WGAN-GP (arXiv 1704.00028), section 4, "No critic batch normalization".
    """
    for name, module in critic.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"a critic with a gradient penalty must not have batch norm, but {name} is {type(module).__name__}: "
                "use norm instance, layer or none"
            )


def _norm(kind: str, channels: int) -> nn.Module:
    match kind:
        case "instance":
            return nn.InstanceNorm2d(channels)
        case "layer":
            return nn.GroupNorm(1, channels, affine=False)
        case "batch":
            return nn.BatchNorm2d(channels)
    return nn.Identity()
