"""MTCNN as one function: images in, faces out. Every trap of the library it calls is dealt with here and nowhere else.

Legend: B images, F faces of one image, C channels, H height, W width. Points are in the order left eye, right eye, nose,
left and right corner of the mouth, left and right as one looks at the picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_modules.ops.detection import Faces, no_faces

THRESHOLDS = (0.6, 0.7, 0.7)  # of the three nets, the library's default: no face has a probability below the last
PYRAMID = 0.709
MIN_FACE = 20
EXCESS = 0.5  # beyond [0, 1] is a net's overshoot up to here, and farther out another range, such as [-1, 1] or 0..255
MIN_SIDE = 20  # with MIN_FACE, a smaller image has an empty pyramid, which the library cannot take


@torch.no_grad()
def detect_faces(images_BCHW: Tensor, min_face: float = MIN_FACE, chunk: int = 64) -> list[Faces]:
    """Return the faces that MTCNN finds in each image, the most probable first.

    Deterministic: full precision whatever the caller's (no autocast, no TF32), and images go in fixed chunks.

    Args:
        images_BCHW: RGB (B, 3, H, W), uint8, or floating in [0, 1], which is rounded to 8 bits as a saved picture would be,
            and a small excess clipped.
        min_face: the smallest face looked for, in pixels.
        chunk: images at a time.
    Returns:
        one `Faces` per image, in its pixels, on the CPU; of length 0 where there is none.
    Raises:
        ValueError: images of another layout, type or range, with values that are not finite, or smaller than a face.
    Source: Zhang et al. 2016, in the weights and code of facenet-pytorch 2.5.3.
    """
    images_BHWC = as_bytes(images_BCHW).permute(0, 2, 3, 1)
    height, width = images_BHWC.shape[1:3]
    if min(height, width) < max(MIN_SIDE, min_face):
        raise ValueError(
            f"images of {height} x {width} pixels hold no face of {max(MIN_SIDE, min_face):g}: enlarge them first"
        )
    nets = _nets(images_BHWC.device)
    found: list[Faces] = []
    with _full_precision(images_BHWC.device.type):
        for start in range(0, len(images_BHWC), chunk):
            found += _detect(images_BHWC[start : start + chunk], nets, min_face)
    return found


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Neither autocast nor TF32 nor a choice of algorithm by timing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def as_bytes(images_BCHW: Tensor) -> Tensor:
    """Return images as a saved picture would hold them: uint8, rounded, a small excess clipped.

    Raises:
        ValueError: images of another layout, type or range, or with values that are not finite.
    """
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise ValueError(f"images must be RGB (B, 3, H, W), got shape {tuple(images_BCHW.shape)}")
    if images_BCHW.dtype == torch.uint8:
        return images_BCHW
    if not images_BCHW.is_floating_point():
        raise ValueError(f"images must be uint8 or floating in [0, 1], got {images_BCHW.dtype}")
    low, high = (float(value) for value in images_BCHW.aminmax()) if images_BCHW.numel() else (0.0, 0.0)
    if not (low >= -EXCESS and high <= 1 + EXCESS):  # a NaN fails too
        raise ValueError(f"floating images must lie in [0, 1], got values from {low:g} to {high:g}")
    return (images_BCHW.float().clamp(0, 1) * 255).round().to(torch.uint8)


@cache
def _nets(device: torch.device) -> Any:
    """The three nets, whose weights come inside the package. Not a module of the caller's: they enter no checkpoint."""
    from facenet_pytorch import MTCNN

    with torch.inference_mode(False):  # or the nets could be used in that mode alone ever after
        return MTCNN(keep_all=True, device=device).eval()


def _detect(images_BHWC: Tensor, nets: Any, min_face: float) -> list[Faces]:
    from facenet_pytorch.models.utils.detect_face import detect_face

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        boxes, points = detect_face(
            images_BHWC, min_face, nets.pnet, nets.rnet, nets.onet, list(THRESHOLDS), PYRAMID, images_BHWC.device
        )
    return [_faces(rows, five) for rows, five in zip(boxes, points, strict=True)]


def _faces(rows: Any, five: Any) -> Faces:
    """From the library's arrays, which are of objects when all images have as many faces."""
    if len(rows) == 0:
        return no_faces()
    boxes_F5 = torch.tensor(rows.astype("float32"))
    points_F52 = torch.tensor(five.astype("float32"))
    order = boxes_F5[:, 4].argsort(descending=True, stable=True)
    return Faces(boxes_F5[order, :4], boxes_F5[order, 4], points_F52[order])


def enlarge(bytes_BCHW: Tensor, side: int) -> tuple[Tensor, float]:
    """Return uint8 images whose shorter side is at least `side` pixels, and how many times they were enlarged.

    Bilinear, with pixels as areas. MTCNN looks for faces of 20 pixels and more, and its last net sees 48: a face of 34
    pixels in an image of 64 is near the edge of what it can do, not of what can be seen.
    """
    scale = side / min(bytes_BCHW.shape[-2:])
    if scale <= 1:
        return bytes_BCHW, 1.0
    size = [round(scale * length) for length in bytes_BCHW.shape[-2:]]
    return F.interpolate(bytes_BCHW.float(), size=size, mode="bilinear").round().to(torch.uint8), scale
