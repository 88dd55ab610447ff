"""Kernels: non-negative, of sum 1, centred, of the drawn extent, and what a slow bilinear reference draws.

Legend: B kernels, K kernel side, M samples of a path, 2 = (column, row).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.blur_kernels import (
    crop_kernels,
    embed_kernels,
    kernel_extent,
    kernel_size,
    motion_kernels,
    rasterise,
)
from datamodules.blur_motion import PRESETS, Motion, draw
from datamodules.blur_paths import GRID, exposed, trajectories
from datamodules.counter_random import key_of, normal, uniform


def _keys(count: int, seed: int = 0) -> Tensor:
    return key_of(seed, "test", torch.arange(count))


def _moments(kernels_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """Return centroids (B, 2) from the centre pixel and covariances (B, 2, 2), both as (column, row)."""
    kernels_BKK = kernels_BKK.double()
    away_K = torch.arange(kernels_BKK.shape[-1], dtype=torch.float64) - kernels_BKK.shape[-1] // 2
    at_KK2 = torch.stack(torch.meshgrid(away_K, away_K, indexing="xy"), -1)
    centroid_B2 = torch.einsum("bij,ijc->bc", kernels_BKK, at_KK2)
    square_B22 = torch.einsum("bij,ijc,ijd->bcd", kernels_BKK, at_KK2, at_KK2)
    return centroid_B2, square_B22 - centroid_B2[:, :, None] * centroid_B2[:, None]


def _slow(path_M2: np.ndarray, weights_M: np.ndarray, size: int) -> np.ndarray:
    """Spread each sample over all pixels by tri(dx) tri(dy), in float64."""
    kernel, away = np.zeros((size, size)), np.arange(size) - size // 2
    for (x, y), weight in zip(path_M2, weights_M, strict=True):
        kernel += weight * np.outer(np.maximum(0, 1 - np.abs(y - away)), np.maximum(0, 1 - np.abs(x - away)))
    return kernel / kernel.sum()


MOTIONS = st.builds(
    Motion,
    kind=st.sampled_from(["shake", "linear", "disk", "gaussian", "none"]),
    extent=st.tuples(st.floats(0, 0.1), st.floats(0.1, 0.9)),
    anxiety=st.lists(st.floats(0, 0.1), min_size=1, max_size=3).map(tuple),
    exposures=st.lists(st.floats(0.1, 1), min_size=1, max_size=3).map(tuple),
    samples=st.integers(20, 60),
)


@settings(max_examples=80, deadline=None)
@given(MOTIONS, st.booleans(), st.integers(1, 120), st.integers(0, 1000))
def test_kernels_are_non_negative_of_sum_one_and_centred(motion: Motion, longer: bool, side: int, seed: int) -> None:
    if longer and motion.kind in ("shake", "linear"):
        motion = replace(motion, parametrise="length", length=motion.extent)
    kernels_BKK = motion_kernels(motion, _keys(6, seed), side)
    K = kernel_size(motion, side)
    assert kernels_BKK.shape == (6, K, K)
    assert kernels_BKK.dtype == torch.float32
    assert K % 2 == 1
    assert (kernels_BKK >= 0).all()
    assert (kernels_BKK.double().sum((1, 2)) - 1).abs().max() < 1e-6
    assert _moments(kernels_BKK)[0].abs().max() < 1e-4


@settings(max_examples=40, deadline=None)
@given(MOTIONS.filter(lambda motion: motion.kind != "gaussian"), st.permutations(range(9)), st.integers(1, 9))
def test_a_kernel_has_the_same_bits_in_any_batch(motion: Motion, order: list[int], count: int) -> None:
    keys_B, chosen = _keys(9), torch.tensor(order[:count])
    assert torch.equal(motion_kernels(motion, keys_B, 64)[chosen], motion_kernels(motion, keys_B[chosen], 64))


def test_paths_are_drawn_as_the_slow_reference_draws_them() -> None:
    motion = Motion(anxiety=(0.0, 0.003, 0.05), exposures=(0.37, 1.0), samples=90)
    keys_B = _keys(12)
    path_BM2, weights_BM = trajectories(motion, keys_B, 64), exposed(draw(motion, keys_B, 64).exposure, 90)
    expected = [_slow(p.numpy(), w.numpy(), 31) for p, w in zip(path_BM2, weights_BM, strict=True)]
    torch.testing.assert_close(
        motion_kernels(motion, keys_B, 64).double(), torch.from_numpy(np.stack(expected)), rtol=1e-7, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(0, 10**6))
def test_nothing_is_dropped_or_piled_up_at_the_border(half: int, seed: int) -> None:
    """Bilinear weights keep mass and centroid; a path may run to the centres of the outermost pixels."""
    path_BM2 = (2 * uniform(_keys(4, seed), 60, dtype=torch.float64).view(4, 30, 2) - 1) * half
    path_BM2[:, 0] = torch.tensor([half, -half])
    path_BM2 = (path_BM2 * GRID).round() / GRID
    kernels_BKK = rasterise(path_BM2, 2 * half + 1)
    assert (kernels_BKK.double().sum((1, 2)) - 1).abs().max() < 1e-6
    assert (_moments(kernels_BKK)[0] - path_BM2.mean(1)).abs().max() < 1e-5
    assert kernels_BKK[:, 0, -1].min() >= 1 / 30 - 1e-8


def test_a_path_that_leaves_the_kernel_is_refused_unless_unexposed() -> None:
    path_BM2 = torch.tensor([[[0.0, 0.0], [2.5, -1.0]]])
    with pytest.raises(ValueError, match=r"a path reaches 2\.50 px from its centroid: size must be 7 or more, got 5"):
        rasterise(path_BM2, 5)
    hidden = rasterise(path_BM2, 5, torch.tensor([[1.0, 0.0]]))
    assert hidden[0, 2, 2] == 1
    for weights in ([[0.0, 0.0]], [[1.0, -0.5]], [[2.0, 1.0]]):
        with pytest.raises(ValueError, match=r"weights must lie in \[0, 1\]"):
            rasterise(path_BM2, 7, torch.tensor(weights))


def test_two_pixels_share_a_point_between_them() -> None:
    kernel_KK = rasterise(torch.tensor([[[0.25, 1.0]]]), 3)[0]
    assert kernel_KK.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0.75, 0.25]]


@pytest.mark.parametrize("degrees", [0, 17, 45, 80, 90, 123, 211, 340])
def test_a_line_has_the_analytic_extent_orientation_and_variance(degrees: float) -> None:
    """A uniform line of length L has variance L ** 2 / 12 along itself and none across; pixels add at most 1 / 4 to each."""
    length, theta = 20.0, math.radians(degrees)
    motion = Motion(
        kind="linear", angle=(degrees, degrees), parametrise="length", length=(length / 100,) * 2, samples=2000
    )
    kernels_BKK = motion_kernels(motion, _keys(1), 100)
    larger = length * max(abs(math.cos(theta)), abs(math.sin(theta)))
    assert abs(float(kernel_extent(kernels_BKK)) - larger) < 0.1
    values, vectors = torch.linalg.eigh(_moments(kernels_BKK)[1][0])
    along = torch.tensor([math.cos(theta), math.sin(theta)], dtype=torch.float64)
    assert float((vectors[:, 1] @ along).abs()) > math.cos(math.radians(0.5))
    assert 0 <= float(values[1]) - length**2 / 12 * 2001 / 1999 <= 0.25 + 1e-3
    assert -1e-6 <= float(values[0]) <= 0.25


def test_measured_extents_are_the_drawn_ones() -> None:
    """Within the bounds that kernel_extent states."""
    for anxiety, below, above in ((0.0, 0.1, 0.1), (0.003, 0.75, 0.75), (0.01, 0.75, 0.75)):
        motion = Motion(anxiety=(anxiety,), extent=(0.05, 0.25))
        error_B = kernel_extent(motion_kernels(motion, _keys(300), 64)) - draw(motion, _keys(300), 64).size
        assert -below < error_B.min()
        assert error_B.max() < above
        assert abs(float(error_B.mean())) < 0.25


def test_extents_of_points_and_of_kernels_kept_in_8_bits() -> None:
    assert kernel_extent(torch.ones(2, 1, 1)).tolist() == [0, 0]
    assert kernel_extent(embed_kernels(torch.ones(1, 1, 1), 7)).tolist() == [0]
    kernels_BKK = motion_kernels(PRESETS["near_linear"], _keys(50), 128)
    stored_BKK = (kernels_BKK / kernels_BKK.amax((1, 2), keepdim=True) * 255).round()
    assert (kernel_extent(stored_BKK) - kernel_extent(kernels_BKK)).abs().max() < 1
    shifted = torch.nn.functional.pad(kernels_BKK, (5, 1, 0, 6))
    torch.testing.assert_close(kernel_extent(shifted), kernel_extent(kernels_BKK))


def test_disks_and_gaussians_have_their_variances() -> None:
    for name, share in (("disk", 1 / 16), ("gaussian", 1 / 36)):
        motion = replace(PRESETS[name], extent=(0.1, 0.3))
        covariance_B22 = _moments(motion_kernels(motion, _keys(40), 128))[1]
        expected_B = draw(motion, _keys(40), 128).size ** 2 * share
        assert covariance_B22[:, 0, 1].abs().max() < 1e-6
        for axis in (0, 1):
            # A disk's edge fades over a pixel; a Gaussian lacks the 2.7 % beyond three sigma.
            torch.testing.assert_close(covariance_B22[:, axis, axis], expected_B, rtol=0.04, atol=0.1)


def test_no_motion_is_the_point() -> None:
    assert motion_kernels(Motion(kind="none"), _keys(2), 64).tolist() == [[[1.0]], [[1.0]]]
    for name in ("mild", "linear", "disk", "gaussian"):
        kernels_BKK = motion_kernels(replace(PRESETS[name], extent=(0, 0)), _keys(2), 64)
        assert torch.equal(crop_kernels(kernels_BKK), torch.ones(2, 1, 1))


def test_lines_of_albumentations_are_its_own() -> None:
    from albumentations.augmentations.blur.functional import create_motion_kernel

    motion, keys_B = Motion(kind="albumentations", extent=(0.05, 0.25)), _keys(30)
    kernels_BKK, drawn = motion_kernels(motion, keys_B, 64), draw(motion, keys_B, 64)
    for kernel_KK, extent, turn in zip(kernels_BKK, drawn.size, drawn.turn, strict=True):
        size = max(3, 2 * round((float(extent) - 1) / 2) + 1)
        lit = create_motion_kernel(size, float(turn) * 360, 0.0, False, None)
        torch.testing.assert_close(
            kernel_KK, embed_kernels(torch.from_numpy(lit / lit.sum())[None], kernels_BKK.shape[-1])[0]
        )
    assert _moments(kernels_BKK)[0].abs().max() < 1e-4
    assert torch.equal(kernels_BKK[[7, 3]], motion_kernels(motion, keys_B[[7, 3]], 64))


def test_other_keys_have_other_kernels() -> None:
    kernels = [
        motion_kernels(Motion(), key_of(seed, split, torch.arange(2), epoch), 64)
        for seed in (0, 1)
        for split in ("train", "test")
        for epoch in (0, 1)
    ]
    assert len(torch.cat(kernels).flatten(1).unique(dim=0)) == 16


def test_margins_are_cut_and_put_back() -> None:
    kernels_BKK = motion_kernels(PRESETS["training"], _keys(20), 64)
    cropped_BKK = crop_kernels(kernels_BKK)
    assert cropped_BKK.shape[-1] < kernels_BKK.shape[-1]
    assert cropped_BKK.shape[-1] % 2 == 1
    border = torch.cat((cropped_BKK[:, [0, -1]].flatten(), cropped_BKK[:, :, [0, -1]].flatten()))
    assert (border > 0).any()
    assert torch.equal(embed_kernels(cropped_BKK, kernels_BKK.shape[-1]), kernels_BKK)
    assert torch.equal(crop_kernels(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))


def test_a_size_can_be_asked_for() -> None:
    for name in ("mild", "disk", "gaussian", "none", "albumentations"):
        own = motion_kernels(PRESETS[name], _keys(5), 64)
        assert torch.equal(motion_kernels(PRESETS[name], _keys(5), 64, size=41), embed_kernels(own, 41))
        with pytest.raises(ValueError, match="must be odd, so that it has a centre pixel, got 40"):
            motion_kernels(PRESETS[name], _keys(5), 64, size=40)
    for name in ("mild", "disk", "gaussian"):
        with pytest.raises(ValueError, match=r"size must be \d+ or more, got 3"):
            motion_kernels(replace(PRESETS[name], extent=(0.1, 0.15)), _keys(5), 64, size=3)
    with pytest.raises(ValueError, match="kernels of 5 px do not fit into size 3"):
        embed_kernels(torch.ones(1, 5, 5), 3)


def test_no_kernels() -> None:
    for motion in PRESETS.values():
        K = kernel_size(motion, 64)
        assert motion_kernels(motion, _keys(0), 64).shape == (0, K, K)


def test_rasterise_takes_single_precision_and_keeps_no_graph() -> None:
    path_BM2 = normal(_keys(3), 40).view(3, 20, 2).requires_grad_()
    assert not rasterise(path_BM2, 15).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_bits() -> None:
    for name in ("near_linear", "deblurgan", "linear", "disk", "none", "albumentations"):
        on_gpu = motion_kernels(PRESETS[name], _keys(20), 64, device="cuda")
        assert torch.equal(on_gpu.cpu(), motion_kernels(PRESETS[name], _keys(20), 64))
