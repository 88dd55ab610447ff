"""The features of procedural faces: nose, mouth, eyes and brows, each drawn over an image.

Legend: S points drawn per side. A head has coordinates (u, v) in distances between its eyes, which lie at (-1/2, 0) and
(1/2, 0), v downwards. Colours are RGB in [0, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from datamodules.procedural_scene import Image, Scene, colour, darken, line, over

IRISES = np.array([[0.25, 0.14, 0.07], [0.3, 0.22, 0.1], [0.3, 0.42, 0.5], [0.3, 0.4, 0.28]])


def nose(scene: Scene, image: Image) -> Image:
    """A ridge with a lit and a shaded side, a rounded tip, wings and nostrils."""
    (x, y), (left, right) = scene.points[2], scene.points[:2]
    x0, y0 = (left[0] + right[0]) / 2, (left[1] + right[1]) / 2
    along = np.clip((scene.v - y0) / (y - y0), 0, 1)
    centre, wide = x0 + along * (x - x0), 0.08 + 0.1 * along
    on = scene.within(scene.v - y, 6) * scene.within(y0 - 0.1 - scene.v, 6)
    shaded = -1.0 if scene.light[0] > 0 else 1.0
    image = darken(image, (0.15 + 0.4 * abs(scene.light[0])) * on * line(scene.u - centre - shaded * wide, 0.07))
    image = darken(image, 0.1 * on * line(scene.u - centre + shaded * wide, 0.05))
    image = darken(image, -0.12 * on * line(scene.u - centre, 0.05) - 0.15 * scene.spot(x, y - 0.05, 0.09, 0.08))
    image = darken(image, 0.35 * scene.spot(x, y + 0.15, 0.26, 0.07))
    breadth = scene.rng.uniform(0.11, 0.15)
    for side in (-1, 1):
        image = darken(image, 0.3 * scene.spot(x + side * breadth * 1.75, y + 0.02, 0.05, 0.1))
        nostril = scene.ellipse(x + side * breadth, y + 0.11, 0.065, 0.035, 2)
        image = over(image, scene.skin * colour(0.22), 0.8 * nostril)
    return image


def mouth(scene: Scene, image: Image) -> Image:
    """Two lips that meet in a dark line, or teeth between them."""
    rng, (left, right) = scene.rng, scene.points[3:]
    x, y, half = (left[0] + right[0]) / 2, (left[1] + right[1]) / 2, (right[0] - left[0]) / 2
    s = (scene.u - x) / half
    inside = np.clip(1 - s**2, 0, 1)
    meet = y + rng.uniform(-0.02, 0.12) * inside + 0.5 * (right[1] - left[1]) * s
    upper, lower, reddish = rng.uniform(0.06, 0.1), rng.uniform(0.09, 0.15), rng.uniform(0.02, 0.14)
    opened = rng.uniform(0.04, 0.12) if rng.random() < 0.4 else 0.0
    below = meet + opened * inside
    lips = scene.within(meet - upper * inside**0.7 * (1 - 0.25 * line(s, 0.18)) - scene.v, 1.5)
    lips = lips * scene.within(scene.v - below - lower * inside**0.8, 1.5) * (np.abs(s) < 1)
    image = darken(image, 0.25 * scene.spot(x, y + opened + lower + 0.1, 0.3, 0.06))
    red = scene.skin * colour([0.85, 0.6, 0.6]) + colour([reddish, 0, 0.01])
    image = over(image, red * np.where(scene.v < meet, 0.85, 1).astype(np.float32)[..., None], lips)
    if opened:
        gap = scene.within(meet - scene.v) * scene.within(scene.v - below) * (np.abs(s) < 0.95)
        image = over(image, colour([0.85, 0.82, 0.78]) * colour(rng.uniform(0.7, 1)), gap)
    dark = line(scene.v - meet, 0.022) * (np.abs(s) < 1.02)
    return over(image, scene.skin * colour(0.22), dark * (0.5 if opened else 0.85))


class EyeShape(NamedTuple):
    """What both eyes of a face have in common."""

    half: float
    high: float
    socket: float
    gaze: float
    radius: float
    iris: np.ndarray
    arch: float
    thick: float
    rise: float

    @classmethod
    def draw(cls, scene: Scene) -> EyeShape:
        """Draw the numbers of a face's eyes."""
        rng, half = scene.rng, scene.rng.uniform(0.22, 0.27)
        return cls(
            half,
            high=rng.uniform(0.075, 0.12),
            socket=rng.uniform(0.15, 0.35),
            gaze=0.35 * scene.yaw * half + rng.normal(0, 0.015),
            radius=rng.uniform(0.105, 0.125),
            iris=colour(IRISES[rng.integers(len(IRISES) if scene.fair else 2)] * 0.9),
            arch=rng.uniform(0.03, 0.1),
            thick=rng.uniform(0.035, 0.075),
            rise=rng.uniform(0.26, 0.34),
        )


def eye(scene: Scene, image: Image, side: int, shape: EyeShape) -> Image:
    """A socket, and between two lids the white, iris, pupil and the light's reflection, under the upper lid's shadow."""
    x, y = scene.points[side]
    image = darken(image, shape.socket * scene.spot(x, y - 0.07, 0.34, 0.2))
    s = (scene.u - x) / shape.half
    inside, across = np.clip(1 - s**2, 0, 1), np.abs(s)
    upper, lower = y - shape.high * inside**0.8, y + 0.65 * shape.high * inside
    ball = colour([0.9, 0.88, 0.86]) * np.clip(scene.shade + 0.1, 0, 1)[..., None]
    ball = over(ball, shape.iris, scene.ellipse(x + shape.gaze, y - 0.01, shape.radius, shape.radius))
    ball = over(ball, colour(0.02), scene.ellipse(x + shape.gaze, y - 0.01, 0.05, 0.05))
    glint = x + shape.gaze + math.copysign(0.04, scene.light[0])
    ball = over(ball, colour(1), scene.ellipse(glint, y - 0.05, 0.022, 0.022))
    ball = darken(ball, 0.4 * line(scene.v - upper, 0.04))
    image = over(image, ball, scene.within(upper - scene.v) * scene.within(scene.v - lower) * (across < 1))
    image = over(image, colour(0.05), 0.85 * line(scene.v - upper, 0.028) * (across < 1.03))
    image = darken(image, 0.25 * line(scene.v - upper + 0.085, 0.022) * (across < 1))
    return darken(image, 0.2 * line(scene.v - lower, 0.022) * (across < 1))


def brow(scene: Scene, image: Image, side: int, shape: EyeShape) -> Image:
    """An arch of hairs above an eye, thinner outwards."""
    x, y = scene.points[side]
    out = 1.0 if side else -1.0
    t = out * (scene.u - x - out * 0.02) / 0.36  # -1 at the nose's end of the brow, 1 at its other end
    middle = y - shape.rise - shape.arch * np.clip(1 - (t - 0.3) ** 2, -1, 1)
    hairs = scene.within(np.abs(scene.v - middle) - shape.thick * (1 - 0.4 * np.clip(t, -1, 1)), 3) * (np.abs(t) < 1)
    return over(image, scene.hair * colour(0.55) + scene.skin * colour(0.1), 0.85 * hairs)
