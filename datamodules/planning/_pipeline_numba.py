"""Compiled pipeline schedules: when every micro-batch passes every resource. Resources take one task at a time, in order."""

from __future__ import annotations

import numba
import numpy as np

kernel = numba.njit(cache=True, nogil=True)


@kernel
def schedule(forward_X, backward_X, warm_up_X, micro_batches, start_f, start_b):
    """Fill in the start of every task (M, X) and return the end of the last; -1 where tasks wait for each other forever.

    Resource x runs `warm_up_X[x]` forwards, then a backward and a forward in turn, then the remaining backwards.
    """
    count, done = len(forward_X), 0
    next_f, next_b = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    free = np.zeros(count)
    length = 0.0
    while done < 2 * count * micro_batches:
        before = done
        for step in range(2 * count):
            x = step if step < count else 2 * count - 1 - step  # up for forwards, down for backwards
            while True:
                f, b = next_f[x], next_b[x]
                if f < micro_batches and f < b + warm_up_X[x]:
                    if x > 0 and next_f[x - 1] <= f:
                        break
                    ready = start_f[f, x - 1] + forward_X[x - 1] if x > 0 else 0.0
                    start_f[f, x] = max(free[x], ready)
                    free[x] = start_f[f, x] + forward_X[x]
                    next_f[x] += 1
                elif b < micro_batches and b < f:
                    if x < count - 1 and next_b[x + 1] <= b:
                        break
                    ready = start_b[b, x + 1] + backward_X[x + 1] if x < count - 1 else 0.0
                    start_b[b, x] = max(free[x], ready)
                    free[x] = start_b[b, x] + backward_X[x]
                    next_b[x] += 1
                else:
                    break
                length = max(length, free[x])
                done += 1
        if done == before:
            return -1.0
    return length
