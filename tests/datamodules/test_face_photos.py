"""Odd files, made here, are converted or refused, each under its own word."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from datamodules import face_photos
from datamodules.face_photos import Refused, read_photo

RNG = np.random.default_rng(0)
COLOURS = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((50, 60)))


def _file(picture: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_a_plain_photograph_is_what_it_is() -> None:
    photo = read_photo(_file(Image.fromarray(COLOURS)))
    assert np.array_equal(photo.pixels_HW3, COLOURS)
    assert photo.oddities == ()


def test_grey_is_put_into_all_channels() -> None:
    grey = COLOURS[..., 0]
    for picture in (Image.fromarray(grey), Image.fromarray((grey > 128).astype(np.uint8) * 255).convert("1")):
        photo = read_photo(_file(picture))
        assert photo.oddities == ("greyscale (converted)",)
        assert np.array_equal(photo.pixels_HW3, np.asarray(picture.convert("L"))[..., None].repeat(3, -1))


def test_transparent_parts_are_laid_over_white() -> None:
    alpha = np.full((60, 50), 255, np.uint8)
    alpha[:30], alpha[30:40] = 0, 128
    photo = read_photo(_file(Image.fromarray(np.dstack([COLOURS, alpha]))))
    assert photo.oddities == ("alpha (composited)",)
    assert (photo.pixels_HW3[:30] == 255).all()
    half = 255 + (COLOURS[30:40].astype(float) - 255) * 128 / 255
    assert np.abs(photo.pixels_HW3[30:40] - half).max() <= 1
    assert np.array_equal(photo.pixels_HW3[40:], COLOURS[40:])


def test_an_opaque_alpha_channel_is_no_oddity_and_a_grey_one_stays_grey() -> None:
    opaque = np.full((60, 50), 255, np.uint8)
    assert read_photo(_file(Image.fromarray(np.dstack([COLOURS, opaque])))).oddities == ()
    both = read_photo(_file(Image.fromarray(np.dstack([COLOURS[..., 0], opaque - 100]), "LA")))
    assert both.oddities == ("alpha (composited)", "greyscale (converted)")


def test_a_palette_with_a_transparent_colour_is_composited() -> None:
    picture = Image.fromarray(COLOURS).quantize(8)
    content = _file(picture, transparency=int(np.asarray(picture)[0, 0]))
    photo = read_photo(content)
    assert photo.oddities == ("alpha (composited)",)
    assert photo.pixels_HW3[0, 0].tolist() == [255, 255, 255]
    assert read_photo(_file(picture)).oddities == ()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = (COLOURS[..., 0].astype(np.uint16)) * 257
    for kind in ("png", "tiff"):
        photo = read_photo(_file(Image.fromarray(deep), kind))
        assert photo.oddities == ("16-bit (scaled)", "greyscale (converted)")
        assert np.array_equal(photo.pixels_HW3[..., 0], COLOURS[..., 0])


def test_values_without_a_known_white_are_refused() -> None:
    for values in (np.full((50, 50), 0.5, np.float32), np.full((50, 50), 70000, np.int32)):
        with pytest.raises(Refused, match=r"unreadable: its values from .* have no known white"):
            read_photo(_file(Image.fromarray(values), "tiff"))


def test_cmyk_is_converted() -> None:
    picture = Image.fromarray(COLOURS).convert("CMYK")
    photo = read_photo(_file(picture, "jpeg", quality=95))
    assert photo.oddities == ("CMYK (converted)",)
    assert np.abs(photo.pixels_HW3.astype(int) - COLOURS).mean() < 6


def test_a_photograph_taken_on_its_side_is_put_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    photo = read_photo(_file(Image.fromarray(COLOURS), exif=exif))
    assert np.array_equal(photo.pixels_HW3, np.rot90(COLOURS, -1))


def test_of_an_animation_the_first_picture_is_taken() -> None:
    frames = [Image.fromarray(np.full((50, 50, 3), value, np.uint8)) for value in (10, 200)]
    photo = read_photo(_file(frames[0], "gif", save_all=True, append_images=frames[1:]))
    assert np.abs(photo.pixels_HW3.astype(int) - 10).max() < 4


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "tiff", "bmp"])
def test_truncated_files_are_refused_wherever_they_are_cut(kind: str) -> None:
    large = np.asarray(Image.fromarray(COLOURS).resize((100, 120)))
    whole = _file(Image.fromarray(large), kind)
    reasons = set()
    for share in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(Refused) as refused:
            read_photo(whole[: int(share * len(whole))])
        reasons.add(refused.value.reason)
    assert reasons <= {
        "truncated",
        "unreadable",
    }  # a decoder that never saw the size cannot know that something is missing
    assert "truncated" in reasons or kind in ("webp", "png", "tiff")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero-byte"),
        (b"<html>not found</html>", "unreadable"),
        (b"\xff\xd8\xff" + bytes(100), "unreadable"),
        (_file(Image.fromarray(COLOURS[:39])), "too small"),
    ],
)
def test_what_is_no_photograph_is_refused_by_name(content: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        read_photo(content)
    assert refused.value.reason == reason


def test_a_picture_that_would_fill_the_memory_is_refused_unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for pixels in (1200, 3000):  # Pillow warns up to twice its limit, beyond that it raises
        with pytest.raises(Refused, match="too large"):
            read_photo(_file(Image.fromarray(np.zeros((50, pixels // 50, 3), np.uint8))))


def test_every_word_is_used_once() -> None:
    words = [
        value
        for name, value in vars(face_photos).items()
        if name.isupper() and isinstance(value, str) and name[0] != "_"
    ]
    assert len(words) == len(set(words)) == 9
