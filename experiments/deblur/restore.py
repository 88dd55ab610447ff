"""`fivefold deblur`: photographs in, restored photographs out.

Legend: H height, W width, C channels, S side of a face's square with its margins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from datamodules.face_photos import SUFFIXES
from experiments.deblur import pictures
from experiments.deblur.faces import SURE, find_faces, restore_face, square_of
from experiments.deblur.files import Input, Outcome, check_outputs, collect, each_of
from experiments.deblur.photographs import encode, read
from experiments.deblur.tiles import Restore, as_floats, as_values, check_tiles, restore_in_tiles, restore_whole
from experiments.errors import UserError
from experiments.store import write_atomically

Tick = Callable[[float], None]
NO_FACE = "no face found: copied as it is; --whole restores all of it"


@dataclass(frozen=True)
class Options:
    """How photographs are restored.

    Args:
        whole: the whole photograph, in tiles; else the faces that MTCNN finds.
        strength: 0 for the photograph as it is, 1 for it as the generator has it, between them the mixture.
        tile, overlap: see `experiments.deblur.tiles`.
        sure: probability from which on a face is restored.
        compare, overlay: also write a picture beside each output, of what went in and came out, and of MTCNN's faces in both.
        force: replace outputs that exist.
    Raises:
        UserError: a value outside its range.
    """

    whole: bool = False
    strength: float = 1.0
    tile: int = 512
    overlap: int = 64
    sure: float = SURE
    compare: bool = False
    overlay: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("strength", "sure"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must lie between 0 and 1, got {getattr(self, name)}")
        try:
            check_tiles(self.tile, self.overlap)
        except ValueError as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class Job:
    """A photograph and where it goes; `extra` are the pictures beside it, by what they show."""

    source: Input
    target: Path
    extra: dict[str, Path]

    @property
    def outputs(self) -> list[Path]:
        return [self.target, *self.extra.values()]


def plan(words: Sequence[str], out: Path, options: Options) -> list[Job]:
    """Return what is to be done, once it is sure that nothing would be lost.

    Args:
        out: a folder, where each photograph keeps its path below what was asked for; or, for one photograph that is named
            by itself, a file with a suffix of its format.
    Raises:
        UserError: see `collect` and `check_outputs`; a file for several photographs; another suffix than the input's.
    """
    inputs = collect(words, out)
    alone = len(words) == 1 and len(inputs) == 1 and not Path(words[0]).is_dir()
    as_file = alone and not out.is_dir() and out.suffix.lower() in SUFFIXES
    if as_file:
        _check_suffix(inputs[0].file, out)
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; {len(inputs)} photographs need a folder")
    jobs = []
    for each in inputs:
        target = out if as_file else out / each.name
        wanted = {"compare": options.compare, "faces": options.overlay}
        extra = {what: target.with_name(f"{target.name}.{what}.png") for what, there in wanted.items() if there}
        jobs.append(Job(each, target, extra))
    check_outputs([job.source.file for job in jobs], [file for job in jobs for file in job.outputs], options.force)
    return jobs


def _check_suffix(file: Path, out: Path) -> None:
    formats = Image.registered_extensions()
    has, asked = (formats.get(path.suffix.lower()) for path in (file, out))
    if has != asked:
        raise UserError(
            f"{out.name} would be of another format than {file.name}: outputs are of the format of their input"
        )


def restore_all(jobs: Sequence[Job], restore: Restore, size: int, options: Options, console: Console) -> Outcome:
    """Restore every photograph; what cannot be read or written is noted, and the others go on.

    In faces mode a photograph without a face is copied as it is, byte for byte, and noted.

    Args:
        restore: the generator, see `experiments.deblur.weights.Restorer`.
        size: of its training faces.
    """
    notes: list[tuple[str, str]] = []

    def work(job: Job, tick: Tick) -> None:
        notes.extend((str(job.source.file), note) for note in restore_one(job, restore, size, options, tick))

    outcome = each_of(jobs, work, lambda job: str(job.source.file), console)
    outcome.notes += notes
    return outcome


def restore_one(job: Job, restore: Restore, size: int, options: Options, tick: Tick) -> list[str]:
    """Restore one photograph and write it; return what there is to say of it.

    Raises:
        Refused, OSError: see `experiments.deblur.photographs.read`.
    """
    photograph = read(job.source.file)
    before_HWC = photograph.pixels_HWC
    if options.whole:
        after_HWC, squares = restore_picture(before_HWC, restore, options, tick), None
    else:
        after_HWC, squares = restore_faces(before_HWC, restore, size, options)
        if not squares:
            write_atomically(job.target, job.source.file.read_bytes())
            return [NO_FACE]
    write_atomically(job.target, encode(photograph, after_HWC))
    if "compare" in job.extra:
        rows = squares or [(pictures.small(before_HWC), pictures.small(after_HWC))]
        write_atomically(job.extra["compare"], pictures.compare(rows))
    if "faces" in job.extra:
        write_atomically(job.extra["faces"], pictures.overlay(before_HWC, after_HWC, options.sure))
    return [photograph.note] if photograph.note else []


def restore_picture(before_HWC: np.ndarray, restore: Restore, options: Options, tick: Tick) -> np.ndarray:
    """Return a whole photograph restored, of its type and shape."""
    after_HWC = np.empty_like(before_HWC)
    for top, strip_HWC in restore_in_tiles(before_HWC, restore, options.tile, options.overlap, tick):
        rows = slice(top, top + len(strip_HWC))
        x_HWC = as_floats(before_HWC[rows])
        after_HWC[rows] = as_values(x_HWC + np.float32(options.strength) * (strip_HWC - x_HWC), before_HWC.dtype)
    return after_HWC


def restore_faces(
    before_HWC: np.ndarray, restore: Restore, size: int, options: Options
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return a photograph with its faces restored, and each one's square before and after, the most probable face first.

    Where squares overlap, the more probable face lies on top.
    """
    after_HWC, squares = before_HWC.copy(), []
    found = find_faces(before_HWC, options.sure)
    for points_52 in reversed(found.points_F52.double().numpy()):
        square = square_of(points_52, size)
        squares.append(
            restore_face(
                before_HWC,
                after_HWC,
                square,
                lambda x_SSC: restore_whole(x_SSC, restore, options.tile, options.overlap),
                options.strength,
            )
        )
    return after_HWC, squares[::-1]


def ready(out: Path) -> None:
    """See that a folder can be written to, before hours of work for it.

    Raises:
        UserError: it cannot.
    """
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    if not os.access(above, os.W_OK):
        raise UserError(f"{above} cannot be written to")
