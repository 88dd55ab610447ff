"""Losses between images are their formulas, in float32 at least."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_modules.ops.image_quality import psnr
from lit_modules.ops.restoration import LOSSES, charbonnier, l1, psnr_loss, restoration_loss


def _pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sharp = torch.rand(4, 3, 9, 7, generator=generator)
    return (sharp + 0.1 * torch.randn(sharp.shape, generator=generator)).to(dtype), sharp.to(dtype)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_their_formulas(kind: str) -> None:
    restored, sharp = (x.double().numpy() for x in _pair())
    d = restored - sharp
    expected = {
        "l1": np.abs(d).mean(),
        "l2": (d**2).mean(),
        "charbonnier": np.sqrt(d**2 + 1e-6).mean(),
        "psnr": np.mean([10 * math.log10((one**2).mean() + 1e-8) for one in d]),
    }[kind]
    loss = restoration_loss(kind)(*_pair())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    restored, sharp = _pair(torch.float64)
    small = restored[:2, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: restoration_loss(kind)(x, sharp[:2, :, :2, :2]), small)


def test_the_psnr_loss_is_minus_the_psnr() -> None:
    restored, sharp = _pair(torch.float64)
    assert psnr_loss(restored, sharp).item() == pytest.approx(
        -psnr(restored, sharp, quantise=False).mean().item(), abs=1e-3
    )


def test_the_psnr_loss_weighs_images_by_their_own_error() -> None:
    """Scaling one image's error by s scales its gradient by 1 / s: an L2 loss would scale it by s."""
    sharp = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    restored = torch.stack([torch.full((1, 4, 4), 0.3), torch.full((1, 4, 4), 0.03)]).double().requires_grad_()
    psnr_loss(restored, sharp).backward()
    assert restored.grad is not None
    assert (restored.grad[1] / restored.grad[0]).mean().item() == pytest.approx(10, rel=1e-4)


def test_equal_images_have_finite_losses_and_gradients() -> None:
    for kind, least in {"l1": 0, "l2": 0, "charbonnier": 1e-3, "psnr": -80}.items():
        x = torch.rand(2, 3, 4, 4, requires_grad=True)
        loss = restoration_loss(kind)(x, x.detach())
        loss.backward()
        assert loss.item() == pytest.approx(least, rel=1e-5)
        assert x.grad is not None
        assert (x.grad == 0).all()


def test_half_precision_is_computed_in_float32() -> None:
    restored, sharp = _pair(torch.bfloat16)
    for kind in LOSSES:
        loss = restoration_loss(kind)(restored, sharp)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, restoration_loss(kind)(restored.float(), sharp.float()))


def test_charbonnier_lies_between_l1_and_l1_plus_eps() -> None:
    restored, sharp = _pair()
    for eps in (1e-3, 0.1):
        loss = restoration_loss("charbonnier", eps)(restored, sharp)
        assert l1(restored, sharp) < loss < l1(restored, sharp) + eps


def test_what_cannot_be_compared_is_refused() -> None:
    x = torch.rand(2, 3, 4, 4)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=r"must match, got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
            loss(x, x[:1])
    with pytest.raises(ValueError, match="unknown restoration loss 'mse'; known: l1, l2, charbonnier, psnr"):
        restoration_loss("mse")
    with pytest.raises(ValueError, match="only charbonnier has an eps, not l1"):
        restoration_loss("l1", 0.1)
    with pytest.raises(ValueError, match="eps must be above 0, got 0"):
        charbonnier(x, x, 0)
