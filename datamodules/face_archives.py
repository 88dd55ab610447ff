"""Published sets of faces, with their official downloads: LFW, Olivetti, CelebA.

What is fetched is made in a folder of its own, checked, and renamed, so a half download is never read.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from datamodules import sources
from datamodules.face_sources import Folder, Picture, Source, measure_files
from datamodules.fetch import CONNECT_TIMEOUT_S, NotThisWay, _socket_timeout


class Lfw(Folder):
    """Labeled Faces in the Wild, funneled: a folder for each person, as its archive unpacks."""

    licence = "no licence stated; Huang, Ramesh, Berg, Learned-Miller 2007, cite the report"
    n = 13_233

    def __init__(self) -> None:
        super().__init__("lfw")
        self.name, self.title = "lfw", "LFW (funneled)"
        self.advice = "unpack lfw-funneled.tgz into the folder lfw_home of DATA_ROOT"

    def local(self) -> str:
        home, n = self.home(), len(self._files())
        if n != self.n:
            raise NotThisWay(f"{home} holds {n} image files, LFW has {self.n}")
        return f"official files in {home.name}/ of the data root"

    def home(self) -> Path:
        homes = self._homes("lfw_home/lfw_funneled", "lfw_funneled", "lfw")
        found = next((home for home in homes if home.is_dir()), None)
        if found is None:
            raise NotThisWay(f"no folder {homes[0]}")
        return found

    def official(self) -> str:
        """Download and unpack by scikit-learn, which checks the archive; asked for those with 500 pictures, it reads few."""
        from sklearn.datasets import fetch_lfw_people

        home = sources.cache_root() / "lfw"
        with sources._empty_folder(home.with_name(".fetch-lfw")) as folder, _socket_timeout(CONNECT_TIMEOUT_S):
            fetch_lfw_people(data_home=folder, color=True, min_faces_per_person=500, resize=0.1, n_retries=1)
            _put(folder / "lfw_home" / "lfw_funneled", home)
        self.local()
        return "official download (scikit-learn)"


class Olivetti(Source):
    """The Olivetti faces of AT&T Laboratories Cambridge: 40 people, 10 grey pictures of 64 x 64 pixels each."""

    name, title = "olivetti", "Olivetti faces (greyscale, as RGB)"
    licence = "no licence stated; AT&T Laboratories Cambridge 1994, credit them"
    FILE = "olivetti_py3.pkz"
    advice = f"put scikit-learn's {FILE} into DATA_ROOT"
    n = 400

    def local(self) -> str:
        self._faces()
        return "scikit-learn's copy in the data root"

    def official(self) -> str:
        from sklearn.datasets import fetch_olivetti_faces

        home = sources.cache_root() / "olivetti"
        with sources._empty_folder(home.with_name(".fetch-olivetti")) as folder, _socket_timeout(CONNECT_TIMEOUT_S):
            fetch_olivetti_faces(data_home=folder / "made", n_retries=1)
            _put(folder / "made", home)
        return "official download (scikit-learn)"

    def pictures(self) -> Iterator[Picture]:
        for i, pixels in enumerate(self._faces()):
            yield Picture(f"s{i // 10 + 1:02}/{i % 10 + 1:02}", f"s{i // 10 + 1:02}", pixels)

    def measure(self) -> tuple[str, int]:
        faces = self._faces()
        return hashlib.sha256(faces.tobytes()).hexdigest(), len(faces)

    def _faces(self) -> np.ndarray:
        homes = self._homes("", "olivetti")
        home = next((home for home in homes if (home / self.FILE).is_file()), None)
        if home is None:
            raise NotThisWay(f"no {self.FILE} in {homes[0]}")
        from sklearn.datasets import fetch_olivetti_faces

        images = fetch_olivetti_faces(data_home=home, download_if_missing=False).images
        return np.round(255 * images).astype(np.uint8)


class CelebA(Source):
    """CelebA's aligned pictures, with its own split, which keeps people apart, and its own five points."""

    name, title = "celeba", "CelebA (aligned)"
    licence = "non-commercial research only; Liu, Luo, Wang, Tang 2015"
    advice = "unpack img_align_celeba.zip into the folder celeba of DATA_ROOT, with the four .txt lists beside it"
    n = 202_599
    LISTS = ("list_eval_partition.txt", "identity_CelebA.txt", "list_landmarks_align_celeba.txt")
    SPLITS: ClassVar = {"0": "train", "1": "val", "2": "test"}

    def local(self) -> str:
        home = self._home()
        n = sum(1 for _ in (home / "img_align_celeba").iterdir())
        if n != self.n:
            raise NotThisWay(f"{home / 'img_align_celeba'} holds {n} files, CelebA has {self.n}")
        return "official files in celeba/ of the data root"

    def official(self) -> str:
        from torchvision.datasets import CelebA as Official

        home = sources.cache_root() / "celeba"
        with sources._empty_folder(home.with_name(".fetch-celeba")) as folder, _socket_timeout(CONNECT_TIMEOUT_S):
            Official(folder, download=True)
            (folder / "celeba" / "img_align_celeba.zip").unlink(missing_ok=True)
            _put(folder / "celeba", home)
        self.local()
        return "official download (torchvision)"

    def pictures(self) -> Iterator[Picture]:
        home = self._home()
        splits, people, points = (_table(home / file) for file in self.LISTS)
        for name in sorted(splits):
            points_52 = np.array(points[name], dtype=np.float64).reshape(5, 2)
            content = (home / "img_align_celeba" / name).read_bytes()
            yield Picture(name, people[name][0], content, points_52, self.SPLITS[splits[name][0]])

    def measure(self) -> tuple[str, int]:
        home = self._home()
        self.local()
        names = sorted(f"img_align_celeba/{name}" for name in _table(home / self.LISTS[0]))
        return measure_files(home, [*names, *self.LISTS])[0], len(names)

    def _home(self) -> Path:
        homes = self._homes("celeba")
        for home in homes:
            if (home / "img_align_celeba").is_dir() and all((home / file).is_file() for file in self.LISTS):
                return home
        raise NotThisWay(f"no img_align_celeba and {', '.join(self.LISTS)} in {homes[0]}")


def _table(file: Path) -> dict[str, list[str]]:
    """A list of CelebA's: a name and numbers a line. Two of them begin with a count and a line of column names."""
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0]: row[1:] for row in rows if len(row) > 1 and row[0].endswith((".jpg", ".png"))}


def _put(made: Path, home: Path) -> None:
    """Give a complete folder its name; what stood there was not the data set, and may be someone's."""
    if home.exists():
        home.rename(home.with_name(f"{home.name}.incomplete-{uuid.uuid4().hex[:8]}"))
    made.rename(home)
