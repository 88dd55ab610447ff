"""The judge gives to files what the measures give to images, pairs them by name, and averages what there is."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from deblur import making
from deblur.making import call, saved
from torch.nn import functional as F

from experiments.deblur.judge import Judgement, _view
from experiments.errors import UserError
from lit_modules.face_judge import FaceJudge
from lit_modules.ops.image_quality import psnr, ssim


def smoothed(pixels: np.ndarray, size: int) -> np.ndarray:
    x_CHW = torch.from_numpy(pixels).permute(2, 0, 1).float()
    padded = F.pad(x_CHW, (size // 2,) * 4, mode="reflect")
    return F.avg_pool2d(padded, size, 1).round().byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A face that a blur hides and a method half restores, and a scene that it returns as it was."""
    root = tmp_path_factory.mktemp("judge")
    face, scene = making.portrait(), making.scene()
    saved(face, root / "sharp/x/face.png")
    saved(smoothed(face, 31), root / "blurred/x/face.png")
    saved(smoothed(face, 5), root / "restored/x/face.webp", lossless=True)
    for name in ("sharp", "blurred", "restored"):
        saved(scene, root / name / "scene.png")
    return root


def rows_of(file: Path) -> dict[str, dict[str, str]]:
    return {row["photograph"]: row for row in csv.DictReader(io.StringIO(file.read_text()))}


def test_a_row_per_photograph_and_a_table_of_means(folders: Path, tmp_path: Path) -> None:
    target = tmp_path / "judge.csv"
    three = [folders / name for name in ("sharp", "blurred", "restored")]
    result = call("deblur-judge", *three, "--csv", target)
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows = rows_of(target)
    assert list(rows) == ["scene", "x/face"]
    face = torch.from_numpy(making.portrait()).permute(2, 0, 1)[None].float() / 255
    for version, size in (("blurred", 31), ("restored", 5)):
        other = torch.from_numpy(smoothed(making.portrait(), size)).permute(2, 0, 1)[None].float() / 255
        assert float(rows["x/face"][f"psnr/{version}"]) == pytest.approx(float(psnr(other, face)), rel=1e-5)
        assert float(rows["x/face"][f"ssim/{version}"]) == pytest.approx(100 * float(ssim(other, face)), rel=1e-5)
    assert [rows["x/face"][f"faces/{v}"] for v in ("sharp", "blurred", "restored")] == ["1", "0", "1"]
    assert float(rows["x/face"]["prob/restored"]) > 0.9
    assert rows["x/face"]["prob/blurred"] == "0"
    assert rows["x/face"]["landmark_error/blurred"] == ""  # missing is missing
    assert rows["scene"]["psnr/blurred"] == "inf"
    assert rows["scene"]["prob/sharp"] == ""
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    table = {
        cells[0].strip(): [c.strip() for c in cells[1:]] for cells in (line.strip("|").split("|") for line in lines)
    }
    assert table[""] == ["sharp", "blurred", "restored", "gain", "recovered"]
    assert table["found, p 0.7 (%)"] == ["100.00", "0.00", "100.00", "100.00", "100 %"]
    assert table["PSNR (dB)"][0] == "-"
    assert float(table["PSNR (dB)"][1]) == pytest.approx(float(rows["x/face"]["psnr/blurred"]), abs=0.01)
    assert table["landmark error (% of eye distance)"][1] == "-"
    assert "MTCNN's indicators are of the 1 in whose sharp version" in result.output
    assert "2 images equal the sharp one" in result.output
    assert set(lines[1]) <= set("|-: ")  # the rule that makes a Markdown table of it


def test_without_restored_photographs_the_blurred_ones_are_judged(folders: Path, tmp_path: Path) -> None:
    result = call("deblur-judge", folders / "sharp", folders / "blurred", "--csv", tmp_path / "a.csv")
    assert result.exit_code == 0
    assert "recovered" not in result.output
    assert "restored" not in (tmp_path / "a.csv").read_text()


def test_photographs_without_a_partner_or_of_another_size_are_failures(folders: Path, tmp_path: Path) -> None:
    saved(making.scene(), tmp_path / "sharp/a.png")
    saved(making.scene(), tmp_path / "sharp/b.png")
    saved(making.scene(), tmp_path / "sharp/c.png")
    saved(making.scene(), tmp_path / "blurred/a.jpg")
    saved(making.scene(60, 60), tmp_path / "blurred/b.jpg")
    result = call("deblur-judge", tmp_path / "sharp", tmp_path / "blurred", "--csv", tmp_path / "a.csv")
    assert result.exit_code == 1
    assert "photographs judged, see" in result.output
    assert "failed: b: sizes differ: sharp 130 x 150, blurred 60 x 60" in result.output
    assert f"failed: c: not in {tmp_path / 'blurred'}" in result.output


def test_what_cannot_be_judged_is_refused(folders: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        result = call("deblur-judge", *words)
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)

    there = saved(making.scene(), tmp_path / "only" / "other.png")
    assert "there is no folder" in refused(folders / "sharp", tmp_path / "nowhere")
    assert "no photograph has one name in all" in refused(folders / "sharp", there.parent)
    assert "outputs exist already" in refused(folders / "sharp", folders / "blurred", "--csv", there)
    saved(making.scene(), tmp_path / "only" / "other.jpg")
    assert "have one name, other" in refused(there.parent, folders / "blurred", "--csv", tmp_path / "a.csv")
    inside = folders / "sharp" / "scene.png"
    assert "would overwrite the input" in refused(folders / "sharp", folders / "blurred", "--csv", inside, "--force")


def test_nothing_to_average_is_none() -> None:
    judgement = Judgement(["sharp", "blurred"])
    pixels = making.scene()
    judgement.add("a", {"sharp": pixels, "blurred": pixels}, FaceJudge())
    found = judgement.summary()
    assert found["psnr"]["blurred"] is None
    assert found["ssim"]["blurred"] == pytest.approx(100)
    assert found["prob"] == {"sharp": None, "blurred": None}
    assert math.isinf(judgement.rows[0]["psnr/blurred"])


def test_large_photographs_are_shrunk_for_the_detector_alone() -> None:
    assert tuple(_view(torch.zeros(1, 3, 800, 3200, dtype=torch.uint8)).shape) == (1, 3, 400, 1600)
    small = torch.zeros(1, 3, 40, 50, dtype=torch.uint8)
    assert _view(small) is small
