"""Pairs: the kernel that is written down is the one that blurred, and nothing depends on the other photographs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from deblur import making
from deblur.making import call, opened, saved

from datamodules.blur import CAMERAS, convolve, kernel_extent, preset
from datamodules.face_photos import Refused
from experiments.deblur.files import Input
from experiments.deblur.synth import Law, key_for, make_pair, png_name, side_of
from experiments.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    saved(making.scene(120, 160), tmp_path / "in" / "a.png")
    saved(making.scene(160, 120, 1), tmp_path / "in" / "b" / "a.jpg")
    saved(making.scene(100, 100), tmp_path / "in" / "b" / "a.png", exif=making.exif(6))
    return tmp_path / "in"


def manifest(out: Path) -> dict[str, dict[str, str]]:
    return {row["photograph"]: row for row in csv.DictReader(io.StringIO((out / "pairs.csv").read_text()))}


def test_the_kernel_written_down_makes_the_blurred_picture_of_the_sharp_one(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("deblur-synth", photos, out, "--preset", "near_linear", "--seed", 3, "--camera", "ideal")
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows = manifest(out)
    assert set(rows) == {"a.png", "b/a.jpg", "b/a.png"}
    assert rows["b/a.jpg"]["blurred"] == "blurred/b/a.jpg.png"
    for row in rows.values():
        sharp, blurred, kernel = (
            opened(out / row[part]).astype(np.float32) for part in ("sharp", "blurred", "kernels")
        )
        assert kernel.max() == 65535
        kernel_1KK = torch.from_numpy(kernel / kernel.sum())[None]
        expected = convolve(torch.from_numpy(sharp).permute(2, 0, 1)[None] / 255, kernel_1KK)[0].permute(1, 2, 0) * 255
        assert np.abs(expected.numpy() - blurred).max() < 0.51  # rounded to 8 bits
        assert float(row["extent_px"]) == pytest.approx(float(kernel_extent(kernel_1KK)), abs=0.05)
        side = int(row["side"])
        assert side == min(sharp.shape[:2])
        low, high = preset("near_linear").extent
        assert low * side <= float(row["drawn_extent_px"]) <= high * side
        assert float(row["extent_px"]) == pytest.approx(float(row["drawn_extent_px"]), abs=0.8)
        mse = np.square(sharp - blurred).mean() / 255**2
        assert float(row["psnr_blurred"]) == pytest.approx(-10 * np.log10(mse), abs=1e-3)
    assert (opened(out / "sharp/a.png") == opened(photos / "a.png")).all()
    assert rows["b/a.jpg"]["notes"] == "greyscale (converted)"


def test_blur_depends_on_seed_and_name_alone(photos: Path, tmp_path: Path) -> None:
    for out, words in {"all": (photos,), "one": (photos / "a.png",), "seed": (photos / "a.png", "--seed", 1)}.items():
        first, *options = words
        assert call("deblur-synth", first, tmp_path / out, *options).exit_code == 0
    made = {out: opened(tmp_path / out / "blurred/a.png") for out in ("all", "one", "seed")}
    assert (made["all"] == made["one"]).all()
    assert (made["all"] != made["seed"]).any()
    keys = {row["key"] for row in manifest(tmp_path / "all").values()}
    assert len(keys) == 3
    assert int(key_for(0, Path("a.png"))) == int(manifest(tmp_path / "one")["a.png"]["key"])


def test_extents_are_shares_of_the_face_where_it_is_asked_for(tmp_path: Path) -> None:
    picture = making.astronaut()
    side = side_of(picture, "face")
    eyes = 41  # pixels apart in this photograph, a quarter of the square
    assert side == pytest.approx(4 * eyes, rel=0.1)
    assert side_of(picture, "picture") == 512
    each = Input(saved(picture, tmp_path / "a.png"), Path("a.png"))
    _, row = make_pair(each, Law(of="face"), preset("near_linear"), CAMERAS["sensor"])
    assert (row["side"], row["side_of"]) == (side, "face")
    with pytest.raises(Refused, match=r"no face: .* --of picture"):
        side_of(making.scene(), "face")


def test_one_file_that_fails_leaves_no_row(photos: Path, tmp_path: Path) -> None:
    (photos / "empty.png").touch()
    saved(making.scene(30, 200), photos / "low.png")
    result = call("deblur-synth", photos, tmp_path / "out")
    assert result.exit_code == 1
    assert "pairs written to" in result.output
    assert ": 3; failed: 2" in result.output.replace("\n", "")
    assert "zero-byte" in result.output
    assert "too small: 200 x 30 pixels" in result.output
    assert len(manifest(tmp_path / "out")) == 3


def test_what_cannot_be_is_refused_and_nothing_is_written_over(photos: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        result = call("deblur-synth", *words)
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)

    out = tmp_path / "out"
    assert "unknown preset 'near_liner', nearest: 'near_linear'" in refused(photos, out, "--preset", "near_liner")
    assert "unknown camera 'phone'; known: ideal" in refused(photos, out, "--camera", "phone")
    assert "got 'side'" in refused(photos, out, "--of", "side")
    assert not out.exists()
    assert call("deblur-synth", photos, out).exit_code == 0
    assert "10 of 10 outputs exist already" in refused(photos, out)
    assert "would overwrite the input" in refused(out / "sharp", out, "--force")


def test_what_a_law_does_not_draw_is_missing(tmp_path: Path) -> None:
    each = Input(saved(making.scene(), tmp_path / "a.png"), Path("a.png"))
    for name, drawn in {"linear": {"angle_degrees", "exposure"}, "gaussian": set()}.items():
        _, row = make_pair(each, Law(name), preset(name), CAMERAS["ideal"])
        assert {
            key for key in ("angle_degrees", "exposure", "anxiety", "inertia", "impulse") if row[key] != ""
        } == drawn
    made, row = make_pair(each, Law("none"), preset("none"), CAMERAS["ideal"])
    assert (made[0] == made[1]).all()
    assert row["drawn_extent_px"] == ""
    assert row["psnr_blurred"] == float("inf")


def test_names_of_pngs() -> None:
    assert png_name(Path("b/a.jpg")) == Path("b/a.jpg.png")
    assert png_name(Path("b/a.PNG")) == Path("b/a.PNG")
