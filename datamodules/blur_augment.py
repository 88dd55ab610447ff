"""Incidental augmentation of sharp images, keyed like their blur.

It belongs before the blur: both sides of a pair then agree. What only the blurred side suffers, JPEG among it, is in
`datamodules.blur_camera.Camera`.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.counter_random import Stream, uniform


@dataclass(frozen=True)
class Augmentation:
    """What an image may look like as well.

    Args:
        flip: probability of a left-right mirror image.
        brightness: b, for an offset uniform in [-b, b].
        contrast: c, for a factor uniform in [1 - c, 1 + c] on the difference from the image's mean.
    Raises:
        ValueError: a value outside [0, 1], naming it.
    """

    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "brightness", "contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


def augment(images_BCHW: Tensor, keys_B: Tensor, augmentation: Augmentation) -> Tensor:
    """Return augmented copies of images in [0, 1]: mirrored, then contrast and brightness, clipped. Differentiable.

    Raises:
        ValueError: keys that are not one per image.
    """
    if len(keys_B) != len(images_BCHW):
        raise ValueError(f"there must be a key per image, got {len(keys_B)} keys for {len(images_BCHW)} images")
    draws_3B = uniform(keys_B.to(images_BCHW.device), 3, Stream.AUGMENTATION).T.to(images_BCHW.dtype)
    flip_B111, brightness_B111, contrast_B111 = draws_3B[..., None, None, None]
    out_BCHW = torch.where(flip_B111 < augmentation.flip, images_BCHW.flip(-1), images_BCHW)
    if augmentation.contrast:
        mean_B111 = out_BCHW.mean((1, 2, 3), keepdim=True)
        out_BCHW = mean_B111 + (out_BCHW - mean_B111) * (1 + augmentation.contrast * (2 * contrast_B111 - 1))
    if augmentation.brightness:
        out_BCHW = out_BCHW + augmentation.brightness * (2 * brightness_B111 - 1)
    return out_BCHW.clamp(0, 1)
