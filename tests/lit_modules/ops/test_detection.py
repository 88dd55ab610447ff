"""Boxes, matching and landmarks by hand-made cases, and the indicators' arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from lit_modules.ops.detection import (
    Faces,
    box_iou,
    indicators,
    join_scores,
    landmark_error,
    match,
    no_faces,
    recovery,
    score_faces,
)

POINTS = torch.tensor([[30.0, 40.0], [70.0, 40.0], [50.0, 60.0], [35.0, 80.0], [65.0, 80.0]])  # eyes 40 px apart
BOX = [20.0, 20.0, 80.0, 100.0]


def _faces(*rows: tuple[list[float], float], shift: float = 0.0) -> Faces:
    boxes = torch.tensor([box for box, _ in rows]).reshape(-1, 4)
    points = (POINTS + torch.tensor([shift, 0.0])).expand(len(rows), 5, 2)
    return Faces(boxes, torch.tensor([prob for _, prob in rows]), points)


def test_iou_is_exact_on_boxes_made_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30], [3, 3, 3, 9]])
    iou = box_iou(boxes, boxes)
    assert iou[0, 0] == 1
    assert iou[0, 1] == pytest.approx(25 / 175)
    assert iou[0, 2] == 0
    assert iou[3].tolist() == [0, 0, 0, 0]  # a box without area overlaps nothing, not even itself
    assert torch.equal(iou, iou.T)


def test_iou_agrees_with_counting_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 40, (30, 2, 2), generator=generator).sort(1).values
    boxes = corners.reshape(30, 4).float()
    grid = torch.zeros(30, 40, 40, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(grid, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    both = (grid[:, None] & grid[None]).sum((2, 3)).double()
    either = (grid[:, None] | grid[None]).sum((2, 3)).double()
    expected = torch.where(either > 0, both / either, 0.0)
    assert torch.allclose(box_iou(boxes, boxes).double(), expected, atol=1e-7)


def test_iou_does_not_change_when_boxes_move_or_grow_together() -> None:
    a, b = torch.tensor([BOX]), torch.tensor([[30.0, 10.0, 90.0, 95.0]])
    assert torch.allclose(box_iou(a, b), box_iou(3 * a - 7, 3 * b - 7))


def test_the_match_is_the_most_probable_box_that_overlaps_enough() -> None:
    near, nearer, far = [22.0, 22.0, 82.0, 102.0], [20.0, 20.0, 80.0, 99.0], [200.0, 20.0, 260.0, 100.0]
    found = _faces((far, 0.999), (near, 0.95), (nearer, 0.9))
    assert match(found, torch.tensor(BOX)) == 1
    assert match(_faces((far, 0.999)), torch.tensor(BOX)) is None
    assert match(no_faces(), torch.tensor(BOX)) is None


def test_the_overlap_that_counts_begins_at_one_half() -> None:
    box = torch.tensor([0.0, 0.0, 10.0, 10.0])
    assert match(_faces(([0.0, 0.0, 10.0, 5.0], 0.8)), box) == 0  # IoU of exactly 0.5
    assert match(_faces(([0.0, 0.0, 10.0, 4.9], 0.8)), box) is None


def test_landmark_error_is_in_distances_between_the_eyes() -> None:
    assert landmark_error(POINTS, POINTS) == 0
    assert landmark_error(POINTS + torch.tensor([3.0, 4.0]), POINTS) == pytest.approx(5 / 40)
    one_off = POINTS.clone()
    one_off[2, 0] += 10
    assert landmark_error(one_off, POINTS) == pytest.approx(10 / 40 / 5)
    assert landmark_error(7 * POINTS + 1, 7 * POINTS) == pytest.approx(landmark_error(POINTS + 1 / 7, POINTS), rel=1e-4)
    with pytest.raises(ValueError, match=r"eyes of the reference lie in one place: \[30.0, 40.0\]"):
        landmark_error(POINTS, POINTS[[0, 0, 2, 3, 4]])


def test_scores_and_indicators_of_five_images() -> None:
    elsewhere = [150.0, 20.0, 200.0, 90.0]
    sharp = [_faces((BOX, 1.0)), _faces((BOX, 1.0)), _faces((BOX, 1.0)), no_faces(), _faces((BOX, 0.98))]
    found = [
        _faces((BOX, 0.95), shift=4),  # found
        _faces((elsewhere, 0.9), (BOX, 0.8), shift=8),  # found, and another
        no_faces(),  # missed
        _faces((BOX, 0.99)),  # does not count: the sharp image has no face
        _faces((elsewhere, 0.9), (elsewhere, 0.8)),  # missed, with two others
    ]
    scores = score_faces(found, sharp)
    assert scores.counted_B.tolist() == [True, True, True, False, True]
    assert scores.prob_B[[0, 1, 2, 4]].tolist() == pytest.approx([0.95, 0.8, 0, 0])
    assert all(column[3].isnan() for column in scores[1:])
    assert indicators(scores) == pytest.approx(
        {
            "detected_0.7": 2 / 4,
            "detected_0.9": 1 / 4,
            "detected_0.99": 0,
            "prob": (0.95 + 0.8) / 4,
            "iou": 2 / 4,
            "landmark_error": (4 + 8) / 2 / 40,
            "false_positives": 3 / 4,
            "landmark_n": 2,
            "n": 4,
        }
    )


def test_a_box_beside_the_face_is_neither_a_match_nor_a_false_positive() -> None:
    beside = [20.0, 20.0, 80.0, 52.0]  # IoU 0.4
    scores = score_faces([_faces((beside, 0.9))], [_faces((BOX, 1.0))])
    assert (scores.prob_B.item(), scores.iou_B.item(), scores.false_positives_B.item()) == (0, 0, 0)
    assert math.isnan(scores.landmark_error_B.item())


def test_sharp_images_against_themselves_are_the_ceiling() -> None:
    sharp = [_faces((BOX, 0.97)), _faces((BOX, 0.999))]
    values = indicators(score_faces(sharp, sharp))
    assert (values["detected_0.7"], values["iou"], values["landmark_error"]) == (1, 1, 0)
    assert values["detected_0.99"] == 0.5


def test_a_mean_over_nothing_is_missing_not_zero() -> None:
    values = indicators(score_faces([no_faces()], [no_faces()]))
    assert (values["n"], values["landmark_n"]) == (0, 0)
    missing = ("detected_0.7", "prob", "iou", "landmark_error", "false_positives")
    assert [values[name] for name in missing] == [None] * 5
    all_missed = indicators(score_faces([no_faces()], [_faces((BOX, 1.0))]))
    assert (all_missed["detected_0.7"], all_missed["landmark_error"]) == (0, None)


def test_batches_join_to_the_same_table() -> None:
    sharp = [_faces((BOX, 1.0)), no_faces(), _faces((BOX, 1.0))]
    found = [_faces((BOX, 0.9)), no_faces(), no_faces()]
    whole = score_faces(found, sharp)
    joined = join_scores([score_faces(found[:1], sharp[:1]), score_faces(found[1:], sharp[1:])])
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(whole, joined, strict=True))
    assert len(join_scores([]).counted_B) == 0


def test_recovery_is_the_share_given_back() -> None:
    assert recovery(1.0, 0.2, 0.6) == pytest.approx(0.5)
    assert recovery(1.0, 0.2, 0.1) == pytest.approx(-0.125)
    assert recovery(0.0, 0.3, 0.15) == pytest.approx(0.5)  # of an error, which is lower on sharp images
    assert recovery(1.0, 1.0, 1.0) is None
    assert recovery(None, 0.2, 0.6) is None


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="faces of 1 images cannot be compared with those of 2"):
        score_faces([no_faces()], [no_faces()] * 2)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got \[0\.0\]"):
        indicators(score_faces([], []), thresholds=[0.0])
