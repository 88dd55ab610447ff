"""Pictures to look at: what went in beside what came out, and MTCNN's faces in both.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from experiments.deblur.faces import find_faces
from experiments.deblur.photographs import as_bytes_rgb
from experiments.deblur.tiles import as_floats, as_values
from lit_modules.face_drawing import draw_faces

PANEL = 384  # pixels, the longer side of a panel
WIDE = 1024  # and of a photograph with its faces drawn in
MOST = 12  # faces of a photograph that are shown
AMPLIFIED = 4
TITLES = ("input", "restored", f"difference x {AMPLIFIED}")
ABOVE = 22  # pixels for the titles


def compare(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Return a PNG with a row for each pair of images, float32 (H, W, C): before, after, and four times the difference round
    grey. Of a photograph a row per face, or one of all of it.
    """
    panels = []
    for before, after in rows[:MOST]:
        difference = 0.5 + AMPLIFIED * (after - before)
        panels.append([_panel(as_bytes_rgb(as_values(x, np.dtype(np.uint8)))) for x in (before, after, difference)])
    return _png(_table(panels, TITLES))


def small(pixels_HWC: np.ndarray) -> np.ndarray:
    """Return a photograph as float32 RGB, no side larger than a panel's."""
    picture = Image.fromarray(as_bytes_rgb(pixels_HWC))
    picture.thumbnail((PANEL, PANEL), Image.Resampling.LANCZOS)
    return as_floats(np.asarray(picture))


def overlay(before_HWC: np.ndarray, after_HWC: np.ndarray, sure: float) -> bytes:
    """Return a PNG of a photograph before and after, with the boxes, probabilities and points of MTCNN's faces."""
    panels = []
    for pixels_HWC in (before_HWC, after_HWC):
        faces = find_faces(pixels_HWC, sure)
        image_CHW = torch.from_numpy(as_bytes_rgb(pixels_HWC)).permute(2, 0, 1)
        panels.append(draw_faces(image_CHW, faces, min(WIDE, max(PANEL, *pixels_HWC.shape[:2]))))
    return _png(_table([panels], TITLES[:2]))


def _panel(pixels_HWC: np.ndarray) -> Image.Image:
    """Bring to the size of a panel; small ones without smoothing, so that their pixels show."""
    picture = Image.fromarray(pixels_HWC)
    scale = PANEL / max(picture.size)
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _table(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    width = max(panel.width for row in rows for panel in row) + 4
    heights = [max(panel.height for panel in row) + 4 for row in rows]
    sheet = Image.new("RGB", (width * len(titles), ABOVE + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, title in enumerate(titles):
        draw.text((width * i + 4, 3), title, fill="black", font=font)
    for k, row in enumerate(rows):
        for i, panel in enumerate(row):
            sheet.paste(panel, (width * i + 2, ABOVE + sum(heights[:k]) + 2))
    return sheet


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
