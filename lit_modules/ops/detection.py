"""Detected faces against those of the sharp image: boxes, matching, landmarks, and the indicators made of them.

Legend: F faces of an image, B images, N and M boxes. Boxes are (x0, y0, x1, y1) and points (x, y), in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = (0.7, 0.9, 0.99)  # of the probability: MTCNN's own, and two stricter ones
SAME_FACE_IOU = 0.5
ELSEWHERE_IOU = 0.3


@dataclass(frozen=True)
class Faces:
    """The faces found in one image: boxes (F, 4), probabilities (F,) and five points each (F, 5, 2), float32."""

    boxes_F4: Tensor
    probs_F: Tensor
    points_F52: Tensor

    def __len__(self) -> int:
        """Return F."""
        return len(self.probs_F)


def no_faces() -> Faces:
    """Return the answer for an image without a face."""
    return Faces(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5, 2))


class FaceScores(NamedTuple):
    """How the faces found in B images compare with those of their sharp versions; a row per image.

    counted: whether the sharp version has a face; the other columns of a row that does not count are NaN.
    prob, iou: of the matched face, 0 where the face was missed.
    landmark_error: of the matched face, in distances between the eyes; NaN where it was missed.
    false_positives: boxes elsewhere.
    """

    counted_B: Tensor
    prob_B: Tensor
    iou_B: Tensor
    landmark_error_B: Tensor
    false_positives_B: Tensor


def box_iou(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """Return intersection over union of every box with every other one (N, M); 0 where a box has no area."""
    low_NM2 = torch.maximum(boxes_N4[:, None, :2], others_M4[None, :, :2])
    high_NM2 = torch.minimum(boxes_N4[:, None, 2:], others_M4[None, :, 2:])
    both_NM = (high_NM2 - low_NM2).clamp(min=0).prod(-1)
    union_NM = _area(boxes_N4)[:, None] + _area(others_M4)[None] - both_NM
    return torch.where(union_NM > 0, both_NM / union_NM, torch.zeros_like(both_NM))


def _area(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, 2:] - boxes_N4[:, :2]).clamp(min=0).prod(-1)


def match(found: Faces, box_4: Tensor, iou: float = SAME_FACE_IOU) -> int | None:
    """Return which of the faces found is the one in `box_4`: of those whose boxes overlap it by `iou`, the most probable.

    None where the face was missed.
    """
    if len(found) == 0:
        return None
    probs_F = found.probs_F.masked_fill(box_iou(found.boxes_F4, box_4[None])[:, 0] < iou, -1)
    best = int(probs_F.argmax())
    return best if probs_F[best] >= 0 else None


def landmark_error(points_52: Tensor, reference_52: Tensor) -> float:
    """Return the mean distance of five points from their references, in units of the distance between the reference's eyes.

    Raises:
        ValueError: the reference's eyes lie in one place.
    """
    eyes = torch.dist(reference_52[0], reference_52[1])
    if not eyes > 0:
        raise ValueError(f"the eyes of the reference lie in one place: {reference_52[0].tolist()}")
    return float((points_52 - reference_52).norm(dim=-1).mean() / eyes)


def score_faces(found: Sequence[Faces], sharp: Sequence[Faces]) -> FaceScores:
    """Compare the faces found in each image with the most probable face of its sharp version.

    Args:
        found: one entry per image, the most probable face first.
        sharp: those of the sharp versions.
    Raises:
        ValueError: not as many of one as of the other.
    """
    if len(found) != len(sharp):
        raise ValueError(f"faces of {len(found)} images cannot be compared with those of {len(sharp)} sharp ones")
    rows = [_score(ours, theirs) for ours, theirs in zip(found, sharp, strict=True)]
    table_B4 = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    counted_B = torch.tensor([len(theirs) > 0 for theirs in sharp], dtype=torch.bool)
    return FaceScores(counted_B, *table_B4.unbind(-1))


def _score(found: Faces, sharp: Faces) -> tuple[float, float, float, float]:
    """(probability, IoU, landmark error, false positives) of one image."""
    nan = float("nan")
    if len(sharp) == 0:
        return nan, nan, nan, nan
    box_4 = sharp.boxes_F4[0]
    iou_F = box_iou(found.boxes_F4, box_4[None])[:, 0]
    elsewhere = float((iou_F < ELSEWHERE_IOU).sum())
    best = match(found, box_4)
    if best is None:
        return 0.0, 0.0, nan, elsewhere
    error = landmark_error(found.points_F52[best], sharp.points_F52[0])
    return float(found.probs_F[best]), float(iou_F[best]), error, elsewhere


def join_scores(parts: Sequence[FaceScores]) -> FaceScores:
    """Return the rows of several batches as one table."""
    if not parts:
        return score_faces([], [])
    return FaceScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def indicators(scores: FaceScores, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, float | None]:
    """Return the means over the images that count.

    Args:
        scores: rows of images.
        thresholds: of the probability, for the detection rates.
    Returns:
        `detected_<t>`: share of faces found again with a probability of at least t and an IoU of at least 0.5;
        `prob`, `iou`: means of the matched face's, 0 where it was missed;
        `landmark_error`: mean over the matched faces alone, and `landmark_n`, how many they are;
        `false_positives`: boxes per image whose IoU with the face is below 0.3;
        `n`: images that count. A mean over nothing is None.
    Raises:
        ValueError: a threshold outside (0, 1].
    Source: our choice; which indicators arXiv 2103.02121 uses is unknown.
    """
    if any(not 0 < t <= 1 for t in thresholds):
        raise ValueError(f"thresholds of a probability must lie in (0, 1], got {list(thresholds)}")
    prob, iou, error, elsewhere = (column[scores.counted_B] for column in scores[1:])
    matched = error[~error.isnan()]
    rates = {f"detected_{t:g}": _mean((prob >= t).double()) for t in thresholds}
    means = {
        "prob": _mean(prob),
        "iou": _mean(iou),
        "landmark_error": _mean(matched),
        "false_positives": _mean(elsewhere),
    }
    return rates | means | {"landmark_n": float(len(matched)), "n": float(len(prob))}


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def recovery(sharp: float | None, blurred: float | None, restored: float | None) -> float | None:
    """Return how much of what the blur took the restoration gives back: (restored - blurred) / (sharp - blurred).

    None where a value is missing or the blur took nothing.
    """
    if sharp is None or blurred is None or restored is None or sharp == blurred:
        return None
    return (restored - blurred) / (sharp - blurred)
