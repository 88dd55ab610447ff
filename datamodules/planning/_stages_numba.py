"""Compiled searches of pipeline cuts: the dynamic programme on the short form, branch and bound on the exact length.

Places of device cuts come in windows: option a of cut s is the first device of stage s; stage s between options a and b has
`count[s, a, b]` devices (0: none) and sums gradients in the least of three straight lines `sums[s, a, b]` of its bytes, and
hands over to the next stage along the straight line `hop[s, a, b, c]`. Prefix sums have K + 1 entries.
"""

from __future__ import annotations

import numba
import numpy as np

from datamodules.planning._pipeline_numba import schedule

kernel = numba.njit(cache=True, nogil=True)


@kernel
def line(pieces, size):
    """The least of several straight lines (offset, slope)."""
    least = np.inf
    for i in range(len(pieces)):
        least = min(least, pieces[i, 0] + pieces[i, 1] * size)
    return least


@kernel
def cheapest_under(ceiling, both, cross, count, hop, fits, values, came):
    """Least sum of all resources of which none reaches `ceiling`: the dynamic programme over (stage, layers, devices).

    `values[s, k, a, b]` is the least sum of the first s + 1 stages, ending before layer k, stage s between options a and b.
    Times are of one micro-batch. Returns (sum, options of the last stage), infinity where there is none; `came[s, k, a, b]`
    says (layer, option) before.
    """
    stages, layers = count.shape[0], len(both) - 1
    values[:] = np.inf
    for s in range(stages):
        for k in range(s + 1, layers - (stages - 1 - s) + 1):
            for a in range(count.shape[1]):
                for b in range(count.shape[2]):
                    n = count[s, a, b]
                    if n == 0:
                        continue
                    for j in range(s, k) if s else range(1):
                        own = (both[k] - both[j]) / n
                        if own >= ceiling or not fits[s, a, b, j, k]:
                            continue
                        if s == 0:
                            if own < values[s, k, a, b]:
                                values[s, k, a, b] = own
                            continue
                        for z in range(count.shape[1]):
                            if values[s - 1, j, z, a] == np.inf:
                                continue
                            step = 2 * (hop[s - 1, z, a, b, 0] + hop[s - 1, z, a, b, 1] * cross[j])
                            total = values[s - 1, j, z, a] + step + own
                            if step < ceiling and total < values[s, k, a, b]:
                                values[s, k, a, b] = total
                                came[s, k, a, b, 0], came[s, k, a, b, 1] = j, z
    best, where_a, where_b = np.inf, -1, -1
    for a in range(count.shape[1]):
        for b in range(count.shape[2]):
            if values[stages - 1, layers, a, b] < best:
                best, where_a, where_b = values[stages - 1, layers, a, b], a, b
    return best, where_a, where_b


@kernel
def exact_length(f, b, tails, warm_up, micro_batches, start_f, start_b):
    """End of a step: each stage's last backward and its tail."""
    schedule(f, b, warm_up, micro_batches, start_f, start_b)
    length = 0.0
    for s in range(len(tails)):
        x = 2 * s
        length = max(length, start_b[micro_batches - 1, x] + b[x] + tails[s])
    return length


@kernel
def bound(f, b, tails, warm_up, fixed, rest, micro_batches, done):
    """A length that no completion is below: resources 0 to fixed - 1 are known, `rest` is forward and backward of the others
    on all devices left; `done` when nothing is left."""
    before_f, before_b, least = 0.0, 0.0, 0.0
    total = rest
    for x in range(fixed):
        total += f[x] + b[x]
    after = total
    for x in range(fixed):
        after -= f[x] + b[x]
        busy = before_f + micro_batches * (f[x] + b[x])
        waits = before_f + f[x] + after + micro_batches * b[x] + max(micro_batches - warm_up[x], 0) * f[x]
        tail = tails[x // 2] if x % 2 == 0 else 0.0
        least = max(least, max(busy, waits) + max(tail, before_b))
        before_f += f[x]
        before_b += b[x]
    if not done:
        least = max(least, before_f + before_b + micro_batches * rest)
    return least


@kernel
def search(
    forward,
    backward,
    cross,
    weights,
    places,
    count,
    sums,
    hop,
    fits,
    warm_up,
    update,
    micro_batches,
    cuts,
    options,
    best,
    limit,
):
    """Depth-first over stages; what cannot beat `best` is cut off. Writes the best cuts; returns (length, nodes, finished)."""
    stages, layers = count.shape[0], len(forward) - 1
    resources = 2 * stages - 1
    f, b, tails = np.zeros(resources), np.zeros(resources), np.zeros(stages)
    start_f, start_b = np.zeros((micro_batches, resources)), np.zeros((micro_batches, resources))
    end_k, end_o = np.zeros(stages + 1, dtype=np.int64), np.zeros(stages + 1, dtype=np.int64)
    level, nodes = 0, 0
    width = count.shape[2]
    cursor = np.zeros(stages, dtype=np.int64)
    while level >= 0:
        first, a = (end_k[level], end_o[level])
        last_k = layers - (stages - 1 - level)
        span = last_k - first
        if cursor[level] >= span * width:
            level -= 1
            continue
        k, o = first + 1 + cursor[level] // width, cursor[level] % width
        cursor[level] += 1
        if level == stages - 1 and k != layers:
            continue
        n = count[level, a, o]
        if n == 0 or not fits[level, a, o, first, k]:
            continue
        nodes += 1
        if nodes > limit:
            return best, nodes, False
        x = 2 * level
        f[x] = (forward[k] - forward[first]) / n / micro_batches
        b[x] = (backward[k] - backward[first]) / n / micro_batches
        size = weights[k] - weights[first]
        tails[level] = line(sums[level, a, o], size) + update * size
        if level:
            z = end_o[level - 1]
            f[x - 1] = hop[level - 1, z, a, o, 0] + hop[level - 1, z, a, o, 1] * cross[first] / micro_batches
            b[x - 1] = f[x - 1]
        rest = 0.0
        if level < stages - 1:
            devices_left = places[stages, 0] - places[level + 1, o]
            rest = (forward[layers] - forward[k] + backward[layers] - backward[k]) / devices_left / micro_batches
        if bound(f, b, tails, warm_up, x + 1, rest, micro_batches, level == stages - 1) >= best * (1 - 1e-12):
            continue
        end_k[level + 1], end_o[level + 1] = k, o
        if level < stages - 1:
            level += 1
            cursor[level] = 0
            continue
        length = exact_length(f, b, tails, warm_up, micro_batches, start_f, start_b)
        if length < best:
            best = length
            cuts[:] = end_k[1:stages]
            options[:] = end_o[1:stages]
    return best, nodes, True
