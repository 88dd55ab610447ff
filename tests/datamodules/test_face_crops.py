"""Finding the one face of a picture; and the shared photographs, where they are."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import face_crops, faces, sources
from datamodules.face_sources import Folder, person_of
from datamodules.faces import load_faces
from datamodules.procedural_faces import draw_face
from datamodules.sources import DataUnavailable

REAL = Path(os.environ.get("DATA_ROOT", "nowhere")) / "faces"
real = pytest.mark.skipif(not (REAL / "images").is_dir(), reason="there is no faces/images under DATA_ROOT")


@pytest.fixture(scope="module")
def portraits() -> list[Image.Image]:
    """Two drawn faces of 120 x 120 pixels."""
    return [Image.fromarray(draw_face("test", index, 96).pixels_HW3) for index in range(2)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DATA_ROOT where only what is at hand is tried."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local")
    monkeypatch.setattr(sources, "PROJECT", tmp_path / "project")
    return tmp_path


def test_a_large_photograph_is_searched_small_and_cut_from_the_original(portraits: list[Image.Image]) -> None:
    large = portraits[0].resize((1600, 1600), Image.Resampling.BICUBIC)
    wide = Image.new("RGB", (2000, 1600), "grey")
    wide.paste(large, (400, 0))
    small = face_crops.find_points(np.asarray(portraits[0]))
    found = face_crops.find_points(np.asarray(wide))
    assert np.abs((found - [400, 0] + 0.5) * 120 / 1600 - 0.5 - small).max() < 2.4  # a tenth of the eyes' distance


def test_a_small_face_in_the_background_does_not_count(portraits: list[Image.Image]) -> None:
    scene = Image.new("RGB", (240, 120), "grey")
    scene.paste(portraits[0], (0, 0))
    scene.paste(portraits[1].resize((52, 52), Image.Resampling.LANCZOS), (170, 30))
    assert (
        np.abs(face_crops.find_points(np.asarray(scene)) - face_crops.find_points(np.asarray(portraits[0]))).max() < 2.4
    )


def test_people_and_their_files_of_the_shared_photographs() -> None:
    assert person_of("congress__A000055.jpg") == "congress A000055"
    assert person_of("london_neutral__001_03.jpg") == person_of("london_smiling__001_08.jpg") == "london 001"
    assert person_of("canada__003f.jpg") == "canada 003f"


@real
def test_the_shared_photographs_are_the_pinned_ones_of_681_people(root: Path) -> None:
    (root / "faces").symlink_to(REAL)
    source = faces.source_of("faces")
    assert source.local() == "files in faces/ of the data root"
    pictures = list(source.pictures())
    assert (len(pictures), len({picture.person for picture in pictures})) == (783, 681)
    assert Counter(picture.person.split()[0] for picture in pictures) == {"congress": 539, "london": 204, "canada": 40}
    assert Counter(Counter(picture.person for picture in pictures).values()) == {1: 579, 2: 102}


@real
def test_points_that_are_kept_are_those_that_mtcnn_finds(root: Path) -> None:
    (root / "faces").symlink_to(REAL)
    for picture in list(faces.source_of("faces").pictures())[::90]:
        pixels = np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB"))
        eyes = np.linalg.norm(picture.points_52[1] - picture.points_52[0])
        assert np.abs(face_crops.find_points(pixels) - picture.points_52).max() < 0.15 * eyes


@real
def test_a_changed_copy_of_the_shared_photographs_is_refused_under_their_name(root: Path) -> None:
    (root / "faces" / "images").mkdir(parents=True)
    for file in sorted((REAL / "images").iterdir())[:5]:
        shutil.copy(file, root / "faces" / "images" / file.name)
    shutil.copy(REAL / "landmarks.csv", root / "faces" / "landmarks.csv")
    with pytest.raises(DataUnavailable, match=r"the 5 images and landmarks.csv .* pinned is .*photos:"):
        load_faces("faces")
    with open(root / "faces" / "landmarks.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 783
    mine = load_faces("photos:faces/images")
    assert (mine.card.n, mine.card.real) == (5, True)
    assert isinstance(faces.source_of("photos:faces/images"), Folder)
