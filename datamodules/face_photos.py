"""Image files as people have them, made RGB uint8 or refused with a reason: grey, transparent, 16-bit, CMYK, broken, empty.

Legend: H height, W width.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_FORMATS = ".jpg .jpeg .jpe .png .webp .bmp .gif .tif .tiff .ppm .pgm .pnm .jp2 .avif .heic .heif"
SUFFIXES = frozenset(_FORMATS.split())
SMALLEST_SIDE = 40  # pixels; MTCNN finds no face below 20, and a portrait is twice as wide as its face

# What may be odd about a file that is used all the same, and why one is refused: the words under which they are counted.
GREYSCALE, ALPHA, SIXTEEN_BIT, CMYK = (
    "greyscale (converted)",
    "alpha (composited)",
    "16-bit (scaled)",
    "CMYK (converted)",
)
EMPTY, TRUNCATED, UNREADABLE, TOO_SMALL, TOO_LARGE = "zero-byte", "truncated", "unreadable", "too small", "too large"


class Refused(ValueError):
    """A file that cannot be used. `reason` is the word it is counted under; the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Photo(NamedTuple):
    """An upright picture, uint8 RGB (H, W, 3), and what was odd about its file."""

    pixels_HW3: np.ndarray
    oddities: tuple[str, ...]


def read_photo(content: bytes) -> Photo:
    """Decode an image file: upright as its EXIF orientation says, transparent parts over white, 16 bits scaled to 8.

    Of an animation the first picture. 16-bit colour is scaled by Pillow, which does not say that it was there.

    Raises:
        Refused: zero-byte, truncated, unreadable, too small or too large, with what the decoder said.
    """
    if not content:
        raise Refused(EMPTY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                opened.load()
                upright = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Refused(TOO_LARGE, str(error)) from None
    except UnidentifiedImageError:
        raise Refused(UNREADABLE, "it is of no image format that is known here") from None
    except Exception as error:  # decoders of broken files raise what they will
        raise Refused(TRUNCATED if _is_cut(error) else UNREADABLE, f"{type(error).__name__}: {error}") from None
    if min(upright.size) < SMALLEST_SIDE:
        width, height = upright.size
        raise Refused(TOO_SMALL, f"{width} x {height} pixels, where {SMALLEST_SIDE} is the least")
    return _as_rgb(upright)


def _is_cut(error: Exception) -> bool:
    words = str(error).lower()
    return any(word in words for word in ("truncated", "unexpected end", "not enough", "incomplete")) or isinstance(
        error, EOFError
    )


def _as_rgb(picture: Image.Image) -> Photo:
    """Without colour, grey in all three channels; an opaque alpha channel is no oddity."""
    oddities = []
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _eight_bits(picture)
        oddities.append(SIXTEEN_BIT)
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        if np.asarray(with_alpha)[..., 3].min() < 255:
            oddities.append(ALPHA)
        white = Image.new("RGBA", picture.size, "white")
        grey = picture.mode in ("L", "LA", "La", "1")
        picture = Image.alpha_composite(white, with_alpha).convert("L" if grey else "RGB")
    if picture.mode in ("L", "1"):
        oddities.append(GREYSCALE)
    elif picture.mode == "CMYK":
        oddities.append(CMYK)
    return Photo(np.asarray(picture.convert("RGB")), tuple(oddities))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion clips it."""
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        low, high = values.min(), values.max()
        raise Refused(UNREADABLE, f"its values from {low:g} to {high:g} have no known white")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
