"""Tiles: what they cover, that their weights add up to 1, and that no one can see where they met."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from experiments.deblur.tiles import (
    as_floats,
    as_values,
    restore_in_tiles,
    restore_whole,
    rounded_tiles,
    spans,
    window_weights,
)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(reach: int):
    """A net that sees `reach` pixels around: the mean of them, reflected at the border."""

    def restore(x_BHWC: np.ndarray) -> np.ndarray:
        x_BCHW = torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)
        padded = F.pad(x_BCHW, (reach,) * 4, mode="reflect")
        return F.avg_pool2d(padded, 2 * reach + 1, stride=1).permute(0, 2, 3, 1).numpy()

    return restore


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 900), tile=st.integers(64, 200), share=st.floats(0, 0.5))
def test_tiles_cover_a_side_are_of_one_size_and_weigh_1_everywhere(length: int, tile: int, share: float) -> None:
    tile, overlap = rounded_tiles(tile, int(share * tile) // 32 * 32)
    found = spans(length, tile, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert {end - start for start, end in found} == {min(tile, length)}
    assert all(start % 32 == 0 for start, _ in found[:-1])
    assert all(a[1] - b[0] >= overlap for a, b in pairwise(found))
    total = np.zeros(length)
    for (start, end), weight in zip(found, window_weights(found, overlap), strict=True):
        total[start:end] += weight
        assert start == 0 or overlap == 0 or (weight[: overlap // 4] < 0.1).all()
    np.testing.assert_allclose(total, 1, rtol=0, atol=3e-7)


@pytest.mark.parametrize("shape", [(200, 300), (64, 64), (97, 311), (1, 130), (300, 1)])
def test_a_net_that_sees_a_quarter_of_the_overlap_leaves_no_seam(shape: tuple[int, int]) -> None:
    image, net = noise(*shape), smooth(16) if min(shape) > 16 else smooth(0)
    tiled = restore_whole(image, net, tile=128, overlap=64)
    np.testing.assert_allclose(tiled, net(as_floats(image)[None])[0], rtol=0, atol=1e-6)


def test_one_that_sees_farther_does_without_the_quarter() -> None:
    """So the bound above is no accident of the picture."""
    image, net = noise(90, 200), smooth(24)
    off = np.abs(restore_whole(image, net, 128, 64) - net(as_floats(image)[None])[0])
    assert off.max() > 1e-5


def test_a_net_that_differs_from_tile_to_tile_changes_without_a_step() -> None:
    image = np.full((320, 320, 1), 128, np.uint8)
    answers = iter(np.linspace(0, 1, 100, dtype=np.float32))

    def restore(x_BHWC: np.ndarray) -> np.ndarray:
        return np.stack([np.full_like(x_HWC, next(answers)) for x_HWC in x_BHWC])

    out = restore_whole(image, restore, 128, 64)
    steps = max(np.abs(np.diff(out, axis=axis)).max() for axis in (0, 1))
    assert steps < 1.01 * 4 / 99 / 32  # the next row of tiles answers four later, over a ramp of 32 pixels
    assert np.ptp(out) == pytest.approx(15 / 99)


def test_the_identity_is_exact_in_whole_numbers() -> None:
    for dtype in (np.uint8, np.uint16):
        image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (210, 330, 3)).astype(dtype)
        assert (as_values(restore_whole(image, lambda x: x, 96, 32), image.dtype) == image).all()
        assert (as_values(as_floats(image), image.dtype) == image).all()


def test_no_more_than_a_strip_is_held_and_ticks_add_up_to_1() -> None:
    ticks: list[float] = []
    strips = list(restore_in_tiles(noise(500, 150), lambda x: x, 128, 64, ticks.append))
    assert [top for top, _ in strips] == [0, 64, 128, 192, 256, 320, 372]
    assert max(len(strip) for _, strip in strips) <= 128
    assert sum(len(strip) for _, strip in strips) == 500
    assert sum(ticks) == pytest.approx(1)


def test_tiles_are_rounded_up_and_impossible_ones_refused() -> None:
    assert rounded_tiles(64, None) == (64, 32)
    assert rounded_tiles(100, None) == (128, 64)
    assert rounded_tiles(100, 10) == (128, 32)
    assert rounded_tiles(96, None) == (96, 32)
    for tile, overlap, why in ((63, 0, "at least 64"), (128, 65, "half a tile of 128"), (128, -1, "got -1")):
        with pytest.raises(ValueError, match=why):
            rounded_tiles(tile, overlap)
