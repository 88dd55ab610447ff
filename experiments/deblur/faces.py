"""Faces of a photograph: found, brought to the generator's square, restored, and put back where they were.

What is put back is not the restored square but how it differs from what went in: where the generator changes nothing,
neither does all the turning and scaling, and detail finer than the square stays.

Legend: H height, W width, C channels, F faces, S side of a square with its margins. Points are (x, y) in pixels, the centre
of the first pixel at (0, 0); in the plane of complex numbers, z = x + iy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from datamodules.face_align import fit_similarity, margin_of, template_points
from datamodules.face_detector import MIN_SIDE, detect_faces
from experiments.deblur.photographs import as_bytes_rgb
from experiments.deblur.tiles import Restore, as_floats, as_values
from lit_modules.ops.detection import Faces

VIEW = (160, 1600)  # to be searched, a photograph is enlarged until no side is below, then shrunk until none is beyond
SURE = 0.7  # MTCNN's own threshold: blurred faces have no high probabilities
MULTIPLE = 8  # what the square's side is rounded to
LARGEST = 2.0  # times the side that the generator was trained on


class Square(NamedTuple):
    """Where a face is brought to: pixel w of the square, margins included, is the photograph's at z = a w + b.

    side: of the square without its margins; whole: with them.
    """

    a: complex
    b: complex
    side: int

    @property
    def whole(self) -> int:
        return self.side + 2 * margin_of(self.side)


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


def square_of(points_52: np.ndarray, size: int, largest: float = LARGEST) -> Square:
    """Return the square of a face, by the rule that the generator's training faces were aligned by.

    The rule of its side: as many pixels as the face has in the photograph, so that nothing is scaled, but no fewer than the
    `size` that the generator was trained on, to which a smaller face is enlarged, and no more than `largest` times that.
    For a motion over so many face widths is so many pixels wide in the square, and the generator knows those of its size.

    Args:
        points_52: in the photograph.
        size: of the generator's training faces.
    Raises:
        ValueError: the points do not differ.
    """
    a, _ = fit_similarity(points_52, template_points(size))
    side = MULTIPLE * math.ceil(min(max(size / abs(a), size), largest * size) / MULTIPLE - 1e-9)
    a, b = fit_similarity(points_52, template_points(side))
    return Square(1 / a, -b / a, side)


def cut(image_HWC: np.ndarray, square: Square) -> np.ndarray:
    """Return the square of a photograph with its margins, float32 (S, S, C); beyond the photograph's edges its reflection."""
    room = 2 * math.ceil(abs(square.a)) + 2
    top, bottom, left, right = _box(square, image_HWC.shape, room)
    part_HWC = as_floats(image_HWC[top:bottom, left:right])
    shifted = Square(square.a, square.b - complex(left, top), square.side)
    return warp(part_HWC, shifted.a, shifted.b, square.whole, square.whole).clip(0, 1)


def restore_face(
    image_HWC: np.ndarray, output_HWC: np.ndarray, square: Square, restore: Restore, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Restore one face of a photograph, in place, in an output that others may already have been restored in.

    out = (1 - m) out + m (photograph + difference), with m from `strength` in the square to 0 at the edge of its margins.
    Where m is 0 no bit changes.

    Args:
        image_HWC: the photograph, uint8 or uint16.
        output_HWC: of its type.
        square: where the face is.
        restore: float32 (S, S, C) in [0, 1] to such.
        strength: in [0, 1].
    Returns:
        The square as it went in, and as it came out with `strength`.
    """
    before_SSC = cut(image_HWC, square)
    difference_SSC = (restore(before_SSC).clip(0, 1) - before_SSC) * np.float32(strength)
    top, bottom, left, right = _box(square, image_HWC.shape)
    if top < bottom and left < right:
        back_a, back_b = 1 / square.a, (complex(left, top) - square.b) / square.a
        patch_HWC = warp(difference_SSC, back_a, back_b, bottom - top, right - left)
        mask_HW1 = _feather(square, top, bottom, left, right)[..., None]
        part = (slice(top, bottom), slice(left, right))
        new_HWC = (as_floats(image_HWC[part]) + patch_HWC) * mask_HW1 + as_floats(output_HWC[part]) * (1 - mask_HW1)
        output_HWC[part] = as_values(new_HWC, image_HWC.dtype)
    return before_SSC, before_SSC + difference_SSC


def warp(source_HWC: np.ndarray, a: complex, b: complex, height: int, width: int) -> np.ndarray:
    """Return the image whose pixel w is the source's at a w + b, float32; beyond the source its reflection.

    Bicubic, after a filter of the same kind where the source is shrunk, so that fine detail does not turn into patterns.
    """
    source_1CHW = torch.from_numpy(np.ascontiguousarray(source_HWC, np.float32)).permute(2, 0, 1)[None]
    factor_2 = np.ones(2)
    if (scale := abs(a)) > 1:
        H, W = source_HWC.shape[:2]
        size = [max(1, round(H / scale)), max(1, round(W / scale))]
        source_1CHW = F.interpolate(source_1CHW, size=size, mode="bicubic", antialias=True)
        factor_2 = np.array([size[1] / W, size[0] / H])
    x_HW, y_HW = _plane(a, b, 0, height, 0, width)
    # in units in which the source reaches from -1 to 1
    scaled = [
        (2 * f * (u + 0.5) / n - 1) for u, f, n in zip((x_HW, y_HW), factor_2, source_1CHW.shape[:1:-1], strict=True)
    ]
    grid_1HW2 = torch.from_numpy(np.stack(scaled, -1).astype(np.float32))[None]
    out_1CHW = F.grid_sample(source_1CHW, grid_1HW2, mode="bicubic", padding_mode="reflection", align_corners=False)
    return out_1CHW[0].permute(1, 2, 0).numpy()


def _plane(a: complex, b: complex, top: int, bottom: int, left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of a w + b for each pixel w of a box, float64 (H, W)."""
    z_HW = a * (np.arange(left, right)[None, :] + 1j * np.arange(top, bottom)[:, None]) + b
    return z_HW.real, z_HW.imag


def _box(square: Square, shape: tuple[int, ...], room: int = 1) -> tuple[int, int, int, int]:
    """Return the rows and columns of a photograph that a square looks at: top, bottom, left, right."""
    ends = (-0.5, square.whole - 0.5)
    z = square.a * np.array([complex(x, y) for x in ends for y in ends]) + square.b
    (left, right), (top, bottom) = (
        (max(0, math.floor(v.min()) - room), min(n, math.ceil(v.max()) + room + 1))
        for v, n in ((z.real, shape[1]), (z.imag, shape[0]))
    )
    return top, bottom, left, right


def _feather(square: Square, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """Return how much of the restored face each pixel of a box of the photograph takes: 1 in the square, a smooth step down
    across its margins, 0 beyond; float32 (H, W).
    """
    mask_HW = np.ones((bottom - top, right - left))
    for along_HW in _plane(1 / square.a, -square.b / square.a, top, bottom, left, right):
        inside = np.minimum(along_HW + 0.5, square.whole - 0.5 - along_HW) / margin_of(square.side)
        inside = inside.clip(0, 1)
        mask_HW *= inside * inside * (3 - 2 * inside)
    return mask_HW.astype(np.float32)
