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
from experiments.deblur.faces import LARGEST, SURE, find_faces, restore_face, side_in_photograph, square_of
from experiments.deblur.files import Input, Outcome, check_outputs, collect, each_of
from experiments.deblur.photographs import encode, read
from experiments.deblur.tiles import (
    SMALLEST_TILE,
    Restore,
    as_floats,
    as_values,
    restore_in_tiles,
    restore_whole,
    rounded_tiles,
)
from experiments.deblur.warping import ROWS, enlarge_rows, shrink
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
        shrink: whole photographs are restored at 1 / `shrink` of their size, and the difference is enlarged; None for what
            brings the largest face to the generator's size, and 1 where there is none or it is smaller.
        largest: see `experiments.deblur.faces.square_of`.
        tile, overlap: see `experiments.deblur.tiles`; None for the generator's size, and half a tile.
        sure: probability from which on a face is restored.
        compare, overlay: also write a picture beside each output, of what went in and came out, and of MTCNN's faces in both.
        force: replace outputs that exist.
    Raises:
        UserError: a value outside its range.
    """

    whole: bool = False
    strength: float = 1.0
    shrink: float | None = None
    largest: float = LARGEST
    tile: int | None = None
    overlap: int | None = None
    sure: float = SURE
    compare: bool = False
    overlay: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("strength", 0, 1), ("sure", 0, 1), ("shrink", 1, 1000), ("largest", 1, 1000)):
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise UserError(f"--{name} must lie between {low} and {high}, got {value}")
        self.tiles(SMALLEST_TILE)

    def tiles(self, size: int) -> tuple[int, int]:
        """Return tile and overlap for a generator whose training faces were of `size`.

        Larger tiles are faster, but a net with channel attention or instance norm knows pictures of its size: larger ones
        come out worse.
        """
        try:
            return rounded_tiles(self.tile or max(size, SMALLEST_TILE), self.overlap)
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
    before_HWC, notes = photograph.pixels_HWC, [photograph.note] if photograph.note else []
    if options.whole:
        factor, note = shrink_of(before_HWC, size, options)
        after_HWC, squares = restore_picture(before_HWC, restore, size, factor, options, tick), None
        notes += [note] if note else []
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
    return notes


def shrink_of(before_HWC: np.ndarray, size: int, options: Options) -> tuple[float, str]:
    """Return at which part of its size a whole photograph is restored, and what there is to say of that."""
    if options.shrink is not None:
        return options.shrink, ""
    found = find_faces(before_HWC, options.sure)
    if not len(found):
        return 1.0, f"no face found: restored at its own size; --shrink F where faces are larger than {size} pixels"
    factor = max(1.0, max(map(side_in_photograph, found.points_F52.double().numpy())) / size)
    return factor, f"restored at 1/{factor:.3g} of its size, where its largest face is {size} pixels" * (factor > 1)


def restore_picture(
    before_HWC: np.ndarray, restore: Restore, size: int, factor: float, options: Options, tick: Tick
) -> np.ndarray:
    """Return a whole photograph restored, of its type and shape.

    Args:
        size: of the generator's training faces.
        factor: the photograph is restored at 1 / factor of its size, and the difference is enlarged and added; 1 or above.
    """
    after_HWC, tiles = np.empty_like(before_HWC), options.tiles(size)

    def add(top: int, difference_HWC: np.ndarray) -> None:
        rows = slice(top, top + len(difference_HWC))
        new_HWC = as_floats(before_HWC[rows]) + np.float32(options.strength) * difference_HWC
        after_HWC[rows] = as_values(new_HWC, before_HWC.dtype)

    if factor == 1:
        for top, strip_HWC in restore_in_tiles(before_HWC, restore, *tiles, tick):
            add(top, strip_HWC - as_floats(before_HWC[top : top + len(strip_HWC)]))
        return after_HWC
    small_HWC = shrink(before_HWC, factor)
    strips = [strip for _, strip in restore_in_tiles(small_HWC, restore, *tiles, tick)]
    difference_HWC = np.concatenate(strips) - small_HWC
    for top in range(0, len(before_HWC), ROWS):
        bottom = min(len(before_HWC), top + ROWS)
        add(top, enlarge_rows(difference_HWC, factor, top, bottom, before_HWC.shape[1]))
    return after_HWC


def restore_faces(
    before_HWC: np.ndarray, restore: Restore, size: int, options: Options
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return a photograph with its faces restored, and each one's square before and after, the most probable face first.

    Where squares overlap, the more probable face lies on top.
    """
    after_HWC, squares, tiles = before_HWC.copy(), [], options.tiles(size)

    def restore_square(x_1SSC: np.ndarray) -> np.ndarray:
        return restore_whole(x_1SSC[0], restore, *tiles)[None]

    found = find_faces(before_HWC, options.sure)
    for points_52 in reversed(found.points_F52.double().numpy()):
        square = square_of(points_52, size, options.largest)
        squares.append(restore_face(before_HWC, after_HWC, square, restore_square, options.strength))
    return after_HWC, squares[::-1]


def ready(out: Path) -> None:
    """See that a folder can be written to, before hours of work for it.

    Raises:
        UserError: it cannot.
    """
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    if not os.access(above, os.W_OK):
        raise UserError(f"{above} cannot be written to")
