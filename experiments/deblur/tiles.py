"""Pictures of any size through a generator, in tiles that overlap and are blended where they do.

Legend: H height, W width, C channels, L overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Restore = Callable[[np.ndarray], np.ndarray]  # float32 (H, W, C) in [0, 1] to the same

GRID = 32  # what generators halve to: tiles that begin at its multiples are halved where the whole picture would be
SMALLEST_TILE = 64


def check_tiles(tile: int, overlap: int) -> None:
    """Refuse tiles that cannot be blended.

    Raises:
        ValueError: a tile below 64 pixels, or an overlap of less than 0 or more than half a tile.
    """
    if tile < SMALLEST_TILE:
        raise ValueError(f"a tile must be at least {SMALLEST_TILE} pixels, got {tile}")
    if overlap < 0 or _up(overlap) > _up(tile) // 2:
        raise ValueError(f"an overlap must lie between 0 and half a tile of {_up(tile)} pixels, got {overlap}")


def restore_in_tiles(
    image_HWC: np.ndarray, restore: Restore, tile: int, overlap: int, tick: Callable[[float], None] = lambda share: None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the restored picture from the top down, as (first row, float32 (rows, W, C)).

    Of what two tiles share, each one's outer quarter, which suffers from its border, is thrown away, and in the half between
    them they are blended linearly. So a net that looks at most L / 4 pixels around gives what it gives on the whole picture,
    and one that does not, such as one with channel attention, has no edge between tiles. Memory grows with W, not with H.

    Args:
        image_HWC: uint8, uint16, or float32 in [0, 1].
        restore: what is done to a tile.
        tile, overlap: in pixels, rounded up to multiples of 32.
        tick: told after each tile what share of all it was.
    Raises:
        ValueError: see `check_tiles`.
    """
    check_tiles(tile, overlap)
    height, width, channels = image_HWC.shape
    rows, columns = spans(height, tile, overlap), spans(width, tile, overlap)
    ramps = [_ramp(columns, i) for i in range(len(columns))]
    held = np.zeros((0, width, channels), np.float32)  # the rows that the tiles above share with these
    for top, bottom in rows:
        strip = np.zeros((bottom - top, width, channels), np.float32)
        for (left, right), ramp in zip(columns, ramps, strict=True):
            strip[:, left:right] += ramp[:, None] * restore(as_floats(image_HWC[top:bottom, left:right]))
            tick(1 / (len(rows) * len(columns)))
        if shared := len(held):
            rise = _rise(shared)[:, None, None]
            strip[:shared] = (1 - rise) * held + rise * strip[:shared]
        done = bottom - top if bottom == height else _up(tile) - _up(overlap)
        yield top, strip[:done]
        held = strip[done:]


def restore_whole(image_HWC: np.ndarray, restore: Restore, tile: int, overlap: int) -> np.ndarray:
    """Return the same in one piece, float32."""
    return np.concatenate([strip for _, strip in restore_in_tiles(image_HWC, restore, tile, overlap)])


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return where tiles begin and end along one side: each `tile - overlap` after the one before, the last one cut off."""
    tile, step = _up(tile), _up(tile) - _up(overlap)
    return [(start, min(start + tile, length)) for start in range(0, max(1, length - tile + step), step)]


def as_floats(pixels: np.ndarray) -> np.ndarray:
    """Return values as float32 in [0, 1]; `as_values` brings them back, to the bit."""
    return pixels if pixels.dtype == np.float32 else pixels.astype(np.float32) / np.iinfo(pixels.dtype).max


def as_values(floats: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return floats, clamped to [0, 1], as rounded values of an integer type."""
    return np.rint(floats.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)


def _up(size: int) -> int:
    return -(-size // GRID) * GRID


def _ramp(columns: list[tuple[int, int]], i: int) -> np.ndarray:
    """Return the weight of each column of a tile; those of all tiles add up to 1."""
    left, right = columns[i]
    ramp = np.ones(right - left, np.float32)
    if i and (shared := columns[i - 1][1] - left):
        ramp[:shared] = _rise(shared)
    if i + 1 < len(columns) and (shared := right - columns[i + 1][0]):
        ramp[-shared:] = 1 - _rise(shared)
    return ramp


def _rise(shared: int) -> np.ndarray:
    """Return what the later one of two tiles weighs where they overlap."""
    return (((np.arange(shared, dtype=np.float32) + 0.5) / shared - 0.25) * 2).clip(0, 1)
