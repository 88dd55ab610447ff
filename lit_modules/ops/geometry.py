"""Sizes and offsets of a 2-D sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """A window over a padded input. Pairs are (height, width).

    `kernel`, `stride` and `dilation` are in pixels, `output` is the number of window positions.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    output: tuple[int, int]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Every (k, q) of the kernel in row-major order, the order in which "first" is first."""
        return [(k, q) for k in range(self.kernel[0]) for q in range(self.kernel[1])]

    def view(self, x_BCHW: Tensor, k: int, q: int) -> Tensor:
        """Return the pixels under kernel offset (k, q) at every window position: a view (B, C, *output)."""
        rows, columns = (self._slice(axis, offset) for axis, offset in enumerate((k, q)))
        return x_BCHW[:, :, rows, columns]

    def _slice(self, axis: int, offset: int) -> slice:
        start = offset * self.dilation[axis]
        return slice(start, start + (self.output[axis] - 1) * self.stride[axis] + 1, self.stride[axis])


def pair(value: int | tuple[int, int], name: str, least: int) -> tuple[int, int]:
    """Return (value, value) for an int and the pair itself for a pair.

    Raises:
        ValueError: not one or two ints of at least `least`, naming the argument.
    """
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"{name} must be an int, or a pair of ints, of at least {least}; got {value!r}")
    return both[0], both[1]
