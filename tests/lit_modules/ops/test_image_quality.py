"""PSNR and SSIM of each image are scikit-image's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_modules.ops.image_quality import psnr, quantised, ssim


def _pair(dtype: torch.dtype = torch.float64, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 33).expand(3, 3, 24, 33)
    sharp = (ramp + 0.2 * torch.rand(ramp.shape, generator=generator)).clamp(0, 1)
    restored = (
        sharp + noise * torch.randn(sharp.shape, generator=generator) * torch.tensor([0.5, 1, 2])[:, None, None, None]
    )
    return restored.to(dtype), sharp.to(dtype)


def test_psnr_is_scikit_images_image_by_image() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    restored, sharp = _pair()
    reference = [
        peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1) for a, b in zip(restored, sharp, strict=True)
    ]
    assert psnr(restored, sharp, quantise=False).tolist() == pytest.approx(reference, abs=1e-10)
    saved = [(x.clamp(0, 1) * 255).round().to(torch.uint8).numpy() for x in (restored, sharp)]
    reference = [peak_signal_noise_ratio(b, a) for a, b in zip(*saved, strict=True)]
    assert psnr(restored, sharp).tolist() == pytest.approx(reference, abs=1e-10)


def test_the_mean_of_psnrs_is_above_the_psnr_of_pooled_errors() -> None:
    restored, sharp = _pair()
    pooled = -10 * (restored - sharp).square().mean().log10()
    assert psnr(restored, sharp, quantise=False).mean() > pooled + 1


def test_ssim_is_scikit_images() -> None:
    from skimage.metrics import structural_similarity

    def reference(restored: np.ndarray, sharp: np.ndarray, data_range: float) -> float:
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return structural_similarity(restored, sharp, channel_axis=0, data_range=data_range, **options)

    restored, sharp = _pair()
    expected = [reference(a.numpy(), b.numpy(), 1) for a, b in zip(restored, sharp, strict=True)]
    assert ssim(restored, sharp, quantise=False).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(*_pair(torch.float32), quantise=False).tolist() == pytest.approx(expected, abs=1e-5)
    saved = [(x.clamp(0, 1) * 255).round().to(torch.uint8).numpy() for x in (restored, sharp)]
    expected = [reference(a, b, 255) for a, b in zip(*saved, strict=True)]
    assert ssim(restored, sharp).tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.slow  # importing torchmetrics takes ten seconds
def test_torchmetrics_agrees_but_for_the_border_of_ssim() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    restored, sharp = _pair()
    per_image = peak_signal_noise_ratio(restored, sharp, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(restored, sharp, quantise=False), per_image.to(restored))
    whole, index = structural_similarity_index_measure(
        restored, sharp, data_range=1.0, reduction="none", return_full_image=True
    )
    ours = ssim(restored, sharp, quantise=False)
    torch.testing.assert_close(ours, index[..., 5:-5, 5:-5].mean((1, 2, 3)))
    assert ((ours - whole).abs() > 1e-4).all()


def test_a_constant_offset_has_a_known_psnr() -> None:
    x = torch.full((1, 3, 12, 12), 0.25)
    for step in (1, 5, 20):
        assert psnr(x + step / 255, x).item() == pytest.approx(20 * math.log10(255 / step), abs=1e-3)


def test_a_known_luminance_term() -> None:
    """Of two flat images covariance and variances are 0, and SSIM is its luminance term alone."""
    x, y = (torch.full((1, 1, 16, 16), v, dtype=torch.float64) for v in (0.2, 0.6))
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(x, y, quantise=False).item() == pytest.approx(expected, rel=1e-12)


def test_equal_images() -> None:
    _, sharp = _pair(torch.float32)
    assert ssim(sharp, sharp).tolist() == [1, 1, 1]
    assert psnr(sharp, sharp).tolist() == [math.inf] * 3
    restored = sharp.clone()
    restored[0] += 0.1
    assert psnr(restored, sharp).mean() == math.inf  # nothing is capped behind one's back
    assert torch.isfinite(psnr(restored, sharp)).tolist() == [True, False, False]


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_more_noise_is_worse_and_both_images_count_alike(measure: Callable[..., Tensor]) -> None:
    values = torch.stack([measure(*_pair(noise=noise)) for noise in (0.01, 0.03, 0.1, 0.3)])
    assert (values.diff(dim=0) < 0).all()
    restored, sharp = _pair()
    torch.testing.assert_close(measure(restored, sharp), measure(sharp, restored))
    each = torch.cat([measure(restored[i : i + 1], sharp[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(measure(restored, sharp), each)


def test_quantising_forgets_what_a_file_forgets() -> None:
    x = torch.full((1, 3, 12, 12), 100 / 255, dtype=torch.float64)
    assert psnr(x + 0.4 / 255, x).item() == math.inf
    assert psnr(x + 0.4 / 255, x, quantise=False).item() == pytest.approx(20 * math.log10(255 / 0.4), abs=1e-6)
    white = torch.ones_like(x)
    assert psnr(white + 0.5, white).item() == math.inf  # out of range is clamped
    assert torch.equal(quantised(torch.tensor([-1.0, 0.5 / 255 + 1e-4, 2.0])), torch.tensor([0, 1 / 255, 1]))


def test_half_precision_is_measured_in_float32() -> None:
    restored, sharp = _pair(torch.bfloat16)
    for measure in (psnr, ssim):
        assert measure(restored, sharp).dtype == torch.float32
        assert torch.equal(measure(restored, sharp), measure(restored.float(), sharp.float()))


def test_what_cannot_be_measured_is_refused() -> None:
    x = torch.rand(1, 3, 10, 40)
    with pytest.raises(ValueError, match="SSIM needs images of at least 11x11 pixels, got 10x40"):
        ssim(x, x)
    assert psnr(x, x.flip(3)).shape == (1,)
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"must both be \(B, C, H, W\), got \(1, 3, 10, 40\) and \(1, 3, 10, 39\)"):
            measure(x, x[..., :39])
        with pytest.raises(ValueError, match=r"must both be \(B, C, H, W\), got \(3, 10, 40\)"):
            measure(x[0], x[0])
        with pytest.raises(TypeError, match=r"floats in \[0, 1\], got torch.uint8: divide 8-bit ones by 255"):
            measure(x.to(torch.uint8), x.to(torch.uint8))
