"""Procedural faces: drawn by rule, accepted by MTCNN as faces, and not photographs of anyone.

An offline stand-in on every machine, under its own name everywhere. A face is a pure function of (split, index, size).

Legend: H = W side of the crop with its margins, S of what is drawn before it is averaged. A head has coordinates (u, v) in
distances between its eyes, its eyes at (-1/2, 0) and (1/2, 0), v downwards. Colours are RGB in [0, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from datamodules.face_align import fit_similarity, margin_of, template_points
from datamodules.procedural_features import EyeShape, brow, eye, mouth, nose
from datamodules.procedural_scene import Image, Scene, colour, muted, over

STREAMS = {"train": 1, "val": 2, "test": 3}
OVERSAMPLING = 2

# Where the five points lie on a head seen from the front, and how far before the plane of its ears.
POINTS_53 = np.array([[-0.5, 0, 0.8], [0.5, 0, 0.8], [0, 0.6, 1.15], [-0.42, 1.02, 0.82], [0.42, 1.02, 0.82]])


class Face(NamedTuple):
    """A drawn face: pixels uint8 (H, W, 3), and its five points in it (5, 2)."""

    pixels_HW3: np.ndarray
    points_52: np.ndarray


def draw_face(split: str, index: int, size: int) -> Face:
    """Draw one face, aligned, `size` pixels wide and as high, with margins on every side.

    Raises:
        KeyError: a split other than train, val and test.
    """
    rng = np.random.default_rng([STREAMS[split], index])
    yaw, pitch = rng.normal(0, 0.16), rng.normal(0, 0.1)
    points_52 = _project(POINTS_53 * [rng.uniform(0.94, 1.06), rng.uniform(0.95, 1.05), 1], yaw, pitch)
    scene = Scene(rng, points_52, yaw, *_grid(rng, points_52, size))
    image = np.clip(_paint(scene), 0, 1)
    side = size + 2 * margin_of(size)
    image = image.reshape(side, OVERSAMPLING, side, OVERSAMPLING, 3).mean((1, 3))
    gamma, noise = rng.uniform(0.8, 1.25), rng.uniform(0.002, 0.012)
    image = image**gamma + noise * rng.standard_normal(image.shape, dtype=np.float32)
    a, b = scene.to_crop
    z = (points_52 @ [1, 1j]) * a + b
    return Face(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), np.stack([z.real, z.imag], -1))


def _project(points_N3: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """Turn a head and look at it from far away."""
    x, y, z = points_N3.T
    x, z = x * math.cos(yaw) + z * math.sin(yaw), z * math.cos(yaw) - x * math.sin(yaw)
    return np.stack([x, y * math.cos(pitch) + (z - 0.8) * math.sin(pitch)], -1)


def _grid(
    rng: np.random.Generator, points_52: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, tuple[complex, complex]]:
    """The head's coordinates of each point drawn, and the similarity from head to crop: that of an alignment, less exact."""
    a, b = fit_similarity(points_52, template_points(size))
    a *= rng.normal(1, 0.03) * np.exp(1j * rng.normal(0, 0.03))
    b += size * complex(*rng.normal(0, 0.01, 2))
    count = (size + 2 * margin_of(size)) * OVERSAMPLING
    w = (np.arange(count) + 0.5) / OVERSAMPLING - 0.5
    z = ((w[None] + 1j * w[:, None]) - b) / a
    return z.real.astype(np.float32), z.imag.astype(np.float32), (complex(a), complex(b))


def _paint(scene: Scene) -> Image:
    """All layers from the back to the front."""
    radius, scene.shade = _head(scene)
    image = _body(scene, _background(scene))
    image = over(image, scene.skin * scene.shade[..., None], scene.within((radius - 1) * scene.width, 1.5))
    left_eye, right_eye, tip, *corners = scene.points
    part, where = scene.near(tip[0], tip[1] - 0.3, reach=1.0)
    image[where] = nose(part, image[where])
    part, where = scene.near(tip[0], (corners[0][1] + corners[1][1]) / 2, reach=1.0)
    image[where] = mouth(part, image[where])
    eyes = EyeShape.draw(scene)
    for side, (x, y) in enumerate((left_eye, right_eye)):
        part, where = scene.near(x, y, reach=0.9)
        image[where] = brow(part, eye(part, image[where], side, eyes), side, eyes)
    return image if scene.style == "bald" else _front_hair(scene, image, radius)


def _head(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """How far out each point lies, 1 at the outline, and how bright the light makes it: an ellipsoid, narrower at the jaw."""
    v0 = 0.1
    up = scene.v < v0
    y = (scene.v - v0) / np.where(up, v0 - scene.crown, scene.chin - v0).astype(np.float32)
    narrow = np.where(up, 1, 1 - (1 - scene.jaw) * np.clip(y, 0, 1) ** 2)
    x = (scene.u - 0.35 * math.sin(scene.yaw)) / (scene.width * narrow)
    radius = np.hypot(x, np.abs(y) ** 1.15)
    z = np.sqrt(np.clip(1 - radius**2, 0, 1))
    lit = x * scene.light[0] + y * scene.light[1] + z * scene.light[2]
    return radius, scene.ambient + (1.05 - scene.ambient) * np.clip(lit, 0, 1)


def _background(scene: Scene) -> Image:
    rng = scene.rng
    one, other = (muted(rng) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    slope = np.clip(0.5 + 0.2 * (scene.u * math.cos(angle) + scene.v * math.sin(angle)), 0, 1)
    image = over(one + np.zeros((*scene.u.shape, 3), np.float32), other, slope * rng.uniform(0, 1))
    for _ in range(rng.integers(0, 5)):
        x, y = rng.uniform(-2.5, 2.5), rng.uniform(-2.5, 2.5)
        image = over(image, muted(rng), 0.7 * scene.spot(x, y, rng.uniform(0.2, 1.2), rng.uniform(0.2, 1.2)))
    return image


def _body(scene: Scene, image: Image) -> Image:
    """Hair behind the head, shoulders, neck and ears."""
    rng = scene.rng
    if scene.style != "bald":
        image = over(image, scene.hair * strands(scene), scene.ellipse(0, -0.35, scene.width * 1.14, 1.62, 2))
    if scene.style in ("long", "fringe"):
        long = scene.ellipse(0, 0.75, scene.width * 1.28, rng.uniform(1.5, 2.3), 2)
        image = over(image, scene.hair * strands(scene) * 0.85, long)
    lit = 0.8 + 0.07 * scene.light[0] * scene.u
    image = over(image, muted(rng) * lit[..., None], scene.ellipse(0, 3.6, 2.6, 1.55, 2))
    sides = scene.within(np.abs(scene.u) - 0.62 - 0.12 * np.clip(scene.v - 1.5, 0, None), 2)
    neck = sides * scene.within(1.0 - scene.v, 3) * scene.within(scene.v - 2.45 + 0.5 * scene.u**2, 2)
    image = over(image, scene.skin * (0.62 + 0.2 * scene.light[0] * scene.u)[..., None], neck)
    if scene.style in ("short", "bald"):
        for side in (-1, 1):
            x = side * scene.width * 1.02 - 0.25 * math.sin(scene.yaw)
            image = over(image, scene.skin * colour(0.78), scene.ellipse(x, 0.25, 0.14, 0.3, 1.5))
    return image


def strands(scene: Scene) -> np.ndarray:
    """How bright hair is along and across its strands (S, S, 1)."""
    waves = np.zeros_like(scene.u)
    for _ in range(3):
        across, along, phase = scene.rng.uniform(8, 30), scene.rng.uniform(-6, 6), scene.rng.uniform(0, 6)
        waves += np.sin(across * scene.u + along * scene.v + phase)
    return (0.95 + 0.09 * waves)[..., None]


def _front_hair(scene: Scene, image: Image, radius: np.ndarray) -> Image:
    rng, away = scene.rng, np.abs(scene.u)
    line = rng.uniform(-0.62, -0.5) if scene.style == "fringe" else rng.uniform(-1.12, -0.85)
    part, slope = rng.uniform(-0.6, 0.6), rng.uniform(0.05, 0.3)
    edge = line + slope * np.clip(scene.u - part, 0, None) - 0.1 * np.cos(3 * scene.u)
    temple = line + 3.6 * np.clip(away - 0.72 * scene.width, 0, None)  # it comes down at the sides
    hair = scene.within((radius - 1.06) * scene.width, 2) * scene.within(scene.v - np.maximum(edge, temple), 4)
    return over(image, scene.hair * strands(scene) * (0.35 + 0.65 * scene.shade)[..., None], hair)
