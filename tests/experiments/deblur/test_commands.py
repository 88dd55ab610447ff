"""`fivefold deblur` from the command line: what it writes, what it leaves alone, what it refuses, and how it ends."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from deblur import making
from deblur.making import call, opened, saved
from PIL import Image

from experiments.errors import UserError


def refused(*words: object) -> str:
    result = call(*words)
    assert isinstance(result.exception, UserError), result.output + repr(result.exception)
    return str(result.exception)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A face, scenes of every kind and broken files, in sub-folders."""
    root = tmp_path / "photos"
    saved(making.portrait(), root / "face.png")
    saved(making.scene(), root / "none" / "scene.png")
    saved(making.scene(channels=4), root / "kinds" / "alpha.png")
    saved(making.scene(channels=1), root / "kinds" / "grey.png")
    deep = making.scene(channels=1).astype(np.uint16) * 257
    saved(deep[..., 0], root / "kinds" / "deep.png")
    saved(making.scene(), root / "kinds" / "turned.jpg", exif=making.exif(6))
    return root


def broken(root: Path) -> None:
    (root / "empty.jpg").touch()
    (root / "cut.png").write_bytes(making.as_file(making.scene(), "PNG")[:2000])
    Image.fromarray(making.scene()).convert("CMYK").save(root / "print.jpg")


def test_whole_photographs_through_the_identity_come_back_to_the_bit(home: Path, folder: Path) -> None:
    """At the borders of tiles too: 150 x 130 pixels are 16 tiles of 64, and also where the largest face sets the scale."""
    making.run(home, making.identity)
    result = call("deblur", folder, home / "out", "--whole", "--shrink", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "photographs written: 6; failed: 0" in result.output
    assert "naf_full on faces, seed 0 (small), run ab12000000" in result.output
    for name in ("face.png", "none/scene.png", "kinds/alpha.png", "kinds/grey.png", "kinds/deep.png"):
        before, after = opened(folder / name), opened(home / "out" / name)
        assert (before == after).all(), name
        assert (before.dtype, before.shape) == (after.dtype, after.shape), name
    assert "note" not in result.output
    again = call("deblur", folder, home / "scaled", "--whole", "--device", "cpu")
    assert again.output.count("no face found: restored at its own size; --shrink F where faces are larger than 64") == 5
    assert re.search(
        r"face.png: restored at 1/2.[4-8]\d of its size, where its largest face is 64 pixels", again.output
    )
    assert (opened(home / "scaled/face.png") == opened(folder / "face.png")).all()
    turned = Image.open(home / "out/kinds/turned.jpg")
    assert turned.size == (150, 130)
    assert turned.getexif()[0x0112] == 1


def test_faces_change_and_nothing_around_them(home: Path, folder: Path) -> None:
    making.run(home, making.brighter)
    result = call("deblur", folder, home / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    before, after = opened(folder / "face.png").astype(int), opened(home / "out/face.png").astype(int)
    assert before.shape == after.shape
    x0, y0, x1, y1 = np.array(making.FACE) - [100, 20, 100, 20]
    change, face = after - before, np.s_[y0 + 10 : y1 - 10, x0 + 10 : x1 - 10]
    assert (np.abs(change[face] - np.minimum(26, 255 - before[face])) <= 2).mean() > 0.95
    assert (change[-40:] == 0).all()
    side = 164  # of the square in this photograph, four times the distance of the eyes
    assert (change != 0).any(-1).sum() == pytest.approx(side**2, rel=0.1)
    for name in ("none/scene.png", "kinds/turned.jpg"):
        assert (folder / name).read_bytes() == (home / "out" / name).read_bytes()
    assert result.output.count("no face found: copied as it is; --whole restores all of it") == 5


def test_strength_0_is_the_photograph_and_half_is_between(home: Path, folder: Path) -> None:
    making.run(home, making.brighter)
    face = saved(making.portrait() // 2, folder / "face.png")  # so that nothing reaches white
    for mode in ("--whole", "--faces"):
        changes = []
        for strength in (0, 0.5, 1):
            out = home / f"{strength}{mode}.png"
            assert call("deblur", face, out, mode, "--strength", strength, "--device", "cpu").exit_code == 0
            changes.append(opened(out).astype(int) - opened(face))
        assert (changes[0] == 0).all()
        assert changes[1].max() == 13
        assert changes[2].max() == 26


def test_pictures_to_look_at_lie_beside(home: Path, folder: Path) -> None:
    making.run(home, making.brighter)
    words = ("deblur", folder / "face.png", home / "out", "--compare", "--overlay", "--device", "cpu")
    assert call(*words).exit_code == 0
    names = {file.name for file in (home / "out").iterdir()}
    assert names == {"face.png", "face.png.compare.png", "face.png.faces.png"}
    sheet = Image.open(home / "out/face.png.compare.png")
    assert sheet.size == (3 * 388, 22 + 388)
    before, after, difference = (np.asarray(sheet)[40:380, left : left + 340].mean() for left in (20, 408, 796))
    assert after > before + 10
    assert difference > 128 + 60  # four times 26, round grey
    drawn = np.asarray(Image.open(home / "out/face.png.faces.png"))
    boxes = (drawn == (40, 230, 90)).all(-1).sum(0)
    assert boxes[: drawn.shape[1] // 2].sum() > 100
    assert boxes[drawn.shape[1] // 2 :].sum() > 100
    assert "3 outputs exist already" not in refused(*words[:3], "--force", "--sure", 2)
    assert "3 of 3 outputs exist already" in refused(*words)
    assert call(*words, "--force", "--whole").exit_code == 0


def test_broken_files_are_noted_and_the_rest_is_done(home: Path, folder: Path) -> None:
    making.run(home, making.identity)
    broken(folder)
    result = call("deblur", folder, home / "out", "--whole", "--device", "cpu")
    assert result.exit_code == 1
    assert "photographs written: 6; failed: 3" in result.output
    for name, why in {"empty.jpg": "zero-byte", "cut.png": "unreadable", "print.jpg": "it is CMYK"}.items():
        assert f"failed: {folder / name}: " in result.output
        assert why in result.output
        assert not (home / "out" / name).exists()
    assert not list((home / "out").rglob(".*"))  # nothing half written


def test_an_input_is_never_written_over(home: Path, folder: Path) -> None:
    making.run(home, making.brighter)
    (home / "alias").symlink_to(folder)
    face = folder / "face.png"
    content = face.read_bytes()
    shutil.copytree(folder, home / "out")
    (home / "out" / "face.png").unlink()
    (home / "out" / "face.png").symlink_to(face)
    for out in (folder, home / "alias", home / "out"):
        assert "would overwrite the input" in refused("deblur", folder, out, "--force")
    assert "would overwrite the input" in refused("deblur", face, face, "--force")
    assert face.read_bytes() == content


def test_where_to_write_to(home: Path, folder: Path) -> None:
    making.run(home, making.identity)
    face, file = folder / "face.png", saved(making.scene(), home / "there.png")
    assert call("deblur", face, home / "new" / "name.png", "--whole", "--device", "cpu").exit_code == 0
    assert (opened(home / "new" / "name.png") == opened(face)).all()
    assert call("deblur", f"{folder}/k*/a*.png", home / "out", "--whole", "--device", "cpu").exit_code == 0
    assert (home / "out/kinds/alpha.png").exists()
    for words, why in {
        (folder, file): "is a file; 6 photographs need a folder",
        (face, home / "a.jpg"): "outputs are of the format of their input",
        (face, file): "1 of 1 outputs exist already",
        (face,): "PHOTOS... OUT",
        (): "got nothing",
        (home / "nowhere", home / "out"): "there is no",
    }.items():
        assert why in refused("deblur", *words)


def test_bad_options_are_refused_before_anything_is_read(home: Path, folder: Path) -> None:
    making.run(home, making.identity)
    for words, why in {
        ("--strength", 1.5): "--strength must lie between 0 and 1, got 1.5",
        ("--sure", -1): "--sure must lie",
        ("--tile", 10): "a tile must be at least 64 pixels, got 10",
        ("--overlap", 400): "half a tile of 64 pixels, got 400",
        ("--shrink", 0.5): "--shrink must lie between 1 and 1000, got 0.5",
        ("--largest", 0): "--largest must lie",
        ("--device", "tpu:7"): "device 'tpu:7' cannot be used",
        ("--weights", "naf_ful"): "nearest valid: 'naf_full'",
    }.items():
        assert why in refused("deblur", folder, home / "out", *words)
    assert not (home / "out").exists()


def test_without_weights_it_says_how_to_get_some(home: Path, folder: Path) -> None:
    assert "`make reproduce-paper-2` trains" in refused("deblur", folder, home / "out")
    making.run(home, making.identity)
    result = call("deblur", "--card")
    assert result.exit_code == 0
    assert "Not for identification" in " ".join(result.output.split())
