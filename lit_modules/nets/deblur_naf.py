"""NAFNet: a U-Net of blocks without activation functions.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets.deblur_layers import Generator
from lit_modules.nets.skeletons import check_sizes
from lit_modules.ops.counting import OpCount


class DeblurNAF(Generator):
    """NAFNet: x + net(x) on images in [0, 1]; the result may leave [0, 1] a little and is not clamped.

    Args:
        width: channels at full size, doubled by each halving.
        encoder: blocks before each halving.
        middle: blocks at the smallest size.
        decoder: blocks after each doubling, smallest size first; as many entries as the encoder.
        expansion: channels inside a block against those outside, before gates halve them.
        global_skip: whether the net predicts what to add to the image (published) or the image itself.
        channels: of the images.
    The published nets are width 32 or 64, encoder [1, 1, 1, 28], middle 1, decoder [1, 1, 1, 1].
    Raises:
        ValueError: impossible sizes, or encoder and decoder of different lengths.
    Source: NAFNet (arXiv 2204.04676), section 4, written from its equations. The defaults here are for 64-pixel faces on
        a processor.
    """

    def __init__(
        self,
        width: int = 16,
        encoder: Sequence[int] = (1, 1, 2),
        middle: int = 2,
        decoder: Sequence[int] = (1, 1, 1),
        expansion: int = 2,
        global_skip: bool = True,
        channels: int = 3,
    ) -> None:
        super().__init__(channels, multiple=2 ** len(encoder))
        check_sizes(width=width, expansion=expansion)
        if len(encoder) != len(decoder) or min([middle, *encoder, *decoder]) < 0:
            raise ValueError(
                "encoder and decoder must be equally long lists of how many blocks, and middle a number of blocks; got "
                f"{list(encoder)}, {list(decoder)} and {middle}"
            )
        self.global_skip = global_skip
        self.intro = nn.Conv2d(channels, width, 3, padding=1)
        widths = [width * 2**level for level in range(len(encoder) + 1)]
        *outer, inner = widths
        self.encoder = nn.ModuleList([_blocks(*sizes, expansion) for sizes in zip(encoder, outer, strict=True)])
        self.halvings = nn.ModuleList([nn.Conv2d(wide, 2 * wide, 2, stride=2) for wide in outer])
        self.middle = _blocks(middle, inner, expansion)
        outer.reverse()
        self.doublings = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(2 * wide, 4 * wide, 1, bias=False), nn.PixelShuffle(2)) for wide in outer]
        )
        self.decoder = nn.ModuleList([_blocks(*sizes, expansion) for sizes in zip(decoder, outer, strict=True)])
        self.ending = nn.Conv2d(width, channels, 3, padding=1)

    def restore(self, x_BCHW: Tensor) -> Tensor:
        """Map images to images; H and W multiples of 2 ** levels."""
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)  # norms over channels: a quarter less time
        y_BCHW, skips = self.intro(x_BCHW), []
        for blocks, halve in zip(self.encoder, self.halvings, strict=True):
            skips.append(blocks(y_BCHW))
            y_BCHW = halve(skips[-1])
        y_BCHW = self.middle(y_BCHW)
        for double, blocks in zip(self.doublings, self.decoder, strict=True):
            y_BCHW = blocks(double(y_BCHW) + skips.pop())
        y_BCHW = self.ending(y_BCHW)
        return x_BCHW + y_BCHW if self.global_skip else y_BCHW


def _blocks(count: int, width: int, expansion: int) -> nn.Sequential:
    return nn.Sequential(*[NAFBlock(width, expansion) for _ in range(count)])


class NAFBlock(nn.Module):
    """y = x + beta * mix(norm x), and then y + gamma * feed(norm y); beta and gamma start at 0, so the block does nothing.

    mix is 1x1, 3x3 depthwise, gate, channel attention, 1x1; feed is 1x1, gate, 1x1.

    Parameters: beta and gamma (C, 1, 1).
    """

    def __init__(self, width: int, expansion: int = 2) -> None:
        super().__init__()
        wide = expansion * width
        if wide % 2:
            raise ValueError(f"gates halve channels, but expansion {expansion} times width {width} is odd")
        self.mix = nn.Sequential(
            ChannelNorm(width),
            nn.Conv2d(width, wide, 1),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide),
            SimpleGate(),
            SimplifiedChannelAttention(wide // 2),
            nn.Conv2d(wide // 2, width, 1),
        )
        self.feed = nn.Sequential(
            ChannelNorm(width), nn.Conv2d(width, wide, 1), SimpleGate(), nn.Conv2d(wide // 2, width, 1)
        )
        self.beta, self.gamma = (nn.Parameter(torch.zeros(width, 1, 1)) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x_BCHW = torch.addcmul(x_BCHW, self.beta, self.mix(x_BCHW))
        return torch.addcmul(x_BCHW, self.gamma, self.feed(x_BCHW))

    def scalar_ops(self, x_BCHW: Tensor) -> OpCount:
        """Nothing beyond its layers: beta and gamma fold into the convolutions before them."""
        return OpCount()


class SimpleGate(nn.Module):
    """The first half of the channels times the second (eq. 4)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, 2C, H, W) to (B, C, H, W)."""
        first_BCHW, second_BCHW = x_BCHW.chunk(2, dim=1)
        return first_BCHW * second_BCHW


class SimplifiedChannelAttention(nn.Module):
    """x times a linear map of its channels' means (eq. 6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x_BCHW * self.linear(x_BCHW.mean((2, 3), keepdim=True))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        return F.layer_norm(x_BHWC, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)

    def scalar_ops(self, x_BCHW: Tensor) -> OpCount:
        """Nothing, as for every norm: its weights fold into the convolution after it."""
        return OpCount()
