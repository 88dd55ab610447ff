"""Detections drawn on the image they were found in, for figures.

Legend: H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_modules.ops.detection import Faces

BOX, POINT, BACK = (40, 230, 90), (255, 210, 0), (0, 0, 0)
NOTHING = "no face"


def draw_faces(image_CHW: Tensor, faces: Faces, side: int = 192) -> Image.Image:
    """Return an image with its faces: boxes with their probability, and five points each; or the words "no face".

    Args:
        image_CHW: RGB (3, H, W), uint8, or floating in [0, 1].
        faces: in the image's pixels.
        side: of the picture in pixels, on its longer side; the image is enlarged without smoothing, lines and text are drawn
            afterwards and so are equally readable whatever the image's size.
    Raises:
        ValueError: an image of another layout, or a side below 32.
    """
    if image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
        raise ValueError(f"an image to draw on must be RGB (3, H, W), got shape {tuple(image_CHW.shape)}")
    if side < 32:
        raise ValueError(f"side must be at least 32 pixels, got {side}")
    pixels = image_CHW.detach().cpu()
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    scale = side / max(pixels.shape[1:])
    size = (round(scale * pixels.shape[2]), round(scale * pixels.shape[1]))
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).resize(
        size, Image.Resampling.NEAREST
    )
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, side // 14))
    if not len(faces):
        _label(draw, NOTHING, (2, 2), font, size)
    width, dot = max(1, side // 96), max(2, side // 64)
    for box_4, prob, points_52 in zip(faces.boxes_F4, faces.probs_F, faces.points_F52, strict=True):
        x0, y0, x1, y1 = ((box_4 + 0.5) * scale).tolist()
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=BOX, width=width)
        for x, y in ((points_52 + 0.5) * scale).tolist():
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=POINT, outline=BACK)
        _label(draw, _cut_off(float(prob)), (x0, y0), font, size)
    return picture


def _cut_off(prob: float) -> str:
    """Cut off, not rounded: 0.9996 is not certain."""
    return f"{int(prob * 1000) / 1000:.3f}"


def _label(
    draw: ImageDraw.ImageDraw, words: str, corner: tuple[float, float], font: Any, size: tuple[int, int]
) -> None:
    """Text on black inside the picture: above the corner where there is room, else below it."""
    left, top, right, bottom = draw.textbbox((0, 0), words, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0, corner[0]), size[0] - width)
    y = corner[1] - height if corner[1] >= height else max(0, corner[1])
    draw.rectangle((x, y, x + width, y + height), fill=BACK)
    draw.text((x + 2 - left, y + 2 - top), words, fill=BOX, font=font)
