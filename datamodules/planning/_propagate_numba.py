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
DONE, STOPPED = -1, -2


kernel = numba.njit(cache=True, nogil=True)


@kernel
def close(domain_T, queue_O, queued_O, count, rules, log, known_T):
    """Take from each domain what no row supports, until nothing changes.

    Args:
        queue_O: ring buffer whose first `count` entries are the operations to look at; queued_O marks them.
        rules: the arrays of the module's description.
        log: written: each change as (tensor, domain before, domain after); none is kept where it has no rows.
        known_T: stop once a changed domain lies within its set here, which 0 never does; empty for never.
    Returns:
        DONE, STOPPED, or the operation that is left without a row (the domains are then of no use), and the changes logged.
    """
    widths_O, starts_O, tensors, rows_O, blocks_O, bits, user_starts_T, users = rules
    size, head, changes = queue_O.size, 0, 0
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
            before = domain_T[tensor]
            left = before & support[k]
            if left == 0:
                return op, changes
            if left == before:
                continue
            domain_T[tensor] = left
            if len(log):
                log[changes, 0], log[changes, 1], log[changes, 2] = tensor, before, left
                changes += 1
                if left & ~known_T[tensor] == 0:
                    return STOPPED, changes
            for u in range(user_starts_T[tensor], user_starts_T[tensor + 1]):
                user = users[u]
                if user != op and not queued_O[user]:
                    queued_O[user] = True
                    tail = head + count
                    queue_O[tail if tail < size else tail - size] = user
                    count += 1
    return DONE, changes


@kernel
def take_back(domain_T, log, changes):
    """Undo logged changes."""
    for i in range(changes - 1, -1, -1):
        domain_T[log[i, 0]] = log[i, 1]
