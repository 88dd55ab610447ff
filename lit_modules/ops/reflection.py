"""Images extended by mirror images of themselves, to sizes that a net can halve.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded_size(size: int, multiple: int, least: int = 1) -> int:
    """Return the smallest multiple of `multiple` that is neither below `size` nor below `least`."""
    wanted = max(size, least)
    return (wanted + multiple - 1) // multiple * multiple  # of positive numbers: ONNX rounds quotients towards 0


def reflect_to_multiple(x_BCHW: Tensor, multiple: int, least: int = 1) -> Tensor:
    """Extend images at the bottom and on the right until H and W are multiples of `multiple` and at least `least`.

    The mirror stands on the last pixel, which is not repeated, as in torch's "reflect"; where the image is too small for
    what is wanted, mirror images follow one another.

    Rows are gathered rather than padded, so that under torch.export H and W may stay symbols, of any parity.
    """
    H, W = x_BCHW.shape[-2:]
    rows, columns = padded_size(H, multiple, least), padded_size(W, multiple, least)
    if not torch.compiler.is_exporting() and (rows, columns) == (H, W):
        return x_BCHW
    return x_BCHW.index_select(-2, _mirror(H, rows, x_BCHW)).index_select(-1, _mirror(W, columns, x_BCHW))


def cut_back(x_BCHW: Tensor, H: int, W: int) -> Tensor:
    """Return the first H rows and W columns.

    A slice would do, but torch.export then asks whether it is contiguous and lets only such sizes through.
    """
    if not torch.compiler.is_exporting():
        return x_BCHW[..., :H, :W]
    rows, columns = (torch.arange(n, device=x_BCHW.device) for n in (H, W))
    return x_BCHW.index_select(-2, rows).index_select(-1, columns)


def _mirror(size: int, wanted: int, like: Tensor) -> Tensor:
    """Return which of `size` positions each of `wanted` ones repeats: 0 1 2 3 2 1 0 1 …"""
    index = torch.arange(wanted, device=like.device)
    if size == 1:
        return torch.zeros_like(index)
    period = index.new_full((), 2 * (size - 1))  # a tensor: exporters divide by no symbol
    index = index % period
    return torch.minimum(index, period - index)
