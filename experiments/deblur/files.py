"""Which files come in, where the new ones go, and that nothing is lost on the way."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.face_photos import SUFFIXES, Refused
from experiments.errors import UserError

SHOWN = 20  # of a long list
T = TypeVar("T")


@dataclass(frozen=True)
class Input:
    """A photograph, and its path below the folder that was asked for: what its output is called."""

    file: Path
    name: Path


@dataclass
class Outcome:
    """What became of many files: how many were done, what there is to say of some, and which failed and why."""

    done: int = 0
    notes: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def show(self, console: Console, what: str) -> int:
        """Print it, failures last; return the exit status: 1 if any failed, else 0."""
        console.print(f"{what}: {self.done}; failed: {len(self.failed)}", highlight=False, soft_wrap=True)
        for title, pairs in (("note", self.notes), ("failed", self.failed)):
            for name, words in pairs[:SHOWN]:
                console.print(f"{title}: {escape(name)}: {escape(words)}", soft_wrap=True, highlight=False)
            if len(pairs) > SHOWN:
                console.print(f"{title}: and {len(pairs) - SHOWN} more", highlight=False)
        return 1 if self.failed else 0


def collect(words: Sequence[str], out: Path) -> list[Input]:
    """Return the photographs that files, folders and patterns name, each once, in a fixed order.

    A folder is searched to its depths for files with the suffixes of images, hidden ones and those in `out` left out. Of
    several folders, and of one that a pattern found, the folder's name is kept before the file's. What a pattern finds is
    named from its first part with a wildcard on.

    Raises:
        UserError: something that is not there, no photograph in any, or two that would have one output.
    """
    found: dict[Path, Input] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            new = _inside(path, path.parent if len(words) > 1 and path.name not in ("", "..") else path, out)
        elif path.exists() or path.is_symlink():
            new = [Input(path, Path(path.name))]
        else:
            new = _matching(word, out)
        for each in new:
            if ".." in each.name.parts:
                raise UserError(f"{word} leads out of the folder it starts in; give that folder's own path")
            other = found.setdefault(each.name, each)
            if not _same(other.file, each.file):
                raise UserError(
                    f"{other.file} and {each.file} would both become {each.name}: give the folder above them, or run twice"
                )
    if not found:
        raise UserError(f"there is no photograph in {', '.join(words)}; known suffixes: {' '.join(sorted(SUFFIXES))}")
    return [found[name] for name in sorted(found)]


def _inside(folder: Path, base: Path, out: Path) -> list[Input]:
    files = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and (f.is_file() or f.is_symlink()))
    shown = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    if folder.resolve() in out.resolve().parents:  # what an earlier run wrote is no input of this one
        shown = [f for f in shown if out.resolve() not in f.absolute().parent.resolve().joinpath(f.name).parents]
    return [Input(file, file.relative_to(base)) for file in shown]


def _matching(pattern: str, out: Path) -> list[Input]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    if not matches:
        raise UserError(f"there is no {pattern}, as a file, a folder or a pattern")
    fixed = next((i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part)), 0)
    base = Path(*Path(pattern).parts[:fixed])
    new = [each for match in matches if match.is_dir() for each in _inside(match, base, out)]
    new += [Input(match, match.relative_to(base)) for match in matches if match.is_file()]
    return [each for each in new if each.file.suffix.lower() in SUFFIXES]


def _same(a: Path, b: Path) -> bool:
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def check_outputs(inputs: Iterable[Path], outputs: Iterable[Path], force: bool) -> None:
    """Refuse, before anything is written, outputs that would destroy something.

    Raises:
        UserError: an output that is an input, by whatever links; two outputs of one name; an output that exists, unless
            `force`; a folder in the place of a file, or a file in the place of a folder.
    """
    read = {_identity(file): file for file in inputs if file.exists()}
    outputs = list(outputs)
    if len({os.path.realpath(file) for file in outputs}) < len(outputs):
        raise UserError("two of the outputs would be the same file: give another folder")
    for file in outputs:
        if file.exists() and (taken := read.get(_identity(file))):
            raise UserError(f"{file} would overwrite the input {taken}: give another place to write to")
        if file.is_dir():
            raise UserError(f"{file} would have to be a file, but is a folder")
        above = next(folder for folder in file.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"{above} would have to be a folder, but is a file")
    there = [file for file in outputs if file.exists() or file.is_symlink()]
    if there and not force:
        some = ", ".join(map(str, there[:3])) + (", …" if len(there) > 3 else "")
        raise UserError(f"{len(there)} of {len(outputs)} outputs exist already ({some}); --force replaces them")


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()  # follows symbolic links, and hard links share it
    return status.st_dev, status.st_ino


def each_of(
    inputs: Sequence[T], work: Callable[[T, Callable[[float], None]], None], name: Callable[[T], str], console: Console
) -> Outcome:
    """Do something with every input under a progress bar; one that fails is noted, and the others go on.

    Args:
        work: is given the input, and what to tell the shares of it that are done.
        name: how to call an input.
    """
    outcome = Outcome()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(inputs))
        for i, each in enumerate(inputs):
            bar.update(task, description=name(each)[-40:], completed=i)
            try:
                work(each, lambda share: bar.advance(task, share))
                outcome.done += 1
            except Refused as error:
                outcome.failed.append((name(each), str(error)))
            except Exception as error:  # a batch of thousands must not end at one
                outcome.failed.append((name(each), _words_of(error)))
    return outcome


def _words_of(error: Exception) -> str:
    words = " ".join(str(error).split())
    if "out of memory" in words.lower() or isinstance(error, MemoryError):
        return "out of memory; give a smaller --tile"
    return f"{type(error).__name__}: {words}"[:300]
