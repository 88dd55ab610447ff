"""What the deblurring generators share: images in and out, normalisation, ways to double the size.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor, nn

from lit_modules.nets.skeletons import check_sizes
from lit_modules.ops.counting import OpCount
from lit_modules.ops.reflection import cut_back, reflect_to_multiple

Norm = Literal["instance", "batch", "none"]
Upsample = Literal["resize_conv", "pixel_shuffle", "transposed"]


class Generator(nn.Module):
    """Maps blurred images (B, C, H, W) in [0, 1] to restored ones of the same shape, for any H and W.

    Images are extended by reflection to what `restore` can halve, and cut back afterwards. Subclasses give `restore`.

    Args:
        channels: C.
        multiple: what H and W must be divisible by inside the net.
        least: the fewest rows and columns that the net can take.
    Raises:
        ValueError: a size below 1; in forward, anything but (B, C, H, W).
    """

    def __init__(self, channels: int, multiple: int, least: int = 1) -> None:
        super().__init__()
        check_sizes(channels=channels)
        self.channels, self.multiple, self.least = channels, multiple, least

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map blurred images to restored ones."""
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels:
            raise ValueError(f"images must be (B, {self.channels}, H, W), got {tuple(x_BCHW.shape)}")
        H, W = x_BCHW.shape[-2:]
        return cut_back(self.restore(reflect_to_multiple(x_BCHW, self.multiple, self.least)), H, W)

    def restore(self, x_BCHW: Tensor) -> Tensor:
        """Map images of whole multiples to restored ones."""
        raise NotImplementedError


def restored(x_BCHW: Tensor, net: Callable[[Tensor], Tensor], global_skip: bool) -> Tensor:
    """Return what a net on [-1, 1] makes of images in [0, 1], in [0, 1] again: clamp(x + net(x)), or net(x) by itself."""
    signed_BCHW = 2 * x_BCHW - 1
    y_BCHW = net(signed_BCHW)
    if global_skip:
        y_BCHW = (signed_BCHW + y_BCHW).clamp(-1, 1)
    return (y_BCHW + 1) / 2


def known(name: str, value: str, kinds: object) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal `kinds`."""
    if value not in get_args(kinds):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}; got {value!r}")


def norm2d(kind: str, channels: int) -> nn.Module:
    """Return the normalisation of C channels; nn.Identity for "none".

    Instance norm has no weights and keeps no running statistics: with them, evaluation would silently use averages over
    images in the place of the image's own, and train, eval and exported nets would differ.

    Raises:
        ValueError: an unknown kind.
    """
    known("norm", kind, Norm)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


def upsample2d(kind: str, channels: int, out: int, bias: bool = True) -> nn.Module:
    """Return a layer that maps (B, C, H, W) to (B, out, 2H, 2W).

    "resize_conv" repeats each pixel and convolves 3x3, "pixel_shuffle" convolves 3x3 to four times the channels and spreads
    them, "transposed" is DeblurGAN's transposed 3x3 convolution, which leaves a visible grid.

    Raises:
        ValueError: an unknown kind.
    Source: resize and convolve, Odena et al. 2016, "Deconvolution and checkerboard artifacts"; pixel shuffle,
        arXiv 1609.05158.
    """
    known("upsample", kind, Upsample)
    if kind == "transposed":
        return CountedConvTranspose2d(channels, out, 3, stride=2, padding=1, output_padding=1, bias=bias)
    conv = nn.Conv2d(channels, 4 * out if kind == "pixel_shuffle" else out, 3, padding=1, bias=bias)
    if kind == "pixel_shuffle":
        return nn.Sequential(conv, nn.PixelShuffle(2))
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv)


class CountedConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution that counts its operations: every kernel position once per pixel that comes in."""

    def scalar_ops(self, x_BCHW: Tensor) -> OpCount:
        """Count one forward pass; products that padding cuts away count like any other."""
        B, _, H, W = x_BCHW.shape
        products, outputs = B * H * W * self.weight.numel(), B * self.out_channels * 4 * H * W
        return OpCount(products, products - (outputs if self.bias is None else 0), 0)
