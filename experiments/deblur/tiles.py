"""Pictures of any size through a generator, in tiles that overlap and are blended where they do.

Legend: B batch, H height, W width, C channels, L overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Restore = Callable[[np.ndarray], np.ndarray]  # float32 (B, H, W, C) in [0, 1] to the same

GRID = 32  # what generators halve to: tiles that begin at its multiples are halved where the whole picture would be
SMALLEST_TILE = 64
PIXELS = 1 << 16  # of tiles that are restored at once, though never less than one tile


def rounded_tiles(tile: int, overlap: int | None) -> tuple[int, int]:
    """Return tile and overlap as multiples of 32, rounded up; half a tile where there is no overlap given.

    Raises:
        ValueError: a tile below 64 pixels, or an overlap of less than 0 or more than half a tile.
    """
    if tile < SMALLEST_TILE:
        raise ValueError(f"a tile must be at least {SMALLEST_TILE} pixels, got {tile}")
    size = -(-tile // GRID) * GRID
    shared = size // 2 // GRID * GRID if overlap is None else -(-overlap // GRID) * GRID
    if shared > size // 2 or (overlap or 0) < 0:
        raise ValueError(f"an overlap must lie between 0 and half a tile of {size} pixels, got {overlap}")
    return size, shared


def restore_in_tiles(
    image_HWC: np.ndarray, restore: Restore, tile: int, overlap: int, tick: Callable[[float], None] = lambda share: None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the restored picture from the top down, as (first row, float32 (rows, W, C)).

    Of the overlap, a tile's outer quarter, which suffers from its border, is thrown away, and the half after it is blended
    linearly. So a net that looks at most L / 4 pixels around gives what it gives on the whole picture, and one that does
    not, such as one with channel attention, has no edge between tiles. Memory grows with W, not with H.

    Args:
        image_HWC: uint8, uint16, or float32 in [0, 1].
        restore: what is done to a tile.
        tile, overlap: in pixels, see `rounded_tiles`.
        tick: told after each row of tiles what share of all it was.
    """
    height, width, channels = image_HWC.shape
    rows, columns = spans(height, tile, overlap), spans(width, tile, overlap)
    weights = [window_weights(axis, overlap) for axis in (rows, columns)]
    batch = max(1, PIXELS // (tile * tile))
    held_HWC = np.zeros((0, width, channels), np.float32)  # what the tiles so far say of rows that are not finished
    for i, (top, bottom) in enumerate(rows):
        strip_HWC = np.zeros((bottom - top, width, channels), np.float32)
        strip_HWC[: len(held_HWC)] = held_HWC
        for start in range(0, len(columns), batch):
            some = columns[start : start + batch]
            tiles_BHWC = np.stack([as_floats(image_HWC[top:bottom, left:right]) for left, right in some])
            for (left, right), along_W, new_HWC in zip(some, weights[1][start:], restore(tiles_BHWC), strict=False):
                strip_HWC[:, left:right] += weights[0][i][:, None, None] * along_W[:, None] * new_HWC
        finished = rows[i + 1][0] - top if i + 1 < len(rows) else bottom - top
        yield top, strip_HWC[:finished]
        held_HWC = strip_HWC[finished:]
        tick(1 / len(rows))


def restore_whole(image_HWC: np.ndarray, restore: Restore, tile: int, overlap: int) -> np.ndarray:
    """Return the same in one piece, float32."""
    return np.concatenate([strip for _, strip in restore_in_tiles(image_HWC, restore, tile, overlap)])


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return where tiles begin and end along one side: each `tile - overlap` after the one before, the last one at the end.

    All are of one size, for a net may have learnt what pictures of its size are like on average.
    """
    if length <= tile:
        return [(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [(start, start + tile) for start in starts]


def window_weights(tiles: Sequence[tuple[int, int]], overlap: int) -> list[np.ndarray]:
    """Return the weight of each pixel of each tile along one side, float32; those of all tiles add up to 1."""
    length = tiles[-1][1]
    raw = []
    for start, end in tiles:
        inside = np.arange(end - start) + 0.5
        far = np.full(end - start, np.inf)  # from any other tile, where the picture ends
        nearest = np.minimum(inside if start else far, inside[::-1] if end < length else far)
        raw.append((nearest / overlap * 2 - 0.5).clip(0, 1) if overlap else np.ones(end - start))
    total = np.zeros(length)
    for (start, end), weight in zip(tiles, raw, strict=True):
        total[start:end] += weight
    return [(w / total[start:end]).astype(np.float32) for (start, end), w in zip(tiles, raw, strict=True)]


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Return values as float32 in [0, 1]; `as_values` brings them back, to the bit."""
    return pixels if pixels.dtype == np.float32 else pixels.astype(np.float32) / np.iinfo(pixels.dtype).max


def as_values(floats: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return floats, clamped to [0, 1], as rounded values of an integer type."""
    return np.rint(floats.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)
