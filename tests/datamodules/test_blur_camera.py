"""What a camera makes of light: tone curves, conservation in light, noise of the asked strength, 8 bits, JPEG.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from datamodules.blur import (
    CAMERAS,
    PRESETS,
    Camera,
    convolve,
    jpeg,
    key_of,
    motion_kernels,
    photograph,
    to_display,
    to_linear,
    valid_part,
)

GAMMAS = (None, 2.2, 1.0, "srgb")


def _keys(count: int, seed: int = 0) -> Tensor:
    return key_of(seed, "test", torch.arange(count))


def _images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _flat(B: int, value: float, side: int = 64) -> Tensor:
    return torch.full((B, 3, side, side), value)


POINT = torch.ones(1, 1, 1)


def test_the_ideal_camera_only_convolves() -> None:
    sharp_BCHW, kernels_BKK = _images(4, 3, 40, 40), motion_kernels(PRESETS["mild"], _keys(4), 40)
    assert torch.equal(
        photograph(sharp_BCHW, kernels_BKK, Camera(), _keys(4)), convolve(sharp_BCHW, kernels_BKK).clamp(0, 1)
    )
    valid = photograph(sharp_BCHW, kernels_BKK, Camera(boundary="valid"), _keys(4))
    assert valid.shape == valid_part(sharp_BCHW, kernels_BKK.shape[-1]).shape


@pytest.mark.parametrize("gamma", GAMMAS)
def test_tone_curves_are_inverse_rising_and_finite_in_slope(gamma) -> None:
    values = torch.cat((torch.zeros(1), torch.logspace(-8, 0, 300))).double()
    light = to_linear(values, gamma).requires_grad_()
    torch.testing.assert_close(to_display(light, gamma), values, rtol=1e-5, atol=1e-7)
    assert (light.diff() > 0).all()
    assert (float(light[0].detach()), float(light[-1].detach())) == (0, pytest.approx(1))
    (slope,) = torch.autograd.grad(to_display(light, gamma).sum(), light)
    assert slope.isfinite().all()
    assert (slope > 0).all()


def test_tone_curves_have_known_values() -> None:
    values = torch.tensor([10.0, 128.0, 200.0]).double() / 255
    torch.testing.assert_close(to_linear(values, 2.2), values**2.2)
    expected = torch.tensor([0.0030352698, 0.2158605001, 0.5775804404]).double()  # of IEC 61966-2-1
    torch.testing.assert_close(to_linear(values, "srgb"), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [2.2, "srgb"])
def test_blur_in_light_keeps_mean_light(gamma) -> None:
    """And so brightens the mean of the values: the curve is concave."""
    sharp_BCHW, kernels_BKK = _images(4, 3, 40, 40).double(), motion_kernels(PRESETS["severe"], _keys(4), 40).double()
    kernels_BKK = kernels_BKK / kernels_BKK.sum((1, 2), keepdim=True)
    in_light, in_values = (
        photograph(sharp_BCHW, kernels_BKK, Camera(gamma=g, boundary="circular"), _keys(4)) for g in (gamma, None)
    )
    light = [to_linear(x, gamma).mean((2, 3)) for x in (in_light, sharp_BCHW)]
    torch.testing.assert_close(*light, rtol=1e-9, atol=0)
    torch.testing.assert_close(in_values.mean((2, 3)), sharp_BCHW.mean((2, 3)), rtol=1e-12, atol=0)
    assert (in_light - in_values).min() > -1e-9
    assert (in_light - in_values).mean() > 0.02


def test_noise_has_the_asked_sigma_and_is_white() -> None:
    camera = Camera(noise_sigma=(0.02, 0.02))
    noise_BCHW = photograph(_flat(8, 0.5), POINT, camera, _keys(8)) - 0.5
    n = noise_BCHW.numel()
    assert abs(float(noise_BCHW.std()) / 0.02 - 1) < 5 / math.sqrt(2 * n)
    assert abs(float(noise_BCHW.mean())) < 5 * 0.02 / math.sqrt(n)
    for step, axis in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 3), (8, 2)):
        assert abs(float((noise_BCHW * noise_BCHW.roll(step, axis)).mean())) / 0.02**2 < 5 / math.sqrt(n)


def test_each_image_draws_its_own_sigma_in_the_range() -> None:
    camera = Camera(noise_sigma=(0.01, 0.03))
    sigma_B = (photograph(_flat(200, 0.5, 32), POINT, camera, _keys(200)) - 0.5).flatten(1).std(1)
    slack = 5 / math.sqrt(2 * 3 * 32 * 32)
    assert 0.01 * (1 - slack) < sigma_B.min() < 0.012
    assert 0.028 < sigma_B.max() < 0.03 * (1 + slack)
    assert abs(float(sigma_B.mean()) - 0.02) < 5 * 0.02 / math.sqrt(12 * 200)


def test_photon_noise_has_the_variance_of_its_mean() -> None:
    for light, photons in ((0.5, 500.0), (0.05, 2048.0), (0.01, 300.0)):
        seen = photograph(_flat(8, light), POINT, Camera(photons=photons), _keys(8)).double()
        n, mean = seen.numel(), light * photons
        assert abs(float(seen.mean()) - light) < 5 * math.sqrt(light / photons / n) + 1e-7
        assert abs(float(seen.var()) / (light / photons) - 1) < 5 * math.sqrt((2 + 1 / mean) / n)
        counts = seen * photons
        assert (counts - counts.round()).abs().max() < 1e-3
    dark = photograph(_flat(2, 0.0), POINT, Camera(photons=500), _keys(2))
    assert (dark == 0).all()


def test_photons_are_counted_in_light() -> None:
    value = 0.4
    seen = photograph(_flat(8, value), POINT, Camera(gamma=2.2, photons=5000), _keys(8)).double()
    variance = to_linear(seen, 2.2).var() / (value**2.2 / 5000)
    assert abs(float(variance) - 1) < 5 * math.sqrt(2 / seen.numel())


def test_photon_and_read_out_noise_are_independent() -> None:
    """So their variances add; of one stream their deviations would."""
    camera = Camera(photons=2000, noise_sigma=(0.015, 0.015))
    variance = float(photograph(_flat(8, 0.5), POINT, camera, _keys(8)).double().var())
    assert abs(variance / (0.5 / 2000 + 0.015**2) - 1) < 5 * math.sqrt(2 / _flat(8, 0.5).numel())


@pytest.mark.parametrize("name", ["sensor", "night"])
def test_the_same_keys_give_the_same_bits_in_any_order(name: str) -> None:
    sharp_BCHW, order = _images(6, 3, 16, 16), torch.tensor([3, 0, 5])
    whole = photograph(sharp_BCHW, POINT, CAMERAS[name], _keys(6))
    assert torch.equal(whole[order], photograph(sharp_BCHW[order], POINT, CAMERAS[name], _keys(6)[order]))
    assert not torch.equal(whole, photograph(sharp_BCHW, POINT, CAMERAS[name], _keys(6, seed=1)))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(CAMERAS)), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_photographs_are_images_again(name: str, dtype: torch.dtype) -> None:
    sharp_BCHW = _images(3, 3, 20, 20).to(dtype)
    seen_BCHW = photograph(sharp_BCHW, motion_kernels(PRESETS["mild"], _keys(3), 20), CAMERAS[name], _keys(3))
    assert (seen_BCHW.shape, seen_BCHW.dtype) == (sharp_BCHW.shape, dtype)
    assert ((seen_BCHW >= 0) & (seen_BCHW <= 1)).all()
    if CAMERAS[name].quantise and dtype != torch.bfloat16:
        assert torch.equal(seen_BCHW, (seen_BCHW * 255).round() / 255)


def test_highlights_streak() -> None:
    """A raised white point stays white over a line that would have thinned it out."""
    sharp_BCHW = torch.full((1, 1, 15, 15), 0.2)
    sharp_BCHW[..., 7, 7] = 1
    line = torch.full((1, 1, 5), 0.2).expand(1, 5, 5) * (torch.arange(5) == 2)[:, None]
    plain, raised = (photograph(sharp_BCHW, line, Camera(highlights=h), _keys(1)) for h in ((1, 1), (5, 5)))
    torch.testing.assert_close(plain[0, 0, 7, 5:10], torch.full((5,), 0.36))
    assert (raised[0, 0, 7, 5:10] == 1).all()
    assert torch.equal(raised[0, 0, :7], plain[0, 0, :7])


def test_jpeg_is_pillows() -> None:
    for mode, channels in (("L", 1), ("RGB", 3)):
        images_BCHW = (_images(2, channels, 24, 16) * 255).round() / 255
        found = jpeg(images_BCHW, torch.tensor([40, 95]))
        for image, quality, seen in zip(images_BCHW, (40, 95), found, strict=True):
            file = io.BytesIO()
            pixels = (image * 255).byte().movedim(0, -1).numpy()
            Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels, mode).save(file, "JPEG", quality=quality)
            assert np.array_equal(
                np.asarray(Image.open(file)).reshape(pixels.shape), (seen * 255).round().movedim(0, -1)
            )
    with pytest.raises(ValueError, match="JPEG takes 1 or 3 channels, got images of 2"):
        jpeg(_images(1, 2, 8, 8), torch.tensor([90]))


def test_the_quality_of_jpeg_is_drawn() -> None:
    sharp_BCHW = _images(1, 3, 16, 16).expand(60, -1, -1, -1)
    drawn = photograph(sharp_BCHW, POINT, Camera(jpeg=(70, 72)), _keys(60))
    known = torch.cat([jpeg(sharp_BCHW[:1], torch.tensor([quality])) for quality in (70, 71, 72)])
    which = [[torch.equal(image, other) for other in known].index(True) for image in drawn]
    assert set(which) == {0, 1, 2}


def test_the_gradient_passes_what_has_none() -> None:
    sharp_BCHW, kernels_BKK = _images(2, 3, 16, 16) * 0.4 + 0.3, motion_kernels(PRESETS["mild"], _keys(2), 16)
    x = sharp_BCHW.clone().requires_grad_()
    gradients: list[Tensor] = []
    for camera in (Camera(), Camera(photons=1e6, quantise=True, jpeg=(90, 90))):
        seen_BCHW = photograph(x, kernels_BKK, camera, _keys(2))
        assert torch.equal(seen_BCHW, photograph(sharp_BCHW, kernels_BKK, camera, _keys(2)))
        gradients += torch.autograd.grad((seen_BCHW * sharp_BCHW.flip(-1)).sum(), x)
    assert gradients[0].abs().min() > 0
    assert torch.equal(*gradients)


def test_the_blur_is_differentiable_in_light() -> None:
    x = (_images(1, 1, 6, 6) * 0.8 + 0.1).double().requires_grad_()
    kernels_BKK = torch.full((1, 3, 3), 1 / 9, dtype=torch.float64, requires_grad=True)
    for gamma in (2.2, "srgb"):
        camera = Camera(gamma=gamma)
        assert torch.autograd.gradcheck(lambda x, k, c=camera: photograph(x, k, c, _keys(1)), (x, kernels_BKK))
    black = torch.zeros(1, 1, 6, 6, requires_grad=True)
    seen = photograph(black, kernels_BKK.detach(), Camera(gamma=2.2), _keys(1))
    assert torch.autograd.grad(seen.sum(), black)[0].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gamma": "rgb"}, "gamma must be above 0, 'srgb' or null, got 'rgb'"),
        ({"gamma": 0}, "gamma must be"),
        ({"noise_sigma": (0.2, 0.1)}, "noise_sigma must be a range"),
        ({"highlights": (0.5, 1)}, "highlights must be a range .* with 1 <= a"),
        ({"jpeg": (0, 90)}, "jpeg must be a range"),
        ({"photons": 0}, "photons must lie between 0 and 1e12, or be null"),
        ({"boundary": "wrap"}, "unknown boundary 'wrap'"),
    ],
)
def test_cameras_that_are_none(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Camera(**fields)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a key per image, got 3 keys for 2 images"):
        photograph(_images(2, 3, 8, 8), POINT, Camera(), _keys(3))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -1 to -0.001.*; map \[-1, 1\] by \(x \+ 1\) / 2"):
        photograph(_images(2, 3, 8, 8).neg().index_fill(3, torch.tensor([0]), -1), POINT, Camera(), _keys(2))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        photograph(torch.full((1, 1, 8, 8), math.nan), POINT, Camera(), _keys(1))
    with pytest.raises(ValueError, match="an image of 8 x 8 px is too small for a kernel of 21 x 21"):
        photograph(_images(2, 3, 8, 8), torch.ones(2, 21, 21) / 441, Camera(), _keys(2))


def test_configuration_files_hold_lists() -> None:
    assert Camera(noise_sigma=[0, 0.1], jpeg=[80, 90]) == Camera(noise_sigma=(0, 0.1), jpeg=(80, 90))  # type: ignore[arg-type]
    assert len({CAMERAS["night"], CAMERAS["night"]}) == 1
