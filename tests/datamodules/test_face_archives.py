"""LFW, Olivetti and CelebA in their official formats, made here of drawn faces; what is downloaded is whole or set aside."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import face_crops, sources
from datamodules.face_archives import CelebA, Lfw
from datamodules.faces import load_faces
from datamodules.procedural_faces import draw_face
from datamodules.sources import DataUnavailable


@pytest.fixture(scope="module")
def portraits() -> list[Image.Image]:
    """Four drawn faces of 120 x 120 pixels."""
    return [Image.fromarray(draw_face("test", index, 96).pixels_HW3) for index in range(4)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DATA_ROOT where only what is at hand is tried."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local")
    monkeypatch.setattr(sources, "PROJECT", tmp_path / "project")
    return tmp_path


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "jpeg")
    return file.getvalue()


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def test_lfw_is_a_folder_per_person_and_complete_or_not_lfw(
    root: Path, portraits: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, picture in enumerate(portraits[:3]):
        _put(root / "lfw_home" / "lfw_funneled" / f"Person_{i % 2}" / f"Person_{i % 2}_000{i}.jpg", _jpeg(picture))
    with pytest.raises(DataUnavailable, match="holds 3 image files, LFW has 13233"):
        load_faces("lfw")
    monkeypatch.setattr(Lfw, "n", 3)
    found = load_faces("lfw")
    assert (found.card.name, found.card.source) == (
        "LFW (funneled)",
        "official files in lfw_funneled/ of the data root",
    )
    assert Counter(found.people_N.tolist()) == {"Person_0": 2, "Person_1": 1}


def test_lfw_is_downloaded_by_scikit_learn_and_a_half_one_set_aside(
    root: Path, portraits: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sklearn.datasets

    def fetch(data_home: Path, color: bool, **options: object) -> None:
        assert color
        _put(Path(data_home) / "lfw_home" / "lfw_funneled" / "A" / "A_0001.jpg", _jpeg(portraits[0]))

    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local,official")
    monkeypatch.setattr(sklearn.datasets, "fetch_lfw_people", fetch)
    monkeypatch.setattr(Lfw, "n", 1)
    (root / "lfw").mkdir()
    (root / "lfw" / "mine.txt").write_text("someone's")
    assert load_faces("lfw").card.source == "official download (scikit-learn)"
    aside = list(root.glob("lfw.incomplete-*"))
    assert [(folder / "mine.txt").read_text() for folder in aside] == ["someone's"]
    assert not (root / ".fetch-lfw").exists()


def test_olivetti_faces_are_grey_ten_to_a_person(
    root: Path, portraits: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sklearn.datasets
    from sklearn.utils import Bunch

    drawn = [np.asarray(draw_face("val", i, 48).pixels_HW3)[..., 1] for i in range(12)]  # 60 x 60 pixels
    images = np.stack([np.asarray(Image.fromarray(d).resize((64, 64), Image.Resampling.BICUBIC)) for d in drawn]) / 255

    def fetch(data_home: Path, download_if_missing: bool = True, **options: object) -> Bunch:
        if not (Path(data_home) / "olivetti_py3.pkz").exists():
            if not download_if_missing:
                raise OSError("Data not found")
            _put(Path(data_home) / "olivetti_py3.pkz", b"x")
        return Bunch(images=images.astype(np.float32))

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", fetch)
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local,official")
    found = load_faces("olivetti", 32)
    assert found.card.name == "Olivetti faces (greyscale, as RGB)"
    assert found.card.source == "official download (scikit-learn)"
    assert f"{found.card.n} greyscale (converted)" in found.card.note
    assert set(found.people_N.tolist()) <= {"s01", "s02"}
    assert found.card.n >= 10
    assert (found.crops_NSS3[..., 0] == found.crops_NSS3[..., 2]).all()
    assert load_faces("olivetti", 32).card.source == "scikit-learn's copy in the data root"


def _write_celeba(home: Path, portraits: list[Image.Image]) -> None:
    names = [f"00000{i + 1}.jpg" for i in range(4)]
    for name, picture in zip(names, portraits, strict=False):
        _put(home / "img_align_celeba" / name, _jpeg(picture))
    points = [draw_face("test", i, 96).points_52.round().astype(int).reshape(-1).tolist() for i in range(4)]
    lists = {
        "list_eval_partition.txt": [f"{name} {split}" for name, split in zip(names, (0, 1, 2, 0), strict=True)],
        "identity_CelebA.txt": [f"{name} {person}" for name, person in zip(names, (7, 8, 9, 7), strict=True)],
        "list_landmarks_align_celeba.txt": [
            "4",
            "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x ...",
        ]
        + [f"{name}  {' '.join(map(str, five))}" for name, five in zip(names, points, strict=True)],
    }
    for file, lines in lists.items():
        (home / file).write_text("\n".join(lines) + "\n")


def test_celeba_brings_its_own_split_people_and_points(
    root: Path, portraits: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_celeba(root / "celeba", portraits)
    with pytest.raises(DataUnavailable, match="holds 4 files, CelebA has 202599"):
        load_faces("celeba")
    monkeypatch.setattr(CelebA, "n", 4)
    monkeypatch.setattr(face_crops, "detect_faces", None)  # nothing is to be looked for
    found = load_faces("celeba")
    rows = dict(
        zip(found.names_N.tolist(), zip(found.people_N.tolist(), found.splits_N.tolist(), strict=True), strict=True)
    )
    assert rows["000001.jpg"] == rows["000004.jpg"] == ("7", "train")
    assert (rows["000002.jpg"], rows["000003.jpg"]) == (("8", "val"), ("9", "test"))
    assert CelebA().measure()[0] == found.card.sha256
