"""The judge of paper 2: does MTCNN find in a restored face what it finds in the sharp one?

Legend: B images, H height, W width.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from datamodules.face_cache import kept
from datamodules.face_detector import as_bytes, detect_faces, enlarge
from lit_modules.ops.detection import Faces, FaceScores, score_faces

PARTS = ("counts", "boxes", "probs", "points")  # of what is kept: faces per image, and theirs one after another


class FaceJudge:
    """Finds faces with MTCNN and compares them with those of the sharp versions.

    Images whose shorter side is below `side` are enlarged to it, bilinearly and after rounding to 8 bits, as a viewer would
    enlarge a saved picture: MTCNN was made for faces of more pixels than a crop of 64 has. What is found is in the pixels of
    the image as it was given. Not a module: its nets are nobody's parameters and enter no checkpoint.

    Args:
        side: in pixels.
        chunk: images at a time.
    Raises:
        ValueError: a side in which MTCNN could find nothing.
    """

    def __init__(self, side: int = 128, chunk: int = 64) -> None:
        if side < 40:
            raise ValueError(f"side must be at least 40 pixels, twice MTCNN's smallest face, got {side}")
        self.side, self.chunk = side, chunk
        self._sharp: dict[bytes, Faces] = {}

    def detect(self, images_BCHW: Tensor) -> list[Faces]:
        """Return the faces of each image, the most probable first, on the CPU.

        Args:
            images_BCHW: RGB (B, 3, H, W), uint8, or floating in [0, 1], on any device.
        Raises:
            ValueError: images of another layout, type or range, or with values that are not finite.
        """
        bytes_BCHW = as_bytes(images_BCHW)
        if not len(bytes_BCHW):
            return []
        larger_BCHW, scale = enlarge(bytes_BCHW, self.side)
        return [_shrunk(faces, scale) for faces in detect_faces(larger_BCHW, chunk=self.chunk)]

    def detect_sharp(self, images_BCHW: Tensor) -> list[Faces]:
        """Return the same for sharp images, which come again and again: an image seen before is answered from memory."""
        bytes_BCHW = as_bytes(images_BCHW)
        keys = [hashlib.sha256(image.tobytes()).digest() for image in bytes_BCHW.cpu().numpy()]
        new = [i for i, key in enumerate(keys) if key not in self._sharp]
        found = self.detect(bytes_BCHW[new]) if new else []
        self._sharp.update({keys[i]: faces for i, faces in zip(new, found, strict=True)})
        return [self._sharp[key] for key in keys]

    def detect_kept(self, images_BCHW: Tensor) -> list[Faces]:
        """Return the same for images that every run looks at, such as a test set's blurred ones: answered from a file."""
        bytes_BCHW = as_bytes(images_BCHW)
        key = hashlib.sha256(bytes_BCHW.cpu().numpy().tobytes()).hexdigest()
        key = f"{key} {tuple(bytes_BCHW.shape)} {self.side} {version('facenet-pytorch')} {version('torch')} "
        key += images_BCHW.device.type  # other hardware rounds otherwise

        def make() -> tuple[dict[str, np.ndarray], str]:
            found = self.detect(bytes_BCHW)
            columns = (
                [len(f) for f in found],
                *zip(*((f.boxes_F4, f.probs_F, f.points_F52) for f in found), strict=True),
            )
            counts, *rest = columns
            return dict(
                zip(PARTS, (np.array(counts), *(torch.cat(list(part)).numpy() for part in rest)), strict=True)
            ), ""

        if not len(bytes_BCHW):
            return []
        arrays, _ = kept("mtcnn", key, make, PARTS, "detections")
        sizes = arrays["counts"].tolist()
        boxes, probs, points = (torch.from_numpy(arrays[part]).split(sizes) for part in PARTS[1:])
        return [Faces(*columns) for columns in zip(boxes, probs, points, strict=True)]

    def score(self, images_BCHW: Tensor, sharp_BCHW: Tensor) -> FaceScores:
        """Return how the faces found in images compare with those of their sharp versions, a row per image.

        Args:
            images_BCHW: blurred, restored, or the sharp ones themselves for the ceiling.
            sharp_BCHW: their sharp versions.
        Raises:
            ValueError: the two differ in shape; see `detect`.
        Source: our choice; which indicators arXiv 2103.02121 uses is unknown.
        """
        if images_BCHW.shape != sharp_BCHW.shape:
            raise ValueError(
                f"images {tuple(images_BCHW.shape)} and sharp versions {tuple(sharp_BCHW.shape)} differ in shape"
            )
        return score_faces(self.detect(images_BCHW), self.detect_sharp(sharp_BCHW))


def _shrunk(faces: Faces, scale: float) -> Faces:
    """In the pixels of the image before it was enlarged, whose centres are at whole numbers."""
    return (
        faces
        if scale == 1
        else replace(faces, boxes_F4=_back(faces.boxes_F4, scale), points_F52=_back(faces.points_F52, scale))
    )


def _back(coordinates: Tensor, scale: float) -> Tensor:
    return (coordinates + 0.5) / scale - 0.5
