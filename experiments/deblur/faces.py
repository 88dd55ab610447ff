"""Faces of a photograph: found, brought to the generator's square, restored, and put back where they were.

What is put back is not the restored square but how it differs from what went in: where the generator changes nothing,
neither does all the turning and scaling, and detail finer than the square stays.

Legend: H height, W width, C channels, F faces, S side of a face's square. Points are (x, y) in pixels, the centre of the first
pixel at (0, 0); as complex numbers z = x + iy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from datamodules.face_align import TEMPLATE_52, fit_similarity
from datamodules.face_detector import MIN_SIDE, detect_faces
from experiments.deblur.photographs import as_bytes_rgb
from experiments.deblur.tiles import Restore, as_floats, as_values
from experiments.deblur.warping import plane, warp
from lit_modules.ops.detection import Faces

VIEW = (160, 1600)  # to be searched, a photograph is enlarged until no side is below, then shrunk until none is beyond
SURE = 0.7  # MTCNN's own threshold: blurred faces have no high probabilities
LARGEST = 1.0  # times the side that the generator was trained on
FEATHER = 1 / 8  # of the side, within the square, over which what is put back fades in


class Square(NamedTuple):
    """Where a face is brought to: pixel w of a square of `side` pixels is the photograph's at z = a w + b."""

    a: complex
    b: complex
    side: int


def find_faces(pixels_HWC: np.ndarray, sure: float = SURE) -> Faces:
    """Return the faces that MTCNN finds in a photograph, in its pixels, the most probable first.

    It looks at a view no side of which is beyond 1600 pixels, for faces of 20 pixels there.
    """
    size_2 = np.array(pixels_HWC.shape[1::-1])
    scale = min(max(1.0, VIEW[0] / size_2.min()), VIEW[1] / size_2.max())
    view_2 = np.maximum(MIN_SIDE, np.round(scale * size_2)).astype(int)
    picture = Image.fromarray(as_bytes_rgb(pixels_HWC))
    view = picture.resize((int(view_2[0]), int(view_2[1])), Image.Resampling.BILINEAR)
    (found,) = detect_faces(torch.from_numpy(np.array(view)).permute(2, 0, 1)[None])
    back_2 = torch.from_numpy(size_2 / view_2).float()
    kept = found.probs_F >= sure
    boxes_F22 = (found.boxes_F4[kept].unflatten(1, (2, 2)) + 0.5) * back_2 - 0.5
    return Faces(boxes_F22.flatten(1), found.probs_F[kept], (found.points_F52[kept] + 0.5) * back_2 - 0.5)


def side_in_photograph(points_52: np.ndarray) -> float:
    """Return how many pixels of the photograph the side of a face's square spans: four times the distance of its eyes.

    Raises:
        ValueError: the points do not differ.
    """
    a, _ = fit_similarity(points_52, TEMPLATE_52)
    return 1 / abs(a)


def square_of(points_52: np.ndarray, size: int, largest: float = LARGEST) -> Square:
    """Return the square of a face, aligned as the generator's training faces were.

    The rule of its side: the `size` that the generator was trained on, to which smaller faces are enlarged and larger ones
    shrunk. A generator knows faces of its size and motion of so many pixels, and larger squares come out worse the larger
    they are. `largest` above 1 lets larger faces keep their own pixels, up to that many times `size`.

    Args:
        points_52: in the photograph.
        size: of the generator's training faces.
    Raises:
        ValueError: the points do not differ.
    """
    side = round(min(max(side_in_photograph(points_52), size), largest * size))
    a, b = fit_similarity(points_52, TEMPLATE_52 * side - 0.5)
    return Square(1 / a, -b / a, side)


def cut(image_HWC: np.ndarray, square: Square) -> np.ndarray:
    """Return the square of a photograph, float32 (S, S, C); beyond the photograph's edges its reflection."""
    room = 4 * math.ceil(abs(square.a)) + 2
    top, bottom, left, right = _box(square, image_HWC.shape, room)
    part_HWC = as_floats(image_HWC[top:bottom, left:right])
    return warp(part_HWC, square.a, square.b - complex(left, top), square.side, square.side).clip(0, 1)


def restore_face(
    image_HWC: np.ndarray, output_HWC: np.ndarray, square: Square, restore: Restore, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Restore one face of a photograph, in place, in an output that others may already have been restored in.

    out = (1 - m) out + m (photograph + difference), with m from 1 inside the square to 0 at its edge. Where m is 0 no bit
    changes.

    Args:
        image_HWC: the photograph, uint8 or uint16.
        output_HWC: of its type.
        square: where the face is.
        restore: float32 (B, S, S, C) in [0, 1] to such.
        strength: in [0, 1], what the difference is multiplied by.
    Returns:
        The square as it went in, and as it came out with `strength`.
    """
    before_SSC = cut(image_HWC, square)
    difference_SSC = (restore(before_SSC[None])[0].clip(0, 1) - before_SSC) * np.float32(strength)
    top, bottom, left, right = _box(square, image_HWC.shape, 1)
    if top < bottom and left < right:
        back_a, back_b = 1 / square.a, (complex(left, top) - square.b) / square.a
        patch_HWC = warp(difference_SSC, back_a, back_b, bottom - top, right - left)
        mask_HW1 = feather(square, top, bottom, left, right)[..., None]
        part = (slice(top, bottom), slice(left, right))
        new_HWC = (as_floats(image_HWC[part]) + patch_HWC) * mask_HW1 + as_floats(output_HWC[part]) * (1 - mask_HW1)
        output_HWC[part] = as_values(new_HWC, image_HWC.dtype)
    return before_SSC, before_SSC + difference_SSC


def feather(square: Square, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """Return how much of the restored face each pixel of a box of the photograph takes: 0 outside the square, a smooth step
    up over an eighth of its side, 1 farther in; float32 (H, W).
    """
    mask_HW = np.ones((bottom - top, right - left))
    for along_HW in plane(1 / square.a, -square.b / square.a, top, bottom, left, right):
        inside_HW = np.minimum(along_HW + 0.5, square.side - 0.5 - along_HW) / (FEATHER * square.side)
        inside_HW = inside_HW.clip(0, 1)
        mask_HW *= inside_HW * inside_HW * (3 - 2 * inside_HW)
    return mask_HW.astype(np.float32)


def _box(square: Square, shape: tuple[int, ...], room: int) -> tuple[int, int, int, int]:
    """Return the rows and columns of a photograph that a square looks at: top, bottom, left, right."""
    ends = (-0.5, square.side - 0.5)
    z = square.a * np.array([complex(x, y) for x in ends for y in ends]) + square.b
    (left, right), (top, bottom) = (
        (max(0, math.floor(v.min()) - room), min(n, math.ceil(v.max()) + room + 1))
        for v, n in ((z.real, shape[1]), (z.imag, shape[0]))
    )
    return top, bottom, left, right
