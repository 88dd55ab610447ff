"""Sets of faces: odd files are counted, people never straddle splits, files are whole, and nothing is substituted."""

from __future__ import annotations

import io
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import face_crops, faces, sources
from datamodules.face_align import TEMPLATE_52
from datamodules.face_archives import Lfw
from datamodules.faces import content_sha256, face_card, is_faces, load_faces, split_of
from datamodules.procedural_faces import draw_face
from datamodules.sources import DataUnavailable, UnknownData


@pytest.fixture(scope="module")
def portraits() -> list[Image.Image]:
    """Eight drawn faces of 120 x 120 pixels."""
    return [Image.fromarray(draw_face("test", index, 96).pixels_HW3) for index in range(8)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DATA_ROOT where only what is at hand is tried."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local")
    monkeypatch.setattr(sources, "PROJECT", tmp_path / "project")
    return tmp_path


def _bytes(picture: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def _put(file: Path, content: bytes | Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else _bytes(content))


def _side_by_side(a: Image.Image, b: Image.Image) -> Image.Image:
    both = Image.new("RGB", (240, 120))
    both.paste(a, (0, 0))
    both.paste(b, (120, 0))
    return both


def test_a_folder_of_odd_files_is_accounted_for_file_by_file(root: Path, portraits: list[Image.Image]) -> None:
    home = root / "mine"
    _put(home / "plain.png", portraits[0])
    _put(home / "grey.png", portraits[1].convert("L"))
    cornerless = portraits[2].convert("RGBA")
    cornerless.paste((0, 0, 0, 0), (0, 0, 20, 20))
    _put(home / "alpha.png", cornerless)
    _put(home / "deep.png", Image.fromarray(np.asarray(portraits[3].convert("L")).astype(np.uint16) * 257))
    _put(home / "print.jpg", _bytes(portraits[4].convert("CMYK"), "jpeg"))
    _put(home / "anna" / "1.png", portraits[5])
    _put(home / "anna" / "2.png", portraits[6])
    _put(home / "copy of plain.png", portraits[0])
    _put(home / "empty.jpg", b"")
    _put(home / "cut.jpg", _bytes(portraits[0], "jpeg")[:2000])
    _put(home / "page.png", b"<html>")
    _put(home / "wall.png", Image.new("RGB", (200, 200), "beige"))
    _put(home / "pair.png", _side_by_side(portraits[0], portraits[1]))
    _put(home / "icon.png", portraits[0].resize((32, 32)))
    _put(home / "passport.png", portraits[0].resize((60, 60), Image.Resampling.LANCZOS))
    _put(home / ".hidden.png", portraits[7])
    _put(home / "notes.txt", b"not a picture")
    found = load_faces("photos:mine", 64)
    assert found.card.note.startswith(
        "7 faces of 15 pictures; refused: 1 no face, 1 several faces, 1 the same file again, 2 too small, 1 truncated, "
        "1 unreadable, 1 zero-byte; used all the same: 1 16-bit (scaled), 1 CMYK (converted), 1 alpha (composited), "
        "2 greyscale (converted); "
    )
    assert Counter(found.people_N.tolist())["anna"] == 2
    assert {"plain", "copy of plain"} & set(found.people_N.tolist()) == {"copy of plain"}  # the first by name
    assert (found.card.n, found.card.real, found.card.licence) == (7, True, "the user's own")
    assert found.crops_NSS3.shape == (7, 80, 80, 3)
    for crop, points in zip(found.crops_NSS3, found.points_N52, strict=True):
        assert crop.std() > 10
        assert np.abs(points - faces.margin_of(64) + 0.5 - 64 * TEMPLATE_52).max() < 6  # of 64: faces differ


def test_a_folder_without_a_face_is_an_error_with_counts(root: Path) -> None:
    for i in range(3):
        _put(root / "walls" / f"{i}.png", Image.new("RGB", (100, 100), (90 * i, 200, 10)))
    _put(root / "walls" / "empty.png", b"")
    with pytest.raises(
        DataUnavailable, match=r"none of the 4 pictures gave a face of 64 pixels: 3 no face, 1 zero-byte"
    ) as error:
        load_faces("photos:walls")
    assert "use procedural_faces" in str(error.value)
    assert not list((root / "face_crops").glob("*.npz"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("photos:nowhere", "is no folder"),
        ("photos:file", "is a file, not a folder"),
        ("photos:empty", "no image files in"),
        ("faces", "no images/ and landmarks.csv in"),
        ("lfw", "no folder .*lfw_funneled"),
        ("celeba", "no img_align_celeba and list_eval_partition.txt"),
        ("olivetti", "no olivetti_py3.pkz in"),
    ],
)
def test_what_is_not_here_is_told_way_by_way_and_drawn_faces_are_only_recommended(
    root: Path, name: str, words: str
) -> None:
    (root / "empty").mkdir()
    (root / "file").touch()
    with pytest.raises(DataUnavailable, match=words) as error:
        load_faces(name)
    assert "- local: " in str(error.value)
    assert "or use procedural_faces" in str(error.value)
    assert "another data set, with another name" in str(error.value)
    if name != "faces":  # whose content is pinned, and known without it
        with pytest.raises(DataUnavailable, match=rf"{words}[^$]*Then `fivefold data {name}`"):
            content_sha256(name)


def test_every_way_that_was_tried_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local,official,registry")

    def offline(self: object) -> str:
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr(Lfw, "official", offline)
    with pytest.raises(DataUnavailable) as error:
        load_faces("lfw")
    said = str(error.value)
    assert said.index("local: ") < said.index("official, attempt 1: ConnectionError: the network is unreachable")
    assert "official, attempt 2: ConnectionError" in said
    assert "registry: no package is known that ships it" in said
    with pytest.raises(DataUnavailable) as without:
        load_faces("lfw", fetch=False)
    assert "official" not in str(without.value).split("Ways out")[0]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(
        UnknownData, match=r"unknown faces 'celebb'; did you mean 'celeba'.*procedural_faces, photos:PATH"
    ):
        load_faces("celebb")
    assert [is_faces(name) for name in ("faces", "procedural_faces", "photos:x", "mnist", "folder:x")] == [True] * 3 + [
        False
    ] * 2
    with pytest.raises(ValueError, match="size must be at least 16, got 8"):
        load_faces("faces", 8)


def test_the_split_of_a_person_is_fixed_and_in_the_announced_shares() -> None:
    people = [f"person {i}" for i in range(20_000)]
    shares = Counter(map(split_of, people))
    assert {split: round(100 * n / 20_000) for split, n in shares.items()} == faces.SHARES
    assert [split_of(f"london 00{i}") for i in (1, 2, 6)] == ["train", "test", "val"]


def test_no_person_is_in_two_splits_and_prefixes_are_mixed(root: Path, portraits: list[Image.Image]) -> None:
    for i, picture in enumerate(portraits):
        _put(root / "f" / f"person{i % 4}" / f"{i}.png", picture)
    found = load_faces("photos:f")
    by_person: dict[str, set[str]] = {}
    for person, split in zip(found.people_N.tolist(), found.splits_N.tolist(), strict=True):
        by_person.setdefault(person, set()).add(split)
    assert all(len(splits) == 1 for splits in by_person.values())
    assert sum(len(found.of(split)) for split in faces.SPLITS) == 8
    assert found.names_N.tolist() != sorted(found.names_N.tolist())
    with pytest.raises(UnknownData, match="did you mean 'val'"):
        found.of("valid")


def test_aligned_faces_are_kept_in_one_file_and_made_again_if_it_is_not_whole(
    root: Path, portraits: list[Image.Image], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _put(root / "f" / "a.png", portraits[0])
    _put(root / "f" / "b.png", portraits[1])
    first = load_faces("photos:f", 32)
    (file,) = (root / "face_crops").glob("*.npz")
    whole = file.read_bytes()
    assert [f.name for f in (root / "face_crops").iterdir() if f.suffix not in (".npz", ".lock")] == []

    calls: list[int] = []
    align_all = face_crops.align_all
    monkeypatch.setattr(face_crops, "align_all", lambda *args, **kw: (calls.append(1), align_all(*args, **kw))[1])
    again = load_faces("photos:f", 32)
    assert calls == []
    assert np.array_equal(again.crops_NSS3, first.crops_NSS3)
    assert again.card == first.card

    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 1
    for content in (bytes(spoilt), whole[:1000], b""):
        file.write_bytes(content)
        assert np.array_equal(load_faces("photos:f", 32).crops_NSS3, first.crops_NSS3)
        assert "making it again" in capsys.readouterr().err
    assert len(calls) == 3


def test_another_picture_or_size_makes_another_file(root: Path, portraits: list[Image.Image]) -> None:
    _put(root / "f" / "a.png", portraits[0])
    digest, _ = content_sha256("photos:f"), load_faces("photos:f", 32)
    assert load_faces("photos:f", 48).crops_NSS3.shape == (1, 60, 60, 3)
    _put(root / "f" / "b.png", portraits[1])
    assert content_sha256("photos:f") != digest
    assert load_faces("photos:f", 32).card.n == 2
    assert len(list((root / "face_crops").glob("*.npz"))) == 3


def _load_in_process(outcome: multiprocessing.Queue) -> None:
    outcome.put(int(load_faces("photos:f", 32).crops_NSS3.sum()))


def test_two_processes_at_once_agree(root: Path, portraits: list[Image.Image]) -> None:
    _put(root / "f" / "a.png", portraits[0])
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(outcome,)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = {outcome.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {int(load_faces("photos:f", 32).crops_NSS3.sum())}


def test_drawn_faces_say_that_they_are_drawn(root: Path) -> None:
    card = face_card("procedural_faces")
    assert (card.name, card.n, card.real) == ("procedural faces", 0, False)
    assert "no photographs" in card.note
    assert card.sha256 == content_sha256("procedural_faces")
    found = load_faces("procedural_faces", 32, {"train": 5, "val": 2, "test": 3})
    assert Counter(found.splits_N.tolist()) == {"train": 5, "val": 2, "test": 3}
    assert len(set(found.people_N.tolist())) == 10
    assert np.array_equal(found.crops_NSS3[found.of("test")[1]], draw_face("test", 1, 32).pixels_HW3)
    fewer = load_faces("procedural_faces", 32, {"train": 2, "val": 1, "test": 1})
    assert np.array_equal(fewer.crops_NSS3[fewer.of("train")], found.crops_NSS3[found.of("train")[:2]])
    with pytest.raises(ValueError, match="at least 1 of each, got val: 0"):
        load_faces("procedural_faces", 32, {"val": 0})


def test_the_astronaut_is_a_face() -> None:
    pytest.importorskip("skimage", reason="scikit-image, which brings the photograph, is not installed")
    assert faces.astronaut(32).shape == (40, 40, 3)
