"""Shards hold the documents, whole, once, in a format that `datasets` opens; and say so when they do not."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from datamodules import shard_writer, shards
from datamodules.shards import ShardError, TokenShards, build_shards, describe_shards, shards_folder, shards_tokenizer

RNG = np.random.default_rng(0)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """A folder corpus with a split, and small files: 64 tokens in rows of 16."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setattr(shards, "BLOCK", 16)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 64)
    made = {"train": 9, "val": 2, "test": 1}
    documents = {
        s: [bytes(RNG.integers(1, 256, 20 + 7 * i, dtype=np.uint8)) for i in range(n)] for s, n in made.items()
    }
    for split, contents in documents.items():
        folder = tmp_path / "text" / "toy" / split
        folder.mkdir(parents=True)
        for i, content in enumerate(contents):
            (folder / f"{i}.txt").write_bytes(content)
    return documents


def _joined(documents: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(document + b"\0" for document in documents), np.uint8)


def test_shards_hold_the_documents_in_order_each_with_a_separator(toy: dict[str, list[bytes]]) -> None:
    folder = build_shards("folder:toy")
    for split, documents in toy.items():
        opened, expected = TokenShards(folder / split), _joined(documents)
        assert np.array_equal(opened.window(0, len(opened)), expected)
        made = opened.manifest
        assert (made["tokens"], made["documents"], made["bytes"]) == (
            len(expected),
            len(documents),
            sum(map(len, documents)),
        )
        assert (made["dtype"], made["split"], made["tokenizer"]) == ("uint16", split, "bytes")
        assert len(made["files"]) == -(-len(expected) // 64)
        assert opened.bytes_per_token == 1.0


def test_every_window_is_the_same_as_of_the_whole_also_across_files(toy: dict[str, list[bytes]]) -> None:
    opened = TokenShards(build_shards("folder:toy") / "train")
    whole = _joined(toy["train"])
    for length in (0, 1, 15, 16, 17, 64, 65, 150):
        for start in range(len(whole) - length + 1):
            assert np.array_equal(opened.window(start, length), whole[start : start + length])
    for start, length in ((-1, 2), (0, len(whole) + 1), (len(whole), 1), (3, -1)):
        with pytest.raises(IndexError):
            opened.window(start, length)


def test_a_window_inside_a_file_is_a_view_of_the_mapped_file(toy: dict[str, list[bytes]]) -> None:
    opened = TokenShards(build_shards("folder:toy") / "train")
    assert np.shares_memory(opened.window(64, 20), opened.window(70, 30))
    assert not opened.window(64, 20).flags.writeable
    assert not opened.window(60, 20).flags.writeable
    maps = Path("/proc/self/maps")
    if maps.exists():
        address = opened.window(64, 1).ctypes.data
        [line] = [x for x in maps.read_text().splitlines() if _holds(x.split()[0], address)]
        assert line.endswith("data-00001-of-00007.arrow")


def _holds(span: str, address: int) -> bool:
    low, high = (int(part, 16) for part in span.split("-"))
    return low <= address < high


def test_datasets_opens_them_as_its_own(toy: dict[str, list[bytes]]) -> None:
    from datasets import load_from_disk

    folder = build_shards("folder:toy")
    for split, documents in toy.items():
        rows = load_from_disk(str(folder / split))
        expected = _joined(documents)
        assert rows.column_names == ["tokens"]
        assert [len(row) for row in rows["tokens"]][:-1] == [16] * (len(rows) - 1)
        assert np.array_equal(np.concatenate(rows["tokens"]), expected)
        assert rows.features["tokens"].feature.dtype == "uint16"


def test_the_same_corpus_gives_the_same_bytes(toy: dict[str, list[bytes]], tmp_path: Path) -> None:
    import shutil

    folder = build_shards("folder:toy")
    first = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    shutil.rmtree(folder)
    assert build_shards("folder:toy") == folder
    assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == first


def test_they_are_made_once_and_anew_for_another_content(toy, tmp_path: Path, monkeypatch) -> None:
    folder = build_shards("folder:toy")
    monkeypatch.setattr(shards, "write_shards", lambda *_: pytest.fail("made again"))
    assert build_shards("folder:toy") == folder
    monkeypatch.undo()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    (tmp_path / "text" / "toy" / "train" / "new.txt").write_text("another document")
    other = build_shards("folder:toy")
    assert other != folder
    assert other.name.rpartition("-")[0] == folder.name.rpartition("-")[0] == "folder_toy-bytes"


def test_bpe_is_trained_on_training_documents_only(toy, tmp_path: Path) -> None:
    folder = build_shards("folder:toy", "bpe:300")
    tokenizer = shards_tokenizer(folder)
    before = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "text" / "toy" / "val" / "0.txt").write_bytes(b"quite other validation text " * 50)
    other = build_shards("folder:toy", "bpe:300")
    assert other != folder
    assert (other / "tokenizer.json").read_bytes() == before
    opened = TokenShards(other / "val")
    assert opened.manifest["tokenizer_sha256"] == tokenizer.sha256
    ends = np.flatnonzero(opened.window(0, len(opened)) == tokenizer.separator)
    assert tokenizer.decode(opened.window(0, int(ends[0]))) == b"quite other validation text " * 50
    assert opened.bytes_per_token == pytest.approx((opened.manifest["bytes"] + 2) / len(opened))


def test_wide_vocabularies_take_uint32(tmp_path: Path) -> None:
    class Wide:
        spec, vocab, separator = "wide", 2**17, 2**17 - 1

        def encode(self, document: bytes) -> np.ndarray:
            return np.frombuffer(document, np.uint8).astype(np.uint32) + 2**16

        def unfaithful(self, document: bytes) -> bool:
            return False

    writer = shard_writer.SplitWriter(tmp_path / "x", Wide(), 4, 8)
    writer.add(b"0123456789")
    writer.finish({"format": shards.FORMAT, "card": {}})
    opened = TokenShards(tmp_path / "x")
    assert opened.window(0, 11).dtype == np.uint32
    assert opened.window(0, 11).tolist() == [2**16 + 48 + i for i in range(10)] + [2**17 - 1]
    assert [entry["name"] for entry in opened.manifest["files"]] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]


def test_a_nul_in_a_source_is_not_a_separator_and_is_counted(toy, tmp_path: Path) -> None:
    (tmp_path / "text" / "toy" / "test" / "0.txt").write_bytes(b"a\0b")
    opened = TokenShards(build_shards("folder:toy") / "test")
    assert opened.window(0, 4).tolist() == [97, 0x1A, 98, 0]
    assert opened.manifest["unfaithful"] == 1


def test_a_split_without_documents_is_empty_and_opens(toy, tmp_path: Path) -> None:
    from datasets import load_from_disk

    for file in (tmp_path / "text" / "toy" / "test").iterdir():
        file.unlink()
    folder = build_shards("folder:toy")
    assert len(TokenShards(folder / "test")) == 0
    assert TokenShards(folder / "test").window(0, 0).tolist() == []
    assert len(load_from_disk(str(folder / "test"))) == 0
    assert "test          0 documents" in describe_shards(folder)


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "longer"])
def test_a_file_of_another_size_is_told_when_opened(toy, damage: str) -> None:
    folder = build_shards("folder:toy")
    file = folder / "train" / "data-00002-of-00007.arrow"
    raw = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"truncate": raw[:-9], "empty": b"", "longer": raw + b"x"}[damage])
    said = "is missing" if damage == "missing" else f"holds .* bytes where {len(raw)} were written"
    for ask in (lambda: TokenShards(folder / "train"), lambda: build_shards("folder:toy")):
        with pytest.raises(ShardError, match=f"data-00002-of-00007.arrow {said}. Delete the folder {folder};"):
            ask()


def test_an_altered_file_is_told_by_verify_and_by_the_builder(toy) -> None:
    folder = build_shards("folder:toy")
    file = folder / "train" / "data-00002-of-00007.arrow"
    raw = bytearray(file.read_bytes())
    at = bytes(raw).index(TokenShards(folder / "train").window(128, 20).tobytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    TokenShards(folder / "train")  # its size is right
    for ask in (lambda: TokenShards(folder / "train").verify(), lambda: build_shards("folder:toy")):
        with pytest.raises(ShardError, match=r"data-00002-of-00007.arrow is altered: .* Delete the folder"):
            ask()
    TokenShards(folder / "val").verify()


def test_a_manifest_that_is_missing_or_corrupt_is_told(toy) -> None:
    folder = build_shards("folder:toy")
    manifest = folder / "val" / "manifest.json"
    good = json.loads(manifest.read_text())
    for content, said in (
        ("{", "is corrupt"),
        (json.dumps(good | {"format": 99}), "is of format 99"),
        (json.dumps(good | {"tokens": 5}), "says 5 tokens where"),
    ):
        manifest.write_text(content)
        with pytest.raises(ShardError, match=f"manifest.json {said}"):
            TokenShards(folder / "val")
    manifest.unlink()
    with pytest.raises(ShardError, match=r"manifest\.json is missing"):
        build_shards("folder:toy")


def test_an_altered_tokenizer_is_told(toy) -> None:
    folder = build_shards("folder:toy", "bpe:300")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ShardError, match=r"tokenizer\.json is altered"):
        shards_tokenizer(folder)


def _be_killed_while_writing() -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    shard_writer.SplitWriter.finish = die
    build_shards("folder:toy")


def test_what_a_killed_builder_leaves_is_never_read_and_cleared_by_the_next(toy, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_be_killed_while_writing)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [f.name for f in (tmp_path / "tokens").iterdir() if f.name.startswith(".making")]
    assert not shards_folder("folder:toy", "bytes").exists()
    folder = build_shards("folder:toy")
    TokenShards(folder / "train").verify()
    assert not [f.name for f in (tmp_path / "tokens").iterdir() if f.name.startswith(".making")]


def _build_in_process(started: float, outcome) -> None:
    writes = []
    real = shards.write_shards

    def counted(*arguments) -> None:
        writes.append(1)
        time.sleep(0.3)  # so that the others arrive while this one is at it
        real(*arguments)

    shards.write_shards = counted
    folder = build_shards("folder:toy")
    outcome.put((len(writes), int(TokenShards(folder / "train").window(0, 10).sum())))


def test_several_processes_at_once_make_them_once(toy: dict[str, list[bytes]]) -> None:
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    processes = [context.Process(target=_build_in_process, args=(time.monotonic(), outcome)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [outcome.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(count for count, _ in answers) == 1
    assert {total for _, total in answers} == {int(_joined(toy["train"])[:10].sum())}


def test_another_process_gets_the_folder_not_the_tokens(toy: dict[str, list[bytes]]) -> None:
    opened = TokenShards(build_shards("folder:toy") / "train")
    packed = pickle.dumps(opened)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).window(50, 30), opened.window(50, 30))


def test_people_are_told_what_is_there(toy: dict[str, list[bytes]]) -> None:
    folder = build_shards("folder:toy")
    lines = describe_shards(folder).splitlines()
    assert lines[0] == f"text files in toy as bytes tokens (uint16) in {folder}"
    told = " ".join(lines[1].split())
    assert told == "train 9 documents 432 bytes 441 tokens in 7 shards, 1.000 bytes per token"


def test_the_standard_library_is_cut_into_shards_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datamodules.text import load_documents

    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    folder = build_shards("python_stdlib")
    documents = load_documents("python_stdlib")
    for split in ("train", "val", "test"):
        opened = TokenShards(folder / split)
        expected = b"".join(d.replace(b"\0", b"\x1a") + b"\0" for d in documents.split(split))
        assert opened.window(0, len(opened)).astype(np.uint8).tobytes() == expected
    assert len(TokenShards(folder / "train").manifest["files"]) >= 2
