"""Compiled work-list propagation over integer rule tables; see `propagate`.

Arrays: domain_T bit sets of splits, bit split + 1. Operation o has widths_O[o] operands, tensors[starts_O[o]...], and
rows_O[o] rows, each a bit per operand, at bits[blocks_O[o]...]; operations that are alike share their rows. users[...] lists
the operations of each tensor.

Legend: T tensors, O operations (variable-gradient ties among them).
"""

from __future__ import annotations

import numba
import numpy as np

MAX_OPERANDS = 256


@numba.njit(cache=True, nogil=True)
def close(
    domain_T, queue_O, queued_O, count, widths_O, starts_O, tensors, rows_O, blocks_O, bits, user_starts_T, users
):
    """Take from each domain what no row supports, until nothing changes.

    Args:
        queue_O: ring buffer whose first `count` entries are the operations to look at; queued_O marks them.
    Returns:
        -1, or the operation that is left without a row; the domains are then of no use.
    """
    size = queue_O.size
    head = 0
    support = np.zeros(MAX_OPERANDS, dtype=np.uint32)
    while count > 0:
        op = queue_O[head]
        head = head + 1 if head + 1 < size else 0
        count -= 1
        queued_O[op] = False
        width, start, block = widths_O[op], starts_O[op], blocks_O[op]
        for k in range(width):
            support[k] = 0
        for row in range(rows_O[op]):
            base = block + row * width
            fits = True
            for k in range(width):
                if bits[base + k] & domain_T[tensors[start + k]] == 0:
                    fits = False
                    break
            if fits:
                for k in range(width):
                    support[k] |= bits[base + k]
        for k in range(width):
            tensor = tensors[start + k]
            left = domain_T[tensor] & support[k]
            if left == 0:
                return op
            if left != domain_T[tensor]:
                domain_T[tensor] = left
                for u in range(user_starts_T[tensor], user_starts_T[tensor + 1]):
                    user = users[u]
                    if user != op and not queued_O[user]:
                        queued_O[user] = True
                        tail = head + count
                        queue_O[tail if tail < size else tail - size] = user
                        count += 1
    return -1
