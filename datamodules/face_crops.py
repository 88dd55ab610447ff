"""From pictures as they are to aligned crops, and the account of what was refused and why.

Legend: N faces, S side of a crop with its margins, F faces found in a picture, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image

from datamodules.face_align import Crop, TooSmall, cut_face
from datamodules.face_detector import MIN_FACE, MIN_SIDE, detect_faces
from datamodules.face_photos import GREYSCALE, TOO_SMALL, Photo, Refused, read_photo
from datamodules.face_sources import Picture, Source
from datamodules.sources import DataUnavailable

SPLITS = ("train", "val", "test")
NO_FACE, SEVERAL, DUPLICATE = "no face", "several faces", "the same file again"
SURE = 0.9  # probability of a face that counts
BACKGROUND = 0.25  # a face of less than this share of the largest one's area is in the background
VIEW = (160, 640)  # to be searched, a picture is enlarged until no side is below, then shrunk until none is beyond


def align_all(
    source: Source, size: int, split_of: Callable[[str], str], n: int = 0, progress: bool = False
) -> tuple[dict[str, np.ndarray], str]:
    """Return the crops of all pictures of a source, with points, names, people and splits; and a note on the rest.

    The order is that of the names' sha256, which mixes people and collections.

    Args:
        source: a data set of pictures.
        size: side of the crops without their margins.
        split_of: the split of a person, where a picture brings none.
        n: how many pictures there are, for the bar.
        progress: show it.
    Raises:
        DataUnavailable: no picture gave a face; how many were refused for which reason.
    """
    rows: list[tuple[Picture, Crop]] = []
    used: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    seen: set[bytes] = set()
    for picture in _bar(source.pictures(), n, f"aligning {source.title}", progress):
        try:
            crop, oddities = align(picture, size, seen)
        except Refused as error:
            refused[error.reason] += 1
            continue
        rows.append((picture, crop))
        used.update(oddities)
    if not rows:
        raise DataUnavailable(
            f"{source.title}: none of the {refused.total()} pictures gave a face of {size} pixels: {_listed(refused)}. "
            f"{source.advice[:1].upper()}{source.advice[1:]}; or use procedural_faces, which are drawn on every machine."
        )
    rows.sort(key=lambda row: hashlib.sha256(row[0].name.encode()).digest())
    arrays = {
        "crops": np.stack([crop.pixels_SS3 for _, crop in rows]),
        "points": np.stack([crop.points_52 for _, crop in rows]).astype(np.float32),
        "names": np.array([picture.name for picture, _ in rows]),
        "people": np.array([picture.person for picture, _ in rows]),
        "splits": np.array([picture.split or split_of(picture.person) for picture, _ in rows]),
    }
    out = sum(crop.reaches_out for _, crop in rows)
    account = (
        f"{len(rows)} faces of {len(rows) + refused.total()} pictures; refused: {_listed(refused)}; "
        f"used all the same: {_listed(used)}; {out} reach beyond their picture and are completed by its reflection"
    )
    return arrays, f"{account}; {_sizes(arrays)}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"


def _sizes(arrays: dict[str, np.ndarray]) -> str:
    sizes = []
    for split in SPLITS:
        own = arrays["splits"] == split
        sizes.append(f"{split} {own.sum()} of {len(set(arrays['people'][own]))} people")
    return ", ".join(sizes)


def _bar(pictures: Iterable[Picture], n: int, what: str, progress: bool) -> Iterator[Picture]:
    from rich.progress import Progress

    with Progress(disable=not progress, transient=True) as bar:
        yield from bar.track(pictures, total=n or None, description=what)


def align(picture: Picture, size: int, seen: set[bytes]) -> tuple[Crop, tuple[str, ...]]:
    """Return the crop of a picture's face, and what was odd about its file.

    Where the data set brings no points, MTCNN's are taken.

    Args:
        picture: as a source yields it.
        size: side of the crop without its margins.
        seen: hashes of the contents met so far, to which this one's is added.
    Raises:
        Refused: the file, see `read_photo`; it was met before, under whatever name, and might be in two splits; or it
            shows no face, several, or too small a one.
    """
    content = picture.content
    if len(content):
        key = hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()
        if key in seen:
            raise Refused(DUPLICATE, picture.name)
        seen.add(key)
    photo = read_photo(content) if isinstance(content, bytes) else _from_pixels(content)
    points_52 = picture.points_52 if picture.points_52 is not None else find_points(photo.pixels_HW3)
    try:
        return cut_face(photo.pixels_HW3, points_52, size), photo.oddities
    except TooSmall as error:
        raise Refused(TOO_SMALL, str(error)) from None


def _from_pixels(pixels: np.ndarray) -> Photo:
    if pixels.ndim == 3:
        return Photo(pixels, ())
    return Photo(np.repeat(pixels[..., None], 3, axis=-1), (GREYSCALE,))


def find_points(pixels_HW3: np.ndarray) -> np.ndarray:
    """Return MTCNN's five points (5, 2) of the one face of a picture uint8 (H, W, 3), in its pixels.

    The face must be at least a tenth of the picture's shorter side; small ones in the background do not count.

    Raises:
        Refused: there is no face, or there are several.
    """
    size_2 = np.array(pixels_HW3.shape[1::-1])
    scale = min(max(1.0, VIEW[0] / size_2.min()), VIEW[1] / size_2.max())
    view_2 = np.maximum(MIN_SIDE, np.round(scale * size_2)).astype(int)
    view = Image.fromarray(pixels_HW3).resize((int(view_2[0]), int(view_2[1])), Image.Resampling.BILINEAR)
    view_1CHW = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None]
    (faces,) = detect_faces(view_1CHW, min_face=max(MIN_FACE, view_2.min() / 10))
    boxes_F4 = faces.boxes_F4[faces.probs_F >= SURE]
    if not len(boxes_F4):
        raise Refused(NO_FACE)
    area_F = (boxes_F4[:, 2:] - boxes_F4[:, :2]).clamp(min=0).prod(-1)
    if (several := int((area_F >= BACKGROUND * area_F.max()).sum())) > 1:
        raise Refused(SEVERAL, str(several))
    points_52 = faces.points_F52[int(area_F.argmax())].double().numpy()
    return (points_52 + 0.5) * size_2 / view_2 - 0.5
