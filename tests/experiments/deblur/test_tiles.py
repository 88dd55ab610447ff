"""Tiles: what they cover, that their weights add up to 1, and that no one can see where they met."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from experiments.deblur.tiles import _ramp, as_floats, as_values, check_tiles, restore_in_tiles, restore_whole, spans


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(reach: int):
    """A net that sees `reach` pixels around: the mean of them, reflected at the border."""

    def restore(x_HWC: np.ndarray) -> np.ndarray:
        x_CHW = torch.from_numpy(x_HWC).permute(2, 0, 1)[:, None]
        padded = F.pad(x_CHW, (reach,) * 4, mode="reflect")
        return F.avg_pool2d(padded, 2 * reach + 1, stride=1)[:, 0].permute(1, 2, 0).numpy()

    return restore


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 900), tile=st.integers(64, 200), share=st.floats(0, 0.5))
def test_tiles_cover_a_side_and_weigh_1_everywhere(length: int, tile: int, share: float) -> None:
    overlap = int(share * tile) // 32 * 32
    found = spans(length, tile, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    total = np.zeros(length)
    for i, (start, end) in enumerate(found):
        assert 0 < end - start <= -(-tile // 32) * 32
        assert start % 32 == 0
        total[start:end] += _ramp(found, i)
    np.testing.assert_allclose(total, 1, rtol=0, atol=2e-7)
    assert all(a[1] - b[0] == overlap for a, b in pairwise(found))


@pytest.mark.parametrize("shape", [(200, 300), (64, 64), (97, 511), (1, 130), (300, 1)])
def test_a_net_that_sees_a_quarter_of_the_overlap_leaves_no_seam(shape: tuple[int, int]) -> None:
    image, net = noise(*shape), smooth(16) if min(shape) > 16 else smooth(0)
    tiled = restore_whole(image, net, tile=128, overlap=64)
    np.testing.assert_allclose(tiled, net(as_floats(image)), rtol=0, atol=1e-6)


def test_one_that_sees_farther_does_without_the_quarter() -> None:
    """So the bound above is no accident of the picture."""
    image, net = noise(90, 200), smooth(24)
    off = np.abs(restore_whole(image, net, 128, 64) - net(as_floats(image)))
    assert off.max() > 1e-5


def test_a_net_that_differs_from_tile_to_tile_changes_without_a_step() -> None:
    image = np.full((300, 300, 1), 128, np.uint8)
    answers = iter(np.linspace(0, 1, 100, dtype=np.float32))
    out = restore_whole(image, lambda x: np.full_like(x, next(answers)), 128, 64)
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
    assert [top for top, _ in strips] == [0, 64, 128, 192, 256, 320, 384]
    assert max(len(strip) for _, strip in strips) <= 128
    assert sum(len(strip) for _, strip in strips) == 500
    assert sum(ticks) == pytest.approx(1)


@pytest.mark.parametrize(
    ("tile", "overlap", "why"), [(63, 0, "at least 64"), (128, 65, "half a tile"), (128, -1, "got -1")]
)
def test_impossible_tiles_are_refused(tile: int, overlap: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_tiles(tile, overlap)
