"""What procedural faces are drawn with: a head's coordinates, soft shapes, colours and light.

Legend: S points drawn per side. A head has coordinates (u, v) in distances between its eyes, which lie at (-1/2, 0) and
(1/2, 0), v downwards. Colours are RGB in [0, 1].
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np

LIGHT_SKIN, DARK_SKIN = np.array([0.96, 0.80, 0.70]), np.array([0.34, 0.20, 0.13])
HAIRS = np.array([[0.08, 0.06, 0.05], [0.22, 0.13, 0.08], [0.42, 0.28, 0.16], [0.75, 0.6, 0.38], [0.6, 0.58, 0.57]])
HAIR_STYLES = {"short": 0.45, "long": 0.3, "fringe": 0.15, "bald": 0.1}  # and how many have it
Image = np.ndarray  # float32 (S, S, 3)


class Scene:
    """What is drawn: the head's coordinates u, v (S, S), where its features lie, its colours, the light, and how bright this
    makes each point of the head, shade (S, S), known once the head is.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        points_52: np.ndarray,
        yaw: float,
        u_SS: np.ndarray,
        v_SS: np.ndarray,
        to_crop: tuple[complex, complex],
    ) -> None:
        self.rng, self.u, self.v, self.to_crop, self.yaw = rng, u_SS, v_SS, to_crop, yaw
        self.shade = np.ones_like(u_SS)
        self.points: list[list[float]] = points_52.tolist()  # plain numbers, which leave float32 arrays float32
        self.pixel = 1 / abs(to_crop[0])
        light = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.15), 1.0])
        self.light: list[float] = (light / np.linalg.norm(light)).tolist()
        self.ambient = rng.uniform(0.45, 0.7)
        tone = rng.beta(1.1, 1.6)
        self.fair = tone < 0.5
        self.skin = colour(LIGHT_SKIN * (1 - tone) + DARK_SKIN * tone + rng.normal(0, 0.015, 3))
        self.hair = colour(HAIRS[rng.integers(len(HAIRS) if self.fair else 2)] * rng.uniform(0.8, 1.2))
        self.style = str(rng.choice(list(HAIR_STYLES), p=list(HAIR_STYLES.values())))
        self.width, self.jaw = rng.uniform(0.98, 1.12), rng.uniform(0.62, 0.85)
        self.chin, self.crown = rng.uniform(1.62, 1.8), rng.uniform(-1.75, -1.55)

    def near(self, x: float, y: float, reach: float) -> tuple[Scene, tuple[slice, slice]]:
        """Return the part of the scene round a point, and where it is: features are drawn there, in a fraction of the time."""
        rows, columns = (
            np.flatnonzero(((abs(self.u - x) < reach) & (abs(self.v - y) < reach)).any(axis)) for axis in (1, 0)
        )
        where = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part = copy(self)
        part.u, part.v, part.shade = self.u[where], self.v[where], self.shade[where]
        return part, where

    def within(self, distance: np.ndarray, pixels: float = 1.0) -> np.ndarray:
        """How much of each point lies inside, from a signed distance in the head's units, negative inside; the edge is
        some pixels wide.
        """
        return np.clip(0.5 - distance / (pixels * self.pixel), 0, 1)

    def ellipse(self, x: float, y: float, a: float, b: float, pixels: float = 1.0) -> np.ndarray:
        """How much of each point lies in an ellipse."""
        radius = np.hypot((self.u - x) / a, (self.v - y) / b)
        return self.within((radius - 1) * min(a, b), pixels)

    def spot(self, x: float, y: float, a: float, b: float) -> np.ndarray:
        """A Gaussian spot, 1 at its centre."""
        return np.exp(-(((self.u - x) / a) ** 2) - ((self.v - y) / b) ** 2)


def colour(rgb: Any) -> np.ndarray:
    """Return a colour, or a factor of one, as float32, which leaves images float32."""
    return np.asarray(rgb, dtype=np.float32)


def over(image: Image, colour: np.ndarray, alpha: np.ndarray) -> Image:
    """Lay a colour (3,) or (S, S, 3) over an image, as opaque as alpha (S, S) says."""
    return image + alpha[..., None] * (colour - image)


def darken(image: Image, share: np.ndarray) -> Image:
    """Take a share (S, S) of its light from an image; a negative one adds light."""
    return image * (1 - share)[..., None]


def line(distance: np.ndarray, width: float) -> np.ndarray:
    """A soft line where a distance is 0."""
    return np.exp(-((distance / width) ** 2))


def muted(rng: np.random.Generator) -> np.ndarray:
    """A colour nearer to grey than most."""
    grey = rng.uniform(0.1, 0.9)
    return colour(np.clip(grey + rng.uniform(0, 1) ** 2 * rng.uniform(-0.5, 0.5, 3), 0.02, 0.98))
