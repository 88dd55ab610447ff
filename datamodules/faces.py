"""Faces by name: aligned square crops with their people and splits, made once and kept in one verified file.

Names: "faces", "lfw", "olivetti", "celeba" (see `datamodules.face_sources`), "photos:PATH" for a folder of the user's, and
"procedural_faces", which are drawn. The split of a data set that brings none is by the sha256 of the person: never one
person in two splits, and nobody's split depends on who else is there.

Legend: N faces, S side of a crop with its margins.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from datamodules import sources
from datamodules.face_align import margin_of
from datamodules.face_archives import CelebA, Lfw, Olivetti
from datamodules.face_cache import PARTS, Arrays, kept
from datamodules.face_sources import Folder, Photographs, Source
from datamodules.fetch import NotThisWay
from datamodules.sources import DataCard, DataUnavailable

PROCEDURAL = "procedural_faces"
SPLITS = ("train", "val", "test")
SHARES = {"train": 60, "val": 10, "test": 30}  # of each hundred people
DRAWN = {"train": 4000, "val": 256, "test": 512}  # procedural faces, where it is not said how many
DEFAULT_SIZE, SMALLEST_SIZE = 64, 16
DRAWING = ("procedural_faces", "procedural_features", "procedural_scene", "face_align")
ALIGNING = ("faces", "face_crops", "face_align", "face_detector", "face_photos", "face_sources", "face_archives")


@dataclass(frozen=True)
class FaceSet:
    """Aligned faces in memory, in an order that mixes them, so that the first k of a split are a fair sample of it.

    crops uint8 (N, S, S, 3), of which the outer `margin` pixels lie outside the picture proper; points (N, 5, 2) in them.
    """

    crops_NSS3: np.ndarray
    points_N52: np.ndarray
    names_N: np.ndarray
    people_N: np.ndarray
    splits_N: np.ndarray
    size: int
    card: DataCard

    @property
    def margin(self) -> int:
        """Pixels round the picture proper."""
        return margin_of(self.size)

    def of(self, split: str) -> np.ndarray:
        """Return the indices of a split's faces, int64.

        Raises:
            UnknownData: a split other than train, val and test.
        """
        if split not in SPLITS:
            raise sources.UnknownData(f"unknown split '{split}';{sources._hint(split, SPLITS)}")
        return np.flatnonzero(self.splits_N == split)


SOURCES: dict[str, Source] = {source.name: source for source in (Photographs(), Lfw(), Olivetti(), CelebA())}


def source_of(name: str) -> Source:
    """Return a source by name; "photos:PATH" is the folder PATH, relative to DATA_ROOT or absolute.

    Raises:
        UnknownData: unknown name, nearest one included.
    """
    kind, _, path = name.partition(":")
    if kind == "photos" and path:
        return Folder(path)
    if name in SOURCES:
        return SOURCES[name]
    raise sources.UnknownData(f"unknown faces '{name}';{sources._hint(name, [*SOURCES, PROCEDURAL])}, photos:PATH")


def is_faces(name: str) -> bool:
    """Return whether a name is that of a set of faces, or of the form of one; nothing is looked for."""
    return name == PROCEDURAL or name in SOURCES or name.startswith("photos:")


def split_of(person: str) -> str:
    """Return the split of a person: a pure function of the name."""
    place = int.from_bytes(hashlib.sha256(person.encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares make a hundred")


def content_sha256(name: str) -> str:
    """Return the sha256 that says what a set of faces holds: pinned, of the files at hand, or of the code that draws them.

    Raises:
        UnknownData: unknown name, nearest one included.
        DataUnavailable: a set that is not pinned is not on this machine.
    """
    if name == PROCEDURAL:
        return _code_sha256(*DRAWING)
    source = source_of(name)
    try:
        return source.measure()[0]
    except NotThisWay as error:
        raise DataUnavailable(_advice(source, [f"local: {error}"]) + f" Then `fivefold data {name}`.") from error


def face_card(name: str, fetch: bool = True, size: int = DEFAULT_SIZE) -> DataCard:
    """Return what a set of faces is; it is on this machine afterwards, aligned at this size.

    Raises:
        UnknownData, DataUnavailable: see `load_faces`.
    """
    return drawn_card() if name == PROCEDURAL else load_faces(name, size, fetch=fetch, progress=True).card


def drawn_card() -> DataCard:
    """Return the card of procedural faces: none of them real, as many as are asked for."""
    note = "drawn by rule, every face another one: no photographs, no persons"
    code = _code_sha256(*DRAWING)
    return DataCard("procedural faces", 0, code, "Apache-2.0", False, "datamodules/procedural_faces.py", note)


def load_faces(
    name: str,
    size: int = DEFAULT_SIZE,
    drawn: Mapping[str, int] | None = None,
    fetch: bool = True,
    progress: bool = False,
) -> FaceSet:
    """Return a set of faces, fetched and aligned the first time, then read from its file and checked by hash.

    Args:
        name: see the head of this file.
        size: side of the picture proper in pixels.
        drawn: how many procedural faces of each split; default `DRAWN`. Fewer are the first of more.
        fetch: False to use only what is on this machine.
        progress: show a bar while aligning.
    Raises:
        ValueError: an impossible size or number.
        UnknownData: unknown name, nearest one included.
        DataUnavailable: nothing led to the pictures, each way and what it said; or no picture gave a face, and why.
    """
    if size < SMALLEST_SIZE:
        raise ValueError(f"size must be at least {SMALLEST_SIZE}, got {size}: smaller faces show nothing")
    if name == PROCEDURAL:
        return _load_drawn(size, {**DRAWN, **(drawn or {})})
    from datamodules.face_crops import align_all

    source = source_of(name)
    way = _obtain(source, fetch)
    content, n = source.measure()
    arrays, note = kept(
        f"{name.partition(':')[0]}-{size}",
        f"{content}|{_code_sha256(*ALIGNING)}",
        partial(align_all, source, size, split_of, n, progress),
    )
    card = DataCard(source.title, len(arrays["names"]), content, source.licence, True, way, note)
    return _face_set(arrays, size, card)


def _load_drawn(size: int, counts: Mapping[str, int]) -> FaceSet:
    for split, count in counts.items():
        if split not in SPLITS or count < 1:
            raise ValueError(f"procedural faces are drawn by the split, at least 1 of each, got {split}: {count}")
    code = _code_sha256(*DRAWING)
    made = [
        kept(f"{PROCEDURAL}-{split}-{count}-{size}", code, partial(_draw, split, count, size))[0]
        for split, count in counts.items()
    ]
    arrays = {part: np.concatenate([one[part] for one in made]) for part in PARTS}
    return _face_set(arrays, size, drawn_card())


def _face_set(arrays: Arrays, size: int, card: DataCard) -> FaceSet:
    crops, points, names, people, splits = (arrays[part] for part in PARTS)
    return FaceSet(crops, points, names, people, splits, size, card)


def _draw(split: str, count: int, size: int) -> tuple[Arrays, str]:
    from datamodules.procedural_faces import draw_face

    faces = [draw_face(split, index, size) for index in range(count)]
    names = np.array([f"{split} {index}" for index in range(count)])
    return {
        "crops": np.stack([face.pixels_HW3 for face in faces]),
        "points": np.stack([face.points_52 for face in faces]).astype(np.float32),
        "names": names,
        "people": names,
        "splits": np.full(count, split),
    }, ""


def astronaut(size: int = DEFAULT_SIZE) -> np.ndarray:
    """Return the aligned face of scikit-image's astronaut with its margins, uint8 (S, S, 3): one photograph, for a check.

    Raises:
        DataUnavailable: scikit-image is not installed.
    Source: Eileen Collins, NASA, public domain.
    """
    from datamodules.face_align import cut_face
    from datamodules.face_crops import find_points

    try:
        from skimage.data import astronaut as photograph
    except ImportError as error:
        raise DataUnavailable(
            f"the astronaut's photograph is in scikit-image, which cannot be imported: {error}"
        ) from error
    pixels_HW3 = photograph()
    return cut_face(pixels_HW3, find_points(pixels_HW3), size).pixels_SS3


def _obtain(source: Source, fetch: bool) -> str:
    """Try each way in turn, as `sources.load_images` does; the answer says where the pictures came from."""
    said = []
    for way in sources._ways(fetch):
        for attempt in range(1 if way == "local" else sources.ATTEMPTS):
            try:
                return str(getattr(source, way)())
            except NotThisWay as error:
                said.append(f"{way}: {error}")
                break
            except Exception as error:
                said.append(f"{way}, attempt {attempt + 1}: {type(error).__name__}: {error}")
    raise DataUnavailable(_advice(source, said))


def _advice(source: Source, said: Sequence[str]) -> str:
    tried = "\n".join(f"  - {line}" for line in said) or "  - nothing was allowed to be tried"
    return (
        f"{source.title} could not be had. Tried:\n{tried}\n"
        f"Ways out: {source.advice} (DATA_ROOT is {sources.data_root()}); or use {PROCEDURAL}, which are drawn on every "
        "machine: no photographs, another data set, with another name and other numbers."
    )


@cache
def _code_sha256(*modules: str) -> str:
    """Of modules of this package, without comments and layout."""
    folder = Path(__file__).parent
    code = (ast.unparse(ast.parse((folder / f"{module}.py").read_text())) for module in modules)
    return hashlib.sha256("\0".join(code).encode()).hexdigest()
