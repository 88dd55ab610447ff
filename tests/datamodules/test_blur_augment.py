"""Incidental augmentation: keyed, in range, differentiable; and the blur's public names.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from datamodules import blur
from datamodules.blur import Augmentation, augment, key_of


def _keys(count: int) -> Tensor:
    return key_of(0, "train", torch.arange(count))


def _images(B: int) -> Tensor:
    return torch.rand(B, 3, 8, 9, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3


def test_nothing_is_asked_for() -> None:
    assert torch.equal(augment(_images(4), _keys(4), Augmentation(flip=0)), _images(4))
    assert torch.equal(augment(_images(4), _keys(4), Augmentation(flip=1)), _images(4).flip(-1))


def test_flips_have_the_asked_share() -> None:
    images_BCHW = _images(1).expand(2000, -1, -1, -1)
    seen_BCHW = augment(images_BCHW, _keys(2000), Augmentation(flip=0.3))
    flipped_B = (seen_BCHW == images_BCHW.flip(-1)).flatten(1).all(1)
    assert ((seen_BCHW == images_BCHW).flatten(1).all(1) ^ flipped_B).all()
    assert abs(float(flipped_B.double().mean()) - 0.3) < 4 * math.sqrt(0.21 / 2000)


def test_brightness_moves_the_mean_and_contrast_keeps_it() -> None:
    images_BCHW, keys_B = _images(500), _keys(500)
    moved_B = (augment(images_BCHW, keys_B, Augmentation(0, brightness=0.2)) - images_BCHW).flatten(1)
    assert moved_B.std(1).max() < 1e-6
    assert -0.2 <= moved_B.min() < -0.19
    assert 0.19 < moved_B.max() <= 0.2
    seen_BCHW = augment(images_BCHW, keys_B, Augmentation(0, contrast=0.3))
    torch.testing.assert_close(seen_BCHW.mean((1, 2, 3)), images_BCHW.mean((1, 2, 3)))
    ratio_B = seen_BCHW.flatten(1).std(1) / images_BCHW.flatten(1).std(1)
    assert 0.7 - 1e-5 <= ratio_B.min() < 0.71
    assert 1.29 < ratio_B.max() <= 1.3 + 1e-5


def test_an_image_is_augmented_alike_in_any_batch() -> None:
    images_BCHW, order, how = _images(9), torch.tensor([7, 2, 3]), Augmentation(0.5, 0.2, 0.2)
    seen_BCHW = augment(images_BCHW, _keys(9), how)
    torch.testing.assert_close(seen_BCHW[order], augment(images_BCHW[order], _keys(9)[order], how))
    assert ((seen_BCHW >= 0) & (seen_BCHW <= 1)).all()


def test_gradients() -> None:
    images_BCHW = _images(2).double()[:, :1, :3, :3].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, _keys(2), Augmentation(0.5, 0.1, 0.2)), images_BCHW)


def test_refusals() -> None:
    for name in ("flip", "brightness", "contrast"):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got -0.1"):
            Augmentation(**{name: -0.1})
    with pytest.raises(ValueError, match="a key per image, got 3 keys for 2 images"):
        augment(_images(2), _keys(3), Augmentation())


def test_the_example_of_the_module_runs() -> None:
    assert all(hasattr(blur, name) for name in blur.__all__)
    keys_B = blur.key_of(0, "train", torch.arange(4), epoch=2)
    sharp_BCHW = blur.augment(torch.rand(4, 3, 64, 64), keys_B, Augmentation(brightness=0.1))
    kernels_BKK = blur.motion_kernels(blur.preset("training"), keys_B, side=64)
    blurred_BCHW = blur.photograph(sharp_BCHW, kernels_BKK, blur.CAMERAS["sensor"], keys_B)
    roughness = [(x.diff(dim=-1) ** 2).mean() for x in (sharp_BCHW, blurred_BCHW)]
    assert roughness[1] < roughness[0] / 2
