"""A photograph read and written again is the same photograph, upright; what would not be is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from deblur import making
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from datamodules.face_photos import Refused
from experiments.deblur.photographs import Photograph, _upright_exif, as_bytes_rgb, encode, read


def again(file: Path) -> tuple[Photograph, Image.Image]:
    """Read a file, write what was read over it, and open that."""
    photograph = read(file)
    file.write_bytes(encode(photograph, photograph.pixels_HWC))
    return photograph, Image.open(file)


@pytest.mark.parametrize(
    ("suffix", "settings"),
    [
        (".png", {}),
        (".tif", {}),
        (".tif", {"compression": "tiff_lzw"}),
        (".bmp", {}),
        (".ppm", {}),
        (".webp", {"lossless": True}),
    ],
)
def test_lossless_formats_come_back_to_the_bit(suffix: str, settings: dict, tmp_path: Path) -> None:
    pixels = making.scene()
    file = making.saved(pixels, tmp_path / f"a{suffix}", **settings)
    before = Image.open(file)
    photograph, after = again(file)
    assert (photograph.pixels_HWC == pixels).all()
    assert photograph.alpha_HW is None
    assert (np.asarray(after) == pixels).all()
    assert (after.format, after.mode) == (before.format, before.mode)
    assert after.info.get("compression") == before.info.get("compression")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_comes_out_upright_with_the_rest_of_its_exif_to_the_byte(orientation: int, tmp_path: Path) -> None:
    exif = making.exif(orientation)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = making.portrait()
    file = making.saved(pixels, tmp_path / "a.jpg", exif=exif, icc_profile=profile, dpi=(300, 300), quality=95)
    seen = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    photograph, after = again(file)
    assert (photograph.pixels_HWC == seen).all()
    assert after.size == (seen.shape[1], seen.shape[0])
    assert np.abs(np.asarray(after).astype(int) - seen).mean() < 2  # another orientation is off by more than 20
    assert after.getexif()[0x0112] == 1
    big = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00%c"
    little = b"\x12\x01\x03\x00\x01\x00\x00\x00%c\x00"
    entry = little if orientation % 2 else big
    assert exif.count(entry % orientation) == 1
    assert after.info["exif"] == exif.replace(entry % orientation, entry % 1)
    assert after.info["icc_profile"] == profile
    assert after.info["dpi"] == (300, 300)


def test_the_thumbnail_in_the_exif_is_unlinked_and_what_is_cut_short_is_left_alone() -> None:
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    directory = b"II*\x00\x08\x00\x00\x00\x01\x00" + entry
    thumbnail = b"\x00\x00\x00\x00\x00\x00pixels"
    exif = b"Exif\x00\x00" + directory + b"\x1a\x00\x00\x00" + thumbnail
    upright = directory.replace(b"\x06", b"\x01")
    assert _upright_exif(exif) == b"Exif\x00\x00" + upright + bytes(4) + thumbnail
    assert _upright_exif(directory) == upright
    for broken in (b"", b"Exif\x00\x00", b"II*\x00\xff\xff\xff\x7f", b"nothing of the kind", exif[:20]):
        assert _upright_exif(broken) == broken


def test_of_several_views_in_a_jpeg_the_first_is_taken_and_it_is_said(tmp_path: Path) -> None:
    first, second = (Image.fromarray(making.portrait(left)) for left in (0, 10))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    photograph, after = again(tmp_path / "a.jpg")
    assert photograph.pixels_HWC.shape == (240, 250, 3)
    assert "further pictures in its file" in photograph.note
    assert after.format == "JPEG"


def test_jpeg_keeps_how_colour_is_sampled_and_an_xmp_that_is_upright_now(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" b="6"/></x:xmpmeta>'
    file = making.saved(
        making.scene(), tmp_path / "a.jpg", exif=making.exif(6), xmp=xmp, subsampling=0, progressive=True
    )
    _, after = again(file)
    assert after.layer == Image.open(making.saved(making.scene(), tmp_path / "b.jpg", subsampling=0)).layer  # type: ignore[attr-defined]
    assert after.info["progressive"]
    assert after.info["xmp"] == xmp.replace(b'Orientation="6"', b'Orientation="1"')


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_png_and_tiff_come_out_upright_with_their_words(suffix: str, tmp_path: Path) -> None:
    pixels, file = making.scene(), tmp_path / f"a{suffix}"
    words = PngImagePlugin.PngInfo()
    words.add_text("Author", "N. N.")
    exif = Image.Exif()
    exif.update({0x010F: "Maker", 0x0112: 8})
    making.saved(pixels, file, exif=exif, **({"pnginfo": words} if suffix == ".png" else {}))
    photograph, after = again(file)
    assert (photograph.pixels_HWC == np.rot90(pixels)).all()
    assert (np.asarray(after) == np.rot90(pixels)).all()
    assert (np.asarray(ImageOps.exif_transpose(after)) == np.rot90(pixels)).all()
    assert after.getexif()[0x010F] == "Maker"
    if suffix == ".png":
        assert after.info["Author"] == "N. N."


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_kept_and_so_is_what_lies_under_it(suffix: str, tmp_path: Path) -> None:
    pixels = making.scene(channels=4)
    pixels[:40, :, 3] = 0
    file = making.saved(
        pixels, tmp_path / f"a{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {})
    )
    photograph, after = again(file)
    assert (photograph.pixels_HWC == pixels[..., :3]).all()
    assert photograph.alpha_HW is not None
    assert (np.asarray(after) == pixels).all()


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(making.scene()).quantize(16)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", transparency=0)
    photograph, after = again(tmp_path / "a.png")
    assert (photograph.pixels_HWC == np.asarray(picture.convert("RGB"))).all()
    assert after.mode == "RGB"
    assert again(tmp_path / "b.png")[1].mode == "RGBA"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_grey_stays_grey(suffix: str, tmp_path: Path) -> None:
    file = making.saved(making.scene(channels=1), tmp_path / f"a{suffix}")
    photograph, after = again(file)
    assert photograph.pixels_HWC.shape == (150, 130, 1)
    assert after.mode == "L"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_of_16_bits_keeps_them(suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (60, 50), dtype=np.uint16)
    file = making.saved(values, tmp_path / f"a{suffix}")
    photograph, after = again(file)
    assert photograph.white == 65535
    assert (photograph.pixels_HWC[..., 0] == values).all()
    assert (np.asarray(after) == values).all()
    assert (as_bytes_rgb(photograph.pixels_HWC)[..., 2] == np.round(values / 257)).all()


def test_what_would_not_come_back_as_it_was_is_refused(tmp_path: Path) -> None:
    scene = Image.fromarray(making.scene())
    scene.convert("CMYK").save(tmp_path / "cmyk.jpg")
    scene.convert("1").save(tmp_path / "tones.png")
    scene.save(tmp_path / "moves.gif", save_all=True, append_images=[scene.rotate(90)])
    scene.save(tmp_path / "icon.ico")
    (tmp_path / "deep.png").write_bytes(deep_png())
    for name, why in {
        "cmyk.jpg": "CMYK, for print.*convert it to RGB",
        "tones.png": "two tones",
        "moves.gif": "several pictures in one file: .* stack of 2",
        "icon.ico": "ICO files cannot be written",
        "deep.png": "16 bits per channel.*save it with 8",
    }.items():
        with pytest.raises(Refused, match=why):
            read(tmp_path / name)


def test_broken_files_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    whole = {suffix: making.as_file(making.scene(), suffix) for suffix in ("PNG", "JPEG", "TIFF", "WEBP")}
    for suffix, content in whole.items():
        (tmp_path / suffix).write_bytes(content[: len(content) // 2])
        with pytest.raises(Refused, match=r"unreadable: .+"):
            read(tmp_path / suffix)
    (tmp_path / "empty.png").touch()
    with pytest.raises(Refused, match="zero-byte"):
        read(tmp_path / "empty.png")
    (tmp_path / "words.jpg").write_text("not an image")
    with pytest.raises(Refused, match="no image format that is known"):
        read(tmp_path / "words.jpg")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.png")


def test_pillow_s_limit_is_lifted_for_the_reading_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = making.saved(making.scene(), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read(file).pixels_HWC.shape == (150, 130, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_other_pixels_than_the_photograph_s_are_not_written(tmp_path: Path) -> None:
    photograph = read(making.saved(making.scene(), tmp_path / "a.png"))
    with pytest.raises(ValueError, match="float32"):
        encode(photograph, photograph.pixels_HWC.astype(np.float32))


def deep_png() -> bytes:
    """A PNG of RGB with 16 bits each, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(6 * 50) for _ in range(50))
    header = struct.pack(">IIBBBBB", 50, 50, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
