"""Pictures go where they are sent, and come back at their size."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.deblur.warping import enlarge_rows, shrink, warp


def smooth_scene(height: int = 300, width: int = 280) -> np.ndarray:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(x / 9 + k) * np.cos(y / 12 - k) for k in range(3)]
    return (0.5 + 0.4 * np.stack(waves, -1)).astype(np.float32)


def test_warp_moves_turns_and_scales_what_it_should() -> None:
    source = smooth_scene()
    np.testing.assert_allclose(warp(source, 1, 0, *source.shape[:2]), source, atol=1e-5)
    np.testing.assert_allclose(warp(source, 1, 7 + 3j, 50, 60), source[3:53, 7:67], atol=1e-5)
    turned = warp(source, 1j, 39, 40, 30)  # from x to y, and from y to 39 - x
    np.testing.assert_allclose(turned, np.rot90(source[:30, :40]), atol=1e-5)
    shrunk = warp(source, 2, 0.5 + 0.5j, 150, 140)
    np.testing.assert_allclose(shrunk, source.reshape(150, 2, 140, 2, 3).mean((1, 3)), atol=0.01)


def test_a_pattern_too_fine_for_the_shrunk_picture_turns_to_grey_and_into_no_other_pattern() -> None:
    stripes = np.zeros((90, 90, 1), np.float32)
    stripes[:, ::2] = 1
    assert np.abs(warp(stripes, 3, 1 + 1j, 30, 30) - 0.5)[2:-2, 2:-2].max() < 0.1


@pytest.mark.parametrize("factor", [1.3, 2.0, 4.37])
def test_shrinking_in_strips_is_shrinking_at_once_and_enlarging_undoes_it(factor: float) -> None:
    source = smooth_scene(700, 90)
    small = shrink(source, factor)
    assert small.shape == (round(700 / factor), round(90 / factor), 3)
    back = np.concatenate([enlarge_rows(small, factor, top, min(700, top + 128), 90) for top in range(0, 700, 128)])
    assert back.shape == source.shape
    inside = np.s_[10:-10, 10:-10]
    assert np.abs(back - source)[inside].max() < 0.05
    centre = np.abs(np.fft.fft(back[inside][..., 0].mean(1)) * np.fft.fft(source[inside][..., 0].mean(1)).conj())
    assert centre.argmax() == np.abs(np.fft.fft(source[inside][..., 0].mean(1))).argmax()


def test_zeros_stay_zeros_at_any_scale() -> None:
    assert not enlarge_rows(np.zeros((20, 20, 3), np.float32), 3.7, 5, 50, 74).any()
