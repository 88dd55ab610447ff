"""Similarity transforms are recovered exactly, crops hold what was there, and reflections begin where pictures end."""

from __future__ import annotations

import math

import numpy as np
import pytest

from datamodules.face_align import TEMPLATE_52, TooSmall, cut_face, fit_similarity, margin_of, template_points

RNG = np.random.default_rng(0)


def _moved(points: np.ndarray, scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    z = (points @ [1, 1j]) * scale * np.exp(1j * math.radians(degrees)) + complex(x, y)
    return np.stack([z.real, z.imag], -1)


def _smooth_picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + i) * np.cos(y / 19 - i) for i in range(3)]
    return np.round(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize(("scale", "degrees"), [(0.5, 0.0), (1.0, 30.0), (3.0, -170.0)])
def test_a_similarity_is_recovered_exactly(scale: float, degrees: float) -> None:
    points = RNG.normal(size=(5, 2))
    a, b = fit_similarity(points, _moved(points, scale, degrees, 7, -3))
    assert abs(a) == pytest.approx(scale)
    assert a == pytest.approx(scale * np.exp(1j * math.radians(degrees)))
    assert b == pytest.approx(7 - 3j)


def test_it_is_the_least_squares_one_and_never_a_reflection() -> None:
    points, target = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 2))
    z, w = points @ [1, 1j], target @ [1, 1j]
    design = np.block([[z.real[:, None], -z.imag[:, None], np.ones((5, 1)), np.zeros((5, 1))],
                       [z.imag[:, None], z.real[:, None], np.zeros((5, 1)), np.ones((5, 1))]])  # fmt: skip
    p, q, r, s = np.linalg.lstsq(design, np.concatenate([w.real, w.imag]), rcond=None)[0]
    assert fit_similarity(points, target) == (pytest.approx(complex(p, q)), pytest.approx(complex(r, s)))
    mirrored = points * [-1, 1]
    a, b = fit_similarity(points, mirrored)
    assert np.abs(a * z + b - mirrored @ [1, 1j]).max() > 0.1


def test_points_that_do_not_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="fix no similarity"):
        fit_similarity(np.ones((5, 2)), TEMPLATE_52)


def test_the_template_is_symmetric_and_its_eyes_a_quarter_of_the_side_apart() -> None:
    assert np.allclose(TEMPLATE_52[[1, 0, 2, 4, 3]], [1, 0] + TEMPLATE_52 * [-1, 1])
    points = template_points(64)
    assert points[1, 0] - points[0, 0] == 16
    assert np.allclose((points[0] + points[1])[0] / 2, (64 + 2 * margin_of(64) - 1) / 2)  # in the middle of the crop


def test_a_face_that_lies_in_place_is_cut_out_to_the_pixel() -> None:
    picture = _smooth_picture(200, 220)
    crop = cut_face(picture, template_points(64) + np.array([50, 40]), 64)
    assert np.array_equal(crop.pixels_SS3, picture[40:120, 50:130])
    assert np.allclose(crop.points_52, template_points(64))
    assert not crop.reaches_out


@pytest.mark.parametrize(("scale", "degrees"), [(1.7, 0.0), (1.0, 25.0), (2.3, -40.0)])
def test_a_turned_and_larger_face_comes_to_the_template(scale: float, degrees: float) -> None:
    picture = _smooth_picture(700, 700)
    points = _moved(template_points(64) - 39.5, scale, degrees, 350, 340)
    crop = cut_face(picture, points, 64)
    assert np.allclose(crop.points_52, template_points(64))
    rows, columns = np.mgrid[4:76:3, 4:76:3]
    found = crop.pixels_SS3[rows, columns].reshape(-1, 3).astype(float)

    def error(x: float, y: float) -> float:
        where = _moved(np.stack([columns + x, rows + y], -1).reshape(-1, 2) - 39.5, scale, degrees, 350, 340)
        expected = [[np.sin(x / 17 + i) * np.cos(y / 19 - i) for i in range(3)] for x, y in where]
        return np.abs(found - (127.5 + 120 * np.array(expected))).max()

    assert error(0, 0) < 2.5
    assert error(0, 0) < min(
        error(x, y) for x in (-0.1, 0, 0.1) for y in (-0.1, 0, 0.1) if x or y
    )  # a tenth of a pixel off


def test_beyond_its_edges_a_picture_goes_on_as_its_reflection() -> None:
    picture = _smooth_picture(90, 90)
    crop = cut_face(picture, template_points(64) + np.array([-20, 30]), 64)
    assert crop.reaches_out
    expected = np.pad(picture, [(0, 60), (60, 0), (0, 0)], mode="reflect")[30:110, 40:120]
    assert np.array_equal(crop.pixels_SS3, expected)


def test_a_margin_alone_may_lie_beyond_the_picture() -> None:
    picture = _smooth_picture(100, 100)
    assert not cut_face(picture, template_points(64) - 8, 64).reaches_out  # the margin is 8 pixels
    assert cut_face(picture, template_points(64) - 9, 64).reaches_out


def test_a_picture_much_smaller_than_its_crop_is_reflected_again_and_again() -> None:
    assert cut_face(_smooth_picture(30, 25), template_points(64) - 30, 64).pixels_SS3.shape == (80, 80, 3)


def test_a_face_that_would_have_to_be_enlarged_is_too_small() -> None:
    with pytest.raises(TooSmall, match=r"enlarged 2.00 times to fill a crop of 64 pixels"):
        cut_face(_smooth_picture(200, 200), template_points(64) / 2 + 60, 64)


def test_shrinking_keeps_no_patterns_of_detail_too_fine_to_show() -> None:
    y, x = np.mgrid[:640, :640]
    stripes = np.repeat(255 * ((x + y) % 2)[..., None], 3, -1).astype(np.uint8)
    crop = cut_face(stripes, (template_points(64) - 39.5) * 5.3 + 320, 64)
    assert np.abs(crop.pixels_SS3.astype(int) - 127.5).max() < 4
