"""Faces are brought to where training faces lie, and what is put back lies where they were."""

from __future__ import annotations

import numpy as np
import pytest
from deblur import making

from datamodules.face_align import TEMPLATE_52, cut_face, fit_similarity, margin_of, template_points
from experiments.deblur.faces import Square, cut, feather, find_faces, restore_face, side_in_photograph, square_of
from experiments.deblur.warping import warp


def points_at(eyes: float, turn: float = 0.0, middle: complex = 150 + 140j) -> np.ndarray:
    """A face of the template's shape with its eyes so many pixels apart, turned by so many degrees."""
    z = (TEMPLATE_52 - TEMPLATE_52.mean(0)) @ [1, 1j] * 4 * eyes
    z = z * np.exp(1j * np.radians(turn)) + middle
    return np.stack([z.real, z.imag], -1)


def smooth_scene(height: int = 300, width: int = 280) -> np.ndarray:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(x / 9 + k) * np.cos(y / 12 - k) for k in range(3)]
    return (0.5 + 0.4 * np.stack(waves, -1)).astype(np.float32)


@pytest.mark.parametrize(
    ("eyes", "largest", "side"),
    [(4, 1, 64), (16, 1, 64), (100, 1, 64), (4, 2, 64), (17, 2, 68), (32, 2, 128), (100, 2, 128), (100, 99, 400)],
)
def test_the_rule_of_the_square_s_side(eyes: float, largest: float, side: int) -> None:
    """The generator's 64 pixels, or those of a larger face up to `largest` times as many; eyes are a quarter of it apart."""
    points = points_at(eyes, turn=20)
    square = square_of(points, 64, largest)
    assert square.side == side
    assert side_in_photograph(points) == pytest.approx(4 * eyes)
    w = (points @ [1, 1j] - square.b) / square.a
    np.testing.assert_allclose(np.stack([w.real, w.imag], -1), TEMPLATE_52 * side - 0.5, atol=1e-9)


def test_the_square_is_the_crop_that_training_faces_are_without_its_margins() -> None:
    picture = making.astronaut()
    points = find_faces(picture).points_F52[0].double().numpy()
    crop, margin = cut_face(picture, points, 64), margin_of(64)
    theirs = crop.pixels_SS3[margin:-margin, margin:-margin] / 255
    ours = cut(picture, square_of(points, 64))
    assert ours.shape == (64, 64, 3)
    assert np.abs(ours - theirs).mean() < 0.02  # theirs is shrunk by a sharper filter, that of Lanczos
    shifted = cut(picture, square_of(points + 2, 64))
    assert np.abs(ours - theirs).mean() < 0.3 * np.abs(shifted - theirs).mean()
    a, _ = fit_similarity(points, template_points(64))
    assert square_of(points, 64).a == pytest.approx(1 / a)


def test_what_is_cut_and_put_back_is_where_it_was() -> None:
    source, square = smooth_scene(), square_of(points_at(24, turn=30), 96)
    crop = cut(source, square)
    back = warp(crop, 1 / square.a, -square.b / square.a, *source.shape[:2])
    mask = feather(square, 0, 300, 0, 280)
    assert (mask > 0).sum() == pytest.approx(96**2, rel=0.05)
    assert np.abs(back - source)[mask == 1].max() < 5e-3


def test_beyond_the_photograph_the_square_is_its_reflection() -> None:
    source = smooth_scene()
    square = square_of(points_at(24, middle=20 + 140j), 64)
    wide = np.pad(source, [(0, 0), (100, 0), (0, 0)], mode="symmetric")
    there = Square(square.a, square.b + 100, square.side)
    np.testing.assert_allclose(
        cut(source, square), cut(wide, there), atol=5e-3
    )  # the filter that shrinks ends at the edge


@pytest.mark.parametrize(("eyes", "turn"), [(9, 0), (20, 17), (60, -100)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_generator_that_changes_nothing_changes_no_bit(eyes: float, turn: float, dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (300, 280, 3)).astype(dtype)
    output = image.copy()
    restore_face(image, output, square_of(points_at(eyes, turn), 64), lambda x: x, 1.0)
    assert (output == image).all()


def test_outside_the_square_no_bit_changes_and_the_step_at_its_edge_is_smooth() -> None:
    image = np.full((300, 280, 1), 100, np.uint8)
    output, square = image.copy(), square_of(points_at(24, 15), 64)
    before, after = restore_face(image, output, square, lambda x: x + 0.25, 1.0)
    mask = feather(square, 0, 300, 0, 280)
    assert (output[mask == 0] == 100).all()
    assert (output[mask == 1] == 164).all()  # 100 + 255 / 4, rounded
    np.testing.assert_allclose(output[..., 0], 100 + 63.75 * mask, atol=0.51)
    steps = max(np.abs(np.diff(output[..., 0].astype(int), axis=axis)).max() for axis in (0, 1))
    assert steps <= 1.5 * 1.5 * 64 / 12  # a smooth step over an eighth of 96 pixels, across both of its axes
    np.testing.assert_allclose(after - before, 0.25, atol=1e-6)


def test_strength_is_the_share_of_the_change() -> None:
    image = np.full((300, 280, 3), 100, np.uint8)
    for strength in (0.0, 0.4):
        output = image.copy()
        restore_face(image, output, square_of(points_at(24), 64), lambda x: x + 0.2, strength)
        assert output[140, 150].tolist() == [100 + round(51 * strength)] * 3
        assert (output != image).any() == (strength > 0)


def test_of_two_faces_that_overlap_neither_is_changed_twice() -> None:
    image = np.full((300, 280, 1), 100, np.uint8)
    output = image.copy()
    for middle in (130 + 140j, 160 + 150j):
        restore_face(image, output, square_of(points_at(24, middle=middle), 64), lambda x: x + 0.25, 1.0)
    assert output.max() == 164


def test_mtcnn_s_faces_are_in_the_photograph_s_pixels() -> None:
    """A photograph twice as large has its face at twice the coordinates, in grey and with 16 bits too."""
    picture = making.astronaut()
    large = np.repeat(np.repeat(picture, 5, 0), 5, 1)  # beyond what is searched at once
    deep = picture.mean(-1, keepdims=True).round().astype(np.uint16) * 257
    for pixels, scale in ((picture, 1), (large, 5), (deep, 1)):
        faces = find_faces(pixels)
        assert len(faces) == 1
        box = (faces.boxes_F4[0].numpy() + 0.5) / scale - 0.5
        np.testing.assert_allclose(box, making.FACE, atol=4)
        assert box[0] < ((faces.points_F52[0, :, 0] + 0.5) / scale - 0.5).min()
    assert len(find_faces(making.scene())) == 0
    assert len(find_faces(np.zeros((1, 500, 3), np.uint8))) == 0
