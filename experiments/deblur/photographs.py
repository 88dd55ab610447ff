"""Photographs in and out with all that is theirs: orientation, EXIF, colour profile, alpha, depth, format.

Legend: H height, W width, C channels, 1 of grey or 3 of RGB.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from datamodules.face_photos import EMPTY, TOO_LARGE, UNREADABLE, Refused

QUALITY = 95  # of the lossy formats
LARGEST = 1 << 29  # pixels, 1.5 GB of bytes: above it a mistake is likelier than a photograph
WRITTEN = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
LOSSLESS_TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")
LAYOUT = frozenset((*range(254, 270), 273, *range(277, 282), 284, 317, *range(320, 333), 338, 339, *range(512, 533)))
"""TIFF's tags on how pixels are laid out in the file. The others say what the picture is."""
SIXTEEN_BIT_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I")
TAKEN = {"L": "L", "RGB": "RGB", "LA": "LA", "RGBA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "PA": "RGBA"}
WHY_NOT = {
    "1": "it is of two tones, black and white, which no photograph is",
    "CMYK": "it is CMYK, for print, and would not come back from RGB as it was; convert it to RGB first",
}
NOTES = {
    "MPO": "further pictures in its file, such as a depth or gain map, are left out",
    "GIF": "a GIF has 256 colours, which are chosen anew: pixels may change anywhere",
}
SEVERAL, NOT_TAKEN = "several pictures in one file", "of a kind that is not taken"


@dataclass(frozen=True)
class Photograph:
    """An upright photograph, and what its file is written with.

    pixels (H, W, C) and alpha (H, W), None where it has none, both uint8 or both uint16; `format` and `settings` are
    Pillow's; `note` says what of the file will not come back.
    """

    pixels_HWC: np.ndarray
    alpha_HW: np.ndarray | None
    format: str
    settings: dict[str, Any]
    note: str = ""

    @property
    def white(self) -> int:
        """The largest value."""
        return int(np.iinfo(self.pixels_HWC.dtype).max)


def read(file: Path) -> Photograph:
    """Read an image file: upright as its EXIF orientation says, and nothing else changed.

    Raises:
        Refused: zero-byte, unreadable or truncated files, with what the decoder said; animations; 16-bit colour, which Pillow
            reads as 8-bit; two tones, CMYK and what else is neither grey nor RGB; formats that cannot be written.
        OSError: it cannot be opened.
    """
    content = file.read_bytes()
    if not content:
        raise Refused(EMPTY)
    try:
        with _large_ones_too(), Image.open(io.BytesIO(content)) as opened:
            _check(opened, content)
            opened.load()
            settings = _settings(opened, content)
            upright = ImageOps.exif_transpose(opened)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused(UNREADABLE, "it is of no image format that is known here") from None
    except Exception as error:  # decoders of broken files raise what they will
        raise Refused(UNREADABLE, str(error) or type(error).__name__) from None
    pixels, alpha = _channels(upright)
    form = "JPEG" if opened.format == "MPO" else str(opened.format)
    return Photograph(pixels, alpha, form, settings, NOTES.get(str(opened.format), ""))


def encode(photograph: Photograph, pixels_HWC: np.ndarray) -> bytes:
    """Return the file of a photograph with other pixels, of the same shape and type."""
    if pixels_HWC.shape != photograph.pixels_HWC.shape or pixels_HWC.dtype != photograph.pixels_HWC.dtype:
        raise ValueError(f"pixels are {pixels_HWC.dtype} {pixels_HWC.shape}, of a photograph of another kind")
    planes = pixels_HWC if photograph.alpha_HW is None else np.dstack([pixels_HWC, photograph.alpha_HW])
    picture = Image.fromarray(np.ascontiguousarray(planes[..., 0] if planes.shape[-1] == 1 else planes))
    file = io.BytesIO()
    picture.save(file, photograph.format, **photograph.settings)
    return file.getvalue()


def as_bytes_rgb(pixels_HWC: np.ndarray) -> np.ndarray:
    """Return pixels as uint8 RGB (H, W, 3), to be looked at."""
    if pixels_HWC.dtype == np.uint16:
        pixels_HWC = ((pixels_HWC.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.array(np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3)), order="C")


@contextmanager
def _large_ones_too() -> Iterator[None]:
    """Pillow warns of pictures of 90 million pixels and refuses those of twice as many; cameras make them."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check(opened: Image.Image, content: bytes) -> None:
    """Refuse, before it is decoded, what could only be written as something else."""
    width, height = opened.size
    if width * height > LARGEST:
        raise Refused(TOO_LARGE, f"{width} x {height} pixels")
    if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:  # of an MPO the others are views of the first
        raise Refused(SEVERAL, f"an animation or a stack of {opened.n_frames}; take the pictures out")  # type: ignore[attr-defined]
    if opened.format not in (*WRITTEN, "MPO"):
        raise Refused(NOT_TAKEN, f"{opened.format} files cannot be written here; convert it to PNG or JPEG first")
    bits = 8
    if opened.format == "PNG" and content[25] in (2, 4, 6):  # colour, or grey with alpha
        bits = content[24]
    elif opened.format == "TIFF" and len(depths := opened.tag_v2.get(258, (8,))) > 1:  # type: ignore[attr-defined]
        bits = max(depths)
    if bits > 8:
        raise Refused(NOT_TAKEN, f"{bits} bits per channel; with colour or alpha only 8 are read: save it with 8 first")
    if opened.mode in WHY_NOT:
        raise Refused(NOT_TAKEN, WHY_NOT[opened.mode])
    if opened.mode not in (*TAKEN, *SIXTEEN_BIT_GREY, "P"):
        raise Refused(NOT_TAKEN, f"its mode is {opened.mode}; convert it to RGB or to grey first")


def _channels(picture: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Return grey or RGB values, and alpha."""
    if picture.mode in SIXTEEN_BIT_GREY:
        values = np.asarray(picture)
        if picture.mode == "I" and not (values.min() >= 0 and values.max() <= 65535):
            raise Refused(NOT_TAKEN, f"its values from {values.min()} to {values.max()} have no known white")
        return values.astype(np.uint16)[..., None], None
    mode = TAKEN.get(picture.mode, "RGB")
    if picture.has_transparency_data:
        mode = "LA" if mode in ("L", "LA") else "RGBA"
    values = np.asarray(picture.convert(mode))
    if mode == "L":
        return values[..., None], None
    return (values[..., :-1], values[..., -1]) if mode in ("LA", "RGBA") else (values, None)


def _settings(opened: Image.Image, content: bytes) -> dict[str, Any]:
    """What the format's encoder is to be given, so that all but the pixels stays as it was."""
    info = opened.info
    settings = {name: info[name] for name in ("icc_profile", "dpi", "comment") if info.get(name)}
    if exif := info.get("exif"):
        settings["exif"] = _upright_exif(exif)
    if xmp := info.get("xmp"):
        settings["xmp"] = _upright_xmp(xmp)
    if opened.format in ("JPEG", "MPO"):
        settings |= {"quality": QUALITY, "progressive": bool(info.get("progressive"))}
        settings["subsampling"] = max(0, JpegImagePlugin.get_sampling(opened))
    elif opened.format == "PNG":
        settings["pnginfo"] = _texts(opened)
    elif opened.format == "WEBP":
        settings |= {"quality": QUALITY, "lossless": b"VP8L" in content, "exact": True}
    elif opened.format == "AVIF":
        settings["quality"] = QUALITY
    elif opened.format == "TIFF":
        squeezed = info.get("compression")
        settings["compression"] = squeezed if squeezed in LOSSLESS_TIFF else "tiff_adobe_deflate"
        settings["exif"] = exif = opened.getexif()
        for tag in LAYOUT | {ExifTags.Base.Orientation}:
            exif.pop(tag, None)
    return settings


def _upright_exif(exif: bytes) -> bytes:
    """Set the orientation to 1 where it stands, and unlink the thumbnail, which is of the photograph as it was. Nothing is
    moved: makers' notes point to places in the whole.
    """
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "little", b"MM": "big"}.get(exif[start : start + 2])
    if order is None:
        return exif

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[start + at : start + at + size], order)  # type: ignore[arg-type]

    first = number(4, 4) + 2
    end = first + 12 * number(first - 2, 2)
    patches = [(end, bytes(4))]  # where the directory of the thumbnail is said to be
    for entry in range(first, end, 12):
        if number(entry, 2) == ExifTags.Base.Orientation:
            patches.append((entry + 8, (1).to_bytes(2, order)))  # type: ignore[arg-type]
    whole = bytearray(exif)
    for at, new in patches:
        if start + at + len(new) <= len(whole):
            whole[start + at : start + at + len(new)] = new
    return bytes(whole)


def _upright_xmp(xmp: bytes) -> bytes:
    return re.sub(rb"(tiff:Orientation(?:=[\"']|>))[0-9]", rb"\g<1>1", xmp)


def _texts(opened: Any) -> PngImagePlugin.PngInfo:
    """What is written in a PNG, but for what Pillow keeps apart."""
    texts = PngImagePlugin.PngInfo()
    for name, text in getattr(opened, "text", {}).items():
        if name == "XML:com.adobe.xmp":
            texts.add_itxt(name, _upright_xmp(text.encode()).decode())
        elif not name.startswith("Raw profile type"):
            texts.add_text(name, str(text))
    return texts
