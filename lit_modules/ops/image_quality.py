"""How close a restored image is to the sharp one, image by image: PSNR and SSIM.

Legend: B batch, C channels, H height, W width, K window. Images are in [0, 1], so the data range is 1. No gradient is kept
from quantised images: these are measures, not losses (see lit_modules.ops.restoration).

With quantise=True, the default, both images are first clamped to [0, 1] and rounded to 255 steps, as they would be when
saved: what a reader computes from the files. With False they are taken as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(restored_BCHW: Tensor, sharp_BCHW: Tensor, quantise: bool = True) -> Tensor:
    """Return 10 log10(1 / MSE) of each image in dB, (B,); MSE over C, H and W.

    Equal images have +inf, as in scikit-image. It is not capped: a mean that holds it is inf. Who averages must say what
    is done, for example leave such images out (torch.isfinite) and report how many.

    Papers mean the average of these; pooling the squared error of a whole set before the logarithm, as torchmetrics does
    by default, gives less.

    Raises:
        ValueError: shapes that differ or are not (B, C, H, W).
        TypeError: images of integers.
    """
    restored_BCHW, sharp_BCHW = _prepared(restored_BCHW, sharp_BCHW, quantise)
    return -10 * (restored_BCHW - sharp_BCHW).square().flatten(1).mean(1).log10()


def ssim(restored_BCHW: Tensor, sharp_BCHW: Tensor, quantise: bool = True) -> Tensor:
    """Return the structural similarity of each image, (B,), in [-1, 1]; 1 for equal images.

    Gaussian window of 11x11 pixels and sigma 1.5, K1 0.01, K2 0.03, population covariances, each channel by itself, mean
    over channels and over the (H - 10) (W - 10) windows that lie inside the image. scikit-image with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False and data_range=1 does the same. torchmetrics differs by its
    border: it reflects the image and averages over the windows there as well. DeblurGAN's tables seem to hold another
    index, complex-wavelet SSIM, and NAFNet's one with a window over channels too; both are higher.

    Raises:
        ValueError: shapes that differ or are not (B, C, H, W), images smaller than the window.
        TypeError: images of integers.
    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    restored_BCHW, sharp_BCHW = _prepared(restored_BCHW, sharp_BCHW, quantise)
    H, W = sharp_BCHW.shape[-2:]
    if min(H, W) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, got {H}x{W}")
    x, y = restored_BCHW, sharp_BCHW
    moments = torch.stack([x, y, x * x, y * y, x * y])
    m_x, m_y, m_xx, m_yy, m_xy = _windowed(moments.flatten(0, 2)).unflatten(0, moments.shape[:3])
    means, c1, c2 = m_x * m_y, K1**2, K2**2
    squares = m_x * m_x + m_y * m_y
    index = (2 * means + c1) * (2 * (m_xy - means) + c2) / ((squares + c1) * (m_xx + m_yy - squares + c2))
    return index.flatten(1).mean(1)


def quantised(x: Tensor) -> Tensor:
    """Return images clamped to [0, 1] and rounded to multiples of 1 / 255."""
    return (x.clamp(0, 1) * 255).round() / 255


def _windowed(x_NHW: Tensor) -> Tensor:
    """Return the Gaussian mean of every window inside the image: (N, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=x_NHW.dtype, device=x_NHW.device) - WINDOW // 2
    w_K = (-0.5 * (offsets / SIGMA).square()).exp()
    w_K = w_K / w_K.sum()
    x_N1HW = F.conv2d(F.conv2d(x_NHW[:, None], w_K[None, None, :, None]), w_K[None, None, None, :])
    return x_N1HW[:, 0]


def _prepared(restored_BCHW: Tensor, sharp_BCHW: Tensor, quantise: bool) -> tuple[Tensor, Tensor]:
    """Check two batches and return them in float32 (float64 for float64 images), quantised if asked."""
    if restored_BCHW.shape != sharp_BCHW.shape or sharp_BCHW.ndim != 4:
        shapes = f"{tuple(restored_BCHW.shape)} and {tuple(sharp_BCHW.shape)}"
        raise ValueError(f"restored and sharp images must both be (B, C, H, W), got {shapes}")
    for images in (restored_BCHW, sharp_BCHW):
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1], got {images.dtype}: divide 8-bit ones by 255")
    dtype = torch.promote_types(torch.promote_types(restored_BCHW.dtype, sharp_BCHW.dtype), torch.float32)
    pair = restored_BCHW.to(dtype), sharp_BCHW.to(dtype)
    return (quantised(pair[0]), quantised(pair[1])) if quantise else pair
