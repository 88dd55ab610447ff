"""DeblurGAN's generator: two halvings, residual blocks, two doublings, and the image added at the end.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_modules.nets.deblur_layers import Generator, norm2d, restored, upsample2d
from lit_modules.nets.skeletons import check_sizes


class DeblurResNet(Generator):
    """The ResNet generator: clamp(x + net(x)) on [-1, 1], for images in [0, 1].

    Args:
        width: channels of the first layer, doubled by each halving.
        blocks: residual blocks at a quarter of the size.
        norm: "instance" (own statistics in training and evaluation alike), "batch" or "none".
        upsample: see upsample2d. The published "transposed" has as many weights as "resize_conv", the default.
        global_skip: whether the net predicts what to add to the image (published) or the image itself.
        dropout: inside the blocks, in training only.
        channels: of the images.
    Raises:
        ValueError: impossible sizes, an unknown norm or upsample, dropout outside [0, 1).
    Source: DeblurGAN (arXiv 1711.07064), in the form of its public code at the published weights: blocks of two
        convolutions with reflection padding, biases except before batch norm, weights drawn from N(0, 0.02 ** 2). Departures:
        doubling by resize and convolution, which leaves no grid; instance norm without running statistics.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: int = 9,
        norm: str = "instance",
        upsample: str = "resize_conv",
        global_skip: bool = True,
        dropout: float = 0.5,
        channels: int = 3,
    ) -> None:
        super().__init__(
            channels, multiple=4, least=8
        )  # blocks reflect one pixel at a quarter of the size: two are needed
        check_sizes(width=width, blocks=blocks)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.global_skip = global_skip
        bias = norm != "batch"
        stages: list[nn.Module] = [nn.Conv2d(channels, width, 7, padding=3, padding_mode="reflect", bias=bias)]
        for wide in (width, 2 * width):
            stages += [norm2d(norm, wide), nn.ReLU(), nn.Conv2d(wide, 2 * wide, 3, stride=2, padding=1, bias=bias)]
        stages += [norm2d(norm, 4 * width), nn.ReLU()]
        stages += [ResidualBlock(4 * width, norm, dropout) for _ in range(blocks)]
        for wide in (4 * width, 2 * width):
            stages += [upsample2d(upsample, wide, wide // 2, bias), norm2d(norm, wide // 2), nn.ReLU()]
        stages += [nn.Conv2d(width, channels, 7, padding=3, padding_mode="reflect"), nn.Tanh()]
        self.net = nn.Sequential(*stages)
        self.apply(init_normal_)

    def restore(self, x_BCHW: Tensor) -> Tensor:
        """Map images in [0, 1] to images in [0, 1]; H and W multiples of 4, at least 8."""
        return restored(x_BCHW, self.net, self.global_skip)


class ResidualBlock(nn.Module):
    """x + norm(conv(dropout(relu(norm(conv x))))), both 3x3 with reflection."""

    def __init__(self, width: int, norm: str, dropout: float) -> None:
        super().__init__()
        first, second = (
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=norm != "batch") for _ in range(2)
        )
        rest = [nn.Dropout(dropout)] if dropout else []
        self.branch = nn.Sequential(first, norm2d(norm, width), nn.ReLU(), *rest, second, norm2d(norm, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape; H and W at least 2."""
        return x_BCHW + self.branch(x_BCHW)


def init_normal_(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 0.02 ** 2) and a batch norm's from N(1, 0.02 ** 2); biases are 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
