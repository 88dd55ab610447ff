"""Convolution: against a slow reference and SciPy, at every boundary, both methods; conservation, adjoints, refusals.

Legend: B batch, C channels, H height, W width, K kernel side.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from torch import Tensor

from datamodules.blur_convolve import Boundary, Method, convolve, valid_part

BOUNDARIES: tuple[Boundary, ...] = ("reflect", "replicate", "zeros", "circular", "valid")
METHODS: tuple[Method, ...] = ("direct", "fft", "auto")
NUMPY_PADDING: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "zeros": "constant", "circular": "wrap"}


def _images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _kernels(B: int, K: int, seed: int = 1) -> Tensor:
    kernels_BKK = _images(B, K, K, seed=seed) ** 3
    return kernels_BKK / kernels_BKK.sum((1, 2), keepdim=True)


def _delta(K: int, row: int = 0, column: int = 0) -> Tensor:
    kernel_1KK = torch.zeros(1, K, K, dtype=torch.float64)
    kernel_1KK[0, K // 2 + row, K // 2 + column] = 1
    return kernel_1KK


def _slow(images_BCHW: Tensor, kernels_BKK: Tensor, boundary: str) -> np.ndarray:
    """y[i] = sum over d of k[centre + d] x[i - d], a term at a time."""
    x, k = images_BCHW.numpy(), kernels_BKK.numpy()
    K, half = k.shape[-1], k.shape[-1] // 2
    if boundary != "valid":
        x = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)), NUMPY_PADDING[boundary])
    H, W = x.shape[2] - K + 1, x.shape[3] - K + 1
    y = np.zeros((*x.shape[:2], H, W))
    for down, right in itertools.product(range(-half, half + 1), repeat=2):
        top, left = half - down, half - right
        y += k[:, half + down, half + right, None, None, None] * x[:, :, top : top + H, left : left + W]
    return y


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BOUNDARIES),
    st.sampled_from(METHODS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 3, 7, 17]),
    st.integers(17, 24),
    st.integers(17, 24),
)
def test_it_is_the_slow_reference(boundary, method, B: int, C: int, K: int, H: int, W: int) -> None:
    images_BCHW, kernels_BKK = _images(B, C, H, W), _kernels(B, K)
    expected = torch.from_numpy(_slow(images_BCHW, kernels_BKK, boundary))
    torch.testing.assert_close(convolve(images_BCHW, kernels_BKK, boundary, method), expected, rtol=0, atol=1e-13)
    single = convolve(images_BCHW.float(), kernels_BKK.float(), boundary, method)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_scipys(method) -> None:
    images_BCHW, kernels_BKK = _images(2, 2, 20, 23), _kernels(2, 9)
    theirs: dict[Boundary, dict[str, str]] = {
        "zeros": {"mode": "same", "boundary": "fill"},
        "circular": {"mode": "same", "boundary": "wrap"},
        "valid": {"mode": "valid"},
    }
    for boundary, options in theirs.items():
        found = convolve(images_BCHW, kernels_BKK, boundary, method)
        for b, c in itertools.product(range(2), repeat=2):
            expected = signal.convolve2d(images_BCHW[b, c].numpy(), kernels_BKK[b].numpy(), **options)
            np.testing.assert_allclose(found[b, c].numpy(), expected, atol=1e-13)


def test_direct_and_transform_agree_on_large_images_and_kernels() -> None:
    images_BCHW, kernels_BKK = _images(2, 3, 96, 101).float(), _kernels(2, 45).float()
    direct, fft = (convolve(images_BCHW, kernels_BKK, "reflect", method) for method in METHODS[:2])
    assert (direct - fft).abs().max() < 3e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("K", [1, 5, 21])
def test_light_is_conserved(method, K: int) -> None:
    images_BCHW, kernels_BKK = _images(3, 2, 24, 30), _kernels(3, K)
    mean = convolve(images_BCHW, kernels_BKK, "circular", method).mean((2, 3))
    torch.testing.assert_close(mean, images_BCHW.mean((2, 3)), rtol=1e-14, atol=0)
    flat = torch.full((3, 2, 24, 30), 0.7, dtype=torch.float64)
    for boundary in BOUNDARIES:
        if boundary == "zeros":
            continue
        out = convolve(flat, kernels_BKK, boundary, method)
        torch.testing.assert_close(out, torch.full_like(out, 0.7), rtol=1e-14, atol=0)
    assert K == 1 or convolve(flat, kernels_BKK, "zeros", method).amin() < 0.6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_point_is_the_identity_and_a_shifted_point_shifts(boundary, method) -> None:
    images_BCHW = _images(2, 3, 20, 22)
    same = convolve(images_BCHW, _delta(7), boundary, method)
    expected = valid_part(images_BCHW, 7) if boundary == "valid" else images_BCHW
    torch.testing.assert_close(same, expected, rtol=0, atol=1e-14)
    moved = convolve(images_BCHW, _delta(7, row=2, column=-1), "circular", method)
    torch.testing.assert_close(moved, images_BCHW.roll((2, -1), (2, 3)), rtol=0, atol=1e-14)


def test_the_image_of_a_point_is_the_kernel_unflipped() -> None:
    point, kernels_BKK = torch.zeros(2, 1, 15, 15, dtype=torch.float64), _kernels(2, 15)
    point[..., 7, 7] = 1
    for method in METHODS:
        torch.testing.assert_close(convolve(point, kernels_BKK, "zeros", method)[:, 0], kernels_BKK)


def test_valid_part_lines_up() -> None:
    images_BCHW, kernels_BKK = _images(1, 1, 30, 25), _kernels(1, 9)
    valid = convolve(images_BCHW, kernels_BKK, "valid")
    assert valid.shape == valid_part(images_BCHW, 9).shape
    for boundary in BOUNDARIES[:4]:
        torch.testing.assert_close(valid_part(convolve(images_BCHW, kernels_BKK, boundary), 9), valid)


@pytest.mark.parametrize("method", ["direct", "fft"])
def test_one_kernel_may_serve_all_images(method) -> None:
    images_BCHW, kernels_1KK = _images(3, 2, 20, 20), _kernels(1, 5)
    each = torch.cat([convolve(image[None], kernels_1KK, "reflect", method) for image in images_BCHW])
    torch.testing.assert_close(convolve(images_BCHW, kernels_1KK, "reflect", method), each)


@pytest.mark.parametrize("method", ["direct", "fft"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients(boundary, method) -> None:
    images_BCHW, kernels_BKK = _images(2, 1, 6, 7).requires_grad_(), _kernels(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, k: convolve(x, k, boundary, method), (images_BCHW, kernels_BKK))


@pytest.mark.parametrize("K", [5, 21])
def test_low_precision_is_computed_in_single(K: int) -> None:
    images_BCHW, kernels_BKK = _images(2, 3, 32, 32).bfloat16(), _kernels(2, K).float()
    single_BCHW = convolve(images_BCHW.float(), kernels_BKK)
    assert torch.equal(convolve(images_BCHW, kernels_BKK), single_BCHW.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(convolve(images_BCHW.float(), kernels_BKK), single_BCHW)


@pytest.mark.parametrize(
    ("images", "kernel", "options", "said"),
    [
        (
            (1, 1, 9, 15),
            19,
            {},
            "an image of 9 x 15 px is too small for a kernel of 19 x 19 .*'reflect', which needs 10",
        ),
        ((1, 1, 9, 15), 21, {"boundary": "circular"}, "'circular', which needs 10 px"),
        ((1, 1, 9, 15), 11, {"boundary": "valid"}, "'valid', which needs 11 px"),
        ((1, 1, 9, 9), 4, {}, "must be odd, or the result would be shifted by half a pixel, got 4"),
        ((1, 1, 9, 9), 3, {"boundary": "wrap"}, "unknown boundary 'wrap'; known: reflect, replicate, zeros"),
        ((1, 1, 9, 9), 3, {"method": "slow"}, "unknown method 'slow'; known: auto, direct, fft"),
        ((1, 9, 9), 3, {}, r"images must be floating \(B, C, H, W\), got torch.float64 \(1, 9, 9\)"),
        ((3, 1, 9, 9), 3, {}, r"kernels must be \(B, K, K\) with B 1 or 3 as the images, got \(2, 3, 3\)"),
    ],
)
def test_refusals(images: tuple[int, ...], kernel: int, options: dict, said: str) -> None:
    kernels_BKK = _kernels(2 if images[0] == 3 else 1, kernel)
    with pytest.raises(ValueError, match=said):
        convolve(_images(*images), kernels_BKK, **options)
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        convolve(_images(1, 1, 9, 9).byte(), _kernels(1, 3))


@pytest.mark.parametrize("boundary", ["replicate", "zeros"])
def test_small_images_have_boundaries_that_hold(boundary) -> None:
    images_BCHW, kernels_BKK = _images(1, 1, 3, 4), _kernels(1, 15)
    expected = torch.from_numpy(_slow(images_BCHW, kernels_BKK, boundary))
    torch.testing.assert_close(convolve(images_BCHW, kernels_BKK, boundary), expected)
