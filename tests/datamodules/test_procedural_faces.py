"""Drawn faces: the same for everyone, different from each other, aligned, and found by MTCNN in nearly every case."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.face_align import margin_of, template_points
from datamodules.face_detector import detect_faces
from datamodules.procedural_faces import STREAMS, draw_face

SIZE, N = 64, 40


@pytest.fixture(scope="module")
def faces() -> list:
    return [draw_face("val", index, SIZE) for index in range(N)]


def test_a_face_is_a_function_of_split_and_index(faces: list) -> None:
    again = draw_face("val", 3, SIZE)
    assert np.array_equal(again.pixels_HW3, faces[3].pixels_HW3)
    assert np.array_equal(again.points_52, faces[3].points_52)
    pictures = {draw_face(split, index, 16).pixels_HW3.tobytes() for split in STREAMS for index in range(4)}
    assert len(pictures) == 12


def test_it_draws_from_no_global_generator() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    draw_face("train", 0, 16)
    assert np.array_equal(np.random.get_state()[1], before)


def test_another_size_shows_the_same_face(faces: list) -> None:
    large = draw_face("val", 5, 2 * SIZE)
    halved = large.pixels_HW3.reshape(80, 2, 80, 2, 3).mean((1, 3))
    assert np.abs(halved - faces[5].pixels_HW3).mean() < 6  # of 255; noise and edges differ
    assert np.allclose((large.points_52 + 0.5) / 2, faces[5].points_52 + 0.5)


def test_faces_are_aligned_but_not_rigidly(faces: list) -> None:
    points = np.stack([face.points_52 for face in faces]) - template_points(SIZE)
    assert np.abs(points.mean(0)).max() < 0.1 * SIZE / 4  # of the distance between the eyes
    assert points.std(0).min() > 0.2
    assert np.abs(points).max() < 0.4 * SIZE / 4


def test_faces_are_many_coloured_and_use_the_whole_range(faces: list) -> None:
    pixels = np.stack([face.pixels_HW3 for face in faces])
    assert pixels.shape == (N, 80, 80, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std((1, 2, 3)).min() > 15
    cheeks = pixels[:, 40:44, 30:34].mean((1, 2))
    assert cheeks.max() - cheeks.min() > 100
    assert np.corrcoef(pixels.reshape(N, -1))[np.triu_indices(N, 1)].mean() < 0.75


def test_mtcnn_finds_one_face_in_nearly_every_one(faces: list) -> None:
    cut = slice(margin_of(SIZE), margin_of(SIZE) + SIZE)
    pictures = torch.from_numpy(np.stack([face.pixels_HW3[cut, cut] for face in faces])).permute(0, 3, 1, 2)
    found = detect_faces(pictures.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert [len(one) for one in found].count(1) >= 0.95 * N
    assert sum(len(one) > 0 and float(one.probs_F[0]) > 0.9 for one in found) >= 0.95 * N


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(KeyError, match="valid"):
        draw_face("valid", 0, 64)
