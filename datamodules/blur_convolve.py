"""Convolution of images with kernels of their own, directly or by Fourier transform.

Legend: B batch, C channels, H height, W width, K kernel side.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Boundary = Literal["reflect", "replicate", "zeros", "circular", "valid"]
Method = Literal["auto", "direct", "fft"]
DIRECT_UP_TO = 15  # the K at which, on one CPU thread and 64 to 256 px, the transform becomes the faster method


def convolve(
    images_BCHW: Tensor, kernels_BKK: Tensor, boundary: Boundary = "reflect", method: Method = "auto"
) -> Tensor:
    """Convolve every channel of an image with the image's kernel: y[i] = sum over d of k[centre + d] x[i - d].

    A true convolution, with the kernel flipped, unlike torch's conv2d: a kernel drawn as a picture is the image of a point.
    Differentiable in images and kernels. Computed in float32, or float64 for float64 images, also under autocast.

    Args:
        images_BCHW: floating.
        kernels_BKK: floating, K odd; one per image, or a single one for all.
        boundary: what lies outside: the image reflected about its border pixels, its border pixels repeated, zeros, or the
            image again; or "valid", only the (H - K + 1, W - K + 1) pixels that need nothing from outside.
        method: "direct" or "fft", which agree to some 1e-6 of the largest value; "auto" takes the faster one on CPU,
            and the transform elsewhere, for a GPU's convolutions may be of 10-bit precision (TF32).
    Returns:
        The images' dtype, (B, C, H, W), smaller for "valid".
    Raises:
        ValueError: unknown options, shapes that do not fit, an even K, or an image too small for its kernel.
    """
    for name, value, choices in (("boundary", boundary, Boundary), ("method", method, Method)):
        if value not in get_args(choices):
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(get_args(choices))}")
    _check_shapes(images_BCHW, kernels_BKK, boundary)
    dtype = torch.promote_types(images_BCHW.dtype, torch.float32)
    size = kernels_BKK.shape[-1]
    padded_BCHW, kernels_BKK = images_BCHW.to(dtype), kernels_BKK.to(dtype)
    if boundary != "valid":
        mode = "constant" if boundary == "zeros" else boundary
        padded_BCHW = F.pad(padded_BCHW, (size // 2,) * 4, mode=mode)
    faster = size <= DIRECT_UP_TO and images_BCHW.device.type == "cpu"
    direct = method == "direct" or (method == "auto" and faster)
    with torch.autocast(images_BCHW.device.type, enabled=False):
        out_BCHW = (_convolve_direct if direct else _convolve_fft)(padded_BCHW, kernels_BKK)
    return out_BCHW.to(images_BCHW.dtype)


def valid_part(images_BCHW: Tensor, size: int) -> Tensor:
    """Return the pixels that boundary="valid" leaves, for kernels of this size: the sharp side of such a pair."""
    H, W = images_BCHW.shape[-2:]
    return images_BCHW[..., size // 2 : H - size // 2, size // 2 : W - size // 2]


def _check_shapes(images_BCHW: Tensor, kernels_BKK: Tensor, boundary: str) -> None:
    images, kernels = tuple(images_BCHW.shape), tuple(kernels_BKK.shape)
    if not images_BCHW.is_floating_point() or len(images) != 4:
        raise ValueError(f"images must be floating (B, C, H, W), got {images_BCHW.dtype} {images}")
    if len(kernels) != 3 or kernels[1] != kernels[2] or kernels[0] not in (1, images[0]):
        raise ValueError(f"kernels must be (B, K, K) with B 1 or {images[0]} as the images, got {kernels}")
    K, (H, W) = kernels[-1], images[2:]
    if K % 2 == 0:
        raise ValueError(f"a kernel's size must be odd, or the result would be shifted by half a pixel, got {K}")
    least = {"reflect": K // 2 + 1, "circular": K // 2, "valid": K}.get(boundary, 1)
    if min(H, W) < least:
        raise ValueError(
            f"an image of {H} x {W} px is too small for a kernel of {K} x {K} with boundary {boundary!r}, which needs "
            f"{least} px; crop the kernels, draw smaller ones, or use boundary 'replicate'"
        )


def _convolve_direct(padded_BCHW: Tensor, kernels_BKK: Tensor) -> Tensor:
    B, C, H, W = padded_BCHW.shape
    weights = kernels_BKK.flip(1, 2).expand(B, -1, -1).repeat_interleave(C, 0)[:, None]
    out = F.conv2d(padded_BCHW.reshape(1, B * C, H, W), weights, groups=B * C)
    return out.view(B, C, *out.shape[-2:])


def _convolve_fft(padded_BCHW: Tensor, kernels_BKK: Tensor) -> Tensor:
    """Convolve circularly at the padded size: what wraps round falls on the K - 1 rows and columns that are cut off."""
    H, W = padded_BCHW.shape[-2:]
    shape, cut = (_smooth(H), _smooth(W)), kernels_BKK.shape[-1] - 1
    spectrum = torch.fft.rfft2(padded_BCHW, shape) * torch.fft.rfft2(kernels_BKK, shape)[:, None]
    return torch.fft.irfft2(spectrum, shape)[..., cut:H, cut:W]


def _smooth(n: int) -> int:
    """Return the least number from n on with no prime factor above 7: transforms of such lengths are fast."""
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
