"""Compiled loops of the cost model: the cheapest rule of an operation, the overlap of gradients, memory over time.

Placements: -1 replicated, -2 partial, 0 and up a dim. `moves[t]` holds the seconds of [all-gather, all-reduce,
reduce-scatter, all-to-all] of tensor t. Nothing here is reordered, so that one evaluation equals another to the last bit.
"""

from __future__ import annotations

import numba
import numpy as np

kernel = numba.njit(cache=True, nogil=True)


@kernel
def move_seconds(before, after, moves):
    """Seconds to bring a tensor from one placement to another."""
    if before == after or before == -1:
        return 0.0
    if before == -2:
        return moves[1] if after == -1 else moves[2]
    return moves[0] if after < 0 else moves[3]


@kernel
def best_row(op, place, operand_ptr, operands, inputs, table_of, row_ptr, row_seconds, code_ptr, codes, moves):
    """Cheapest rule of an operation with its operands where they are: (seconds, index of the rule in its table)."""
    first, last = operand_ptr[op], operand_ptr[op + 1]
    width = last - first
    table = table_of[op]
    cheapest, chosen = np.inf, 0
    for row in range(row_ptr[table], row_ptr[table + 1]):
        total = row_seconds[row]
        at = code_ptr[table] + (row - row_ptr[table]) * width
        for i in range(width):
            tensor = operands[first + i]
            if tensor < 0:
                continue
            if i < inputs[op]:
                total += move_seconds(place[tensor], codes[at + i], moves[tensor])
            else:
                total += move_seconds(codes[at + i], place[tensor], moves[tensor])
            if total >= cheapest:
                break
        if total < cheapest:
            cheapest, chosen = total, row - row_ptr[table]
    return cheapest, chosen


@kernel
def price_ops(
    ops, place, operand_ptr, operands, inputs, table_of, row_ptr, row_seconds, code_ptr, codes, moves, cost, chosen
):
    """Write seconds and rule of the listed operations."""
    for op in ops:
        cost[op], chosen[op] = best_row(
            op, place, operand_ptr, operands, inputs, table_of, row_ptr, row_seconds, code_ptr, codes, moves
        )


@kernel
def price_known(
    ops,
    place,
    known,
    whose,
    seconds,
    operand_ptr,
    operands,
    inputs,
    table_of,
    row_ptr,
    row_seconds,
    code_ptr,
    codes,
    moves,
    cost,
):
    """Write seconds of the listed operations, which depend on the table of rules and the operands' places alone.

    `known`, `whose` and `seconds` remember what was worked out: packed places, table (-1: free) and seconds. Places take 4 bits
    each; operations of more than 16 operands, or more than 14 dims, are not remembered.
    """
    size = len(known)
    for op in ops:
        first, last, table = operand_ptr[op], operand_ptr[op + 1], table_of[op]
        packed, fits = np.int64(0), last - first <= 16
        for i in range(first, last):
            split = place[operands[i]] if operands[i] >= 0 else -2
            packed = (packed << 4) | (split + 2)
            fits = fits and split < 14
        mixed = (packed ^ (packed >> 29)) * 0x9E3779B1 + table * 0x85EBCA6B
        at = ((mixed >> 15) ^ mixed) & (size - 1)
        for _ in range(8):
            if whose[at] < 0 or (whose[at] == table and known[at] == packed):
                break
            at = (at + 1) & (size - 1)
        if fits and whose[at] == table and known[at] == packed:
            cost[op] = seconds[at]
            continue
        cost[op], _ = best_row(
            op, place, operand_ptr, operands, inputs, table_of, row_ptr, row_seconds, code_ptr, codes, moves
        )
        if fits:  # in place of the last one looked at, where all are taken
            known[at], whose[at], seconds[at] = packed, table, cost[op]


@kernel
def follow(slots, writes, active, base, place, touch_ptr, touching, seen, mark, stamp, log, old, dirty, kept, cost):
    """Place what these slots write, and list the operations that touch what has changed.

    A tensor lies as its first active writer has it, or as in `base` where there is none.

    Args:
        writes: starts and tensors of each slot; starts, slots and placements of each tensor's writers.
        seen, mark, stamp: tensors and operations met now bear the stamp.
        log, old, dirty, kept: written: tensors with their places before, operations with their seconds before.
    Returns:
        How many tensors and how many operations.
    """
    write_ptr, tensors, writer_ptr, writer_slot, writer_split = writes
    changed, count = 0, 0
    for slot in slots:
        for i in range(write_ptr[slot], write_ptr[slot + 1]):
            tensor = tensors[i]
            if seen[tensor] == stamp:
                continue
            seen[tensor], split = stamp, base[tensor]
            for j in range(writer_ptr[tensor], writer_ptr[tensor + 1]):
                if active[writer_slot[j]]:
                    split = writer_split[j]
                    break
            if place[tensor] == split:
                continue
            log[changed], old[changed] = tensor, place[tensor]
            changed += 1
            place[tensor] = split
            for j in range(touch_ptr[tensor], touch_ptr[tensor + 1]):
                op = touching[j]
                if mark[op] != stamp:
                    mark[op] = stamp
                    dirty[count], kept[count] = op, cost[op]
                    count += 1
    return changed, count


@kernel
def sync_seconds(place, gradient, variable, moves, across):
    """Per variable, seconds to bring its gradient to where the variable lies, and to sum it over rows of the mesh."""
    found = np.empty(len(gradient))
    for i in range(len(gradient)):
        found[i] = 0.0
        if gradient[i] >= 0:
            found[i] = move_seconds(place[gradient[i]], place[variable[i]], moves[i])
            found[i] += across[i, 1 if place[variable[i]] >= 0 else 0]
    return found


@kernel
def finish(cost, backward, maker, sync, overlap):
    """Forward seconds, backward seconds, seconds of gradient sums, and how many of them nothing hides.

    `maker` ascends: the operation that makes each gradient. Sums run one after another beside the backward pass.
    """
    forward_s, backward_s, busy, total, i = 0.0, 0.0, 0.0, 0.0, 0
    for op in range(len(cost)):
        if backward[op]:
            backward_s += cost[op]
        else:
            forward_s += cost[op]
        while i < len(maker) and maker[i] <= op:
            total += sync[i]
            if sync[i] > 0:
                busy = max(busy, forward_s + backward_s) + sync[i]
            i += 1
    exposed = max(busy - forward_s - backward_s, 0.0)
    return forward_s, backward_s, total, exposed if overlap else total


@kernel
def parts(place, cost, backward, maker, gradient, variable, sums, across, size, devices, overlap):
    """Forward seconds, backward seconds, seconds of gradient sums that nothing hides, bytes of variables on one device."""
    sync = sync_seconds(place, gradient, variable, sums, across)
    forward_s, backward_s, _, exposed = finish(cost, backward, maker, sync, overlap)
    held = 0.0
    for tensor in variable:
        held += size[tensor] / (devices if place[tensor] >= 0 else 1)
    return forward_s, backward_s, exposed, held


@kernel
def live_bytes(place, size, devices, alloc_ptr, allocs, free_ptr, frees, backward):
    """Peak of live activations over one micro-batch, and what is kept when the forward pass ends."""
    live, peak, kept, in_forward = 0.0, 0.0, 0.0, True
    for op in range(len(backward)):
        if in_forward and backward[op]:
            in_forward = False
            kept = live
        for j in range(alloc_ptr[op], alloc_ptr[op + 1]):
            live += size[allocs[j]] / (devices if place[allocs[j]] >= 0 else 1)
        peak = max(peak, live)
        for j in range(free_ptr[op], free_ptr[op + 1]):
            live -= size[frees[j]] / (devices if place[frees[j]] >= 0 else 1)
    return peak, (live if in_forward else kept)


@kernel
def descend(
    place,
    option_ptr,
    options,
    touch_ptr,
    touching,
    operand_ptr,
    operands,
    inputs,
    table_of,
    row_ptr,
    row_seconds,
    code_ptr,
    codes,
    moves,
    cost,
    chosen,
    backward,
    maker,
    gradient,
    variable,
    sums,
    across,
    update,
    devices,
    micro_batches,
    overlap,
    passes,
):
    """Move one tensor at a time wherever that makes the step shorter, until nothing does; returns the step's seconds."""
    best = step_seconds(
        place, cost, backward, maker, gradient, variable, sums, across, update, devices, micro_batches, overlap
    )
    for _ in range(passes):
        better = False
        for tensor in range(len(place)):
            for i in range(option_ptr[tensor], option_ptr[tensor + 1]):
                before = place[tensor]
                if options[i] == before:
                    continue
                place[tensor] = options[i]
                around = touching[touch_ptr[tensor] : touch_ptr[tensor + 1]]
                kept = cost[around].copy()
                for op in around:
                    cost[op], _ = best_row(
                        op, place, operand_ptr, operands, inputs, table_of, row_ptr, row_seconds, code_ptr, codes, moves
                    )
                now = step_seconds(
                    place,
                    cost,
                    backward,
                    maker,
                    gradient,
                    variable,
                    sums,
                    across,
                    update,
                    devices,
                    micro_batches,
                    overlap,
                )
                if now < best * (1 - 1e-12):
                    best, better = now, True
                else:
                    place[tensor] = before
                    cost[around] = kept
        if not better:
            break
    return best


@kernel
def step_seconds(
    place, cost, backward, maker, gradient, variable, sums, across, update, devices, micro_batches, overlap
):
    """Seconds of a step of one stage: `update` are the seconds of Adam's step of each variable, whole."""
    found = sync_seconds(place, gradient, variable, sums, across)
    forward_s, backward_s, _, exposed = finish(cost, backward, maker, found, overlap)
    tail = 0.0
    for v in range(len(variable)):
        tail += update[v] / (devices if place[variable[v]] >= 0 else 1)
    return micro_batches * (forward_s + backward_s) + exposed + tail
