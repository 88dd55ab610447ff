"""Compiled state of operator partitioning: what a decision assigns, forbids and leaves; see `partition_env`.

A pair is a slot with an action, numbered 2 * slot + action. The tables are the state, value_N (-1 where open), blocked_P (how
many assigned slots forbid a pair), hopes_V (how many slots of a variable may still be partitioned), trail_N (the assigned slots
in order) and totals, and `SlotTable.arrays`. Loops see arrays, not the tuple: taking one from it counts a reference.
Legend: N slots, P pairs, V variables.
"""

from __future__ import annotations

import numba

from datamodules.planning.slot_table import OPEN, PARTITIONED

kernel = numba.njit(cache=True, nogil=True)

# of the totals; the last two say what partitioning the slot at the pointer would partition, itself included
POINTER, BROKEN, ASSIGNED, COUNT, BYTES, HOPEFUL, HOPEFUL_BYTES, NEW, NEW_BYTES = range(9)
TOTALS = 9


@kernel
def _hope(slot, change, hopes_V, totals, variable_N, weight_V, bytes_V):
    """Count a slot that may be partitioned in (1) or out (-1)."""
    variable = variable_N[slot]
    before = hopes_V[variable]
    hopes_V[variable] = before + change
    if (before == 0) != (before + change == 0):
        totals[HOPEFUL] += change * weight_V[variable]
        totals[HOPEFUL_BYTES] += change * bytes_V[variable]


@kernel
def _advance(
    pair,
    order_N,
    linkage,
    mask,
    value_N,
    blocked_P,
    hopes_V,
    trail_N,
    totals,
    variable_N,
    weight_V,
    bytes_V,
    group_ptr_P,
    member,
    assigned,
    rival_ptr_P,
    rivals,
):
    """Decide a pair (-1: none), and with linkage go on to the next slot with a choice, deciding on the way what has none."""
    while True:
        if pair >= 0:
            for at in range(group_ptr_P[pair], group_ptr_P[pair + 1]):
                slot, value = member[at], assigned[at]
                if value_N[slot] != OPEN:
                    continue
                if blocked_P[2 * slot + 1] == 0:
                    _hope(slot, -1, hopes_V, totals, variable_N, weight_V, bytes_V)
                value_N[slot] = value
                for r in range(rival_ptr_P[2 * slot + value], rival_ptr_P[2 * slot + value + 1]):
                    rival = rivals[r]
                    if rival & 1 and blocked_P[rival] == 0 and value_N[rival >> 1] == OPEN:
                        _hope(rival >> 1, -1, hopes_V, totals, variable_N, weight_V, bytes_V)
                    blocked_P[rival] += 1
                if value == PARTITIONED:
                    totals[COUNT] += weight_V[variable_N[slot]]
                    totals[BYTES] += bytes_V[variable_N[slot]]
                trail_N[totals[ASSIGNED]] = slot
                totals[ASSIGNED] += 1
            totals[POINTER] += 1
        if not linkage:
            return
        while totals[POINTER] < len(order_N) and value_N[order_N[totals[POINTER]]] != OPEN:
            totals[POINTER] += 1
        if totals[POINTER] == len(order_N):
            return
        pair = 2 * order_N[totals[POINTER]]
        whole, split = blocked_P[pair] == 0, blocked_P[pair + 1] == 0
        if (whole and split) or ((whole or split) and not mask):
            return
        if not (whole or split):
            totals[BROKEN] = 1
            return
        pair += not whole


@kernel
def _look(order_N, tables):
    """Note what partitioning the slot at the pointer would bring."""
    value_N, _, _, _, totals, variable_N, _, bytes_V, group_ptr_P, member, assigned, _, _ = tables
    totals[NEW], totals[NEW_BYTES] = 0, 0
    if totals[POINTER] < len(order_N):
        pair = 2 * order_N[totals[POINTER]] + 1
        for at in range(group_ptr_P[pair], group_ptr_P[pair + 1]):
            if assigned[at] == PARTITIONED and value_N[member[at]] == OPEN:
                totals[NEW] += 1
                totals[NEW_BYTES] += bytes_V[variable_N[member[at]]]


@kernel
def begin(order_N, linkage, mask, tables):
    """Count what may be partitioned, and settle."""
    _, blocked_P, hopes_V, _, totals, variable_N, weight_V, bytes_V, _, _, _, _, _ = tables
    for slot in range(len(order_N)):
        if blocked_P[2 * slot + 1] == 0:
            _hope(slot, 1, hopes_V, totals, variable_N, weight_V, bytes_V)
    _advance(-1, order_N, linkage, mask, *tables)
    _look(order_N, tables)


@kernel
def decide(action, order_N, linkage, mask, tables):
    """Take an action at the pointer; where it is blocked the plan is broken and nothing else changes."""
    blocked_P, totals = tables[1], tables[4]
    pair = 2 * order_N[totals[POINTER]] + action
    if blocked_P[pair] > 0:
        totals[BROKEN] = 1
        return
    _advance(pair, order_N, linkage, mask, *tables)
    _look(order_N, tables)


@kernel
def retract(assigned, pointer, order_N, tables):
    """Go back to where so many slots were assigned and the pointer stood there."""
    value_N, blocked_P, hopes_V, trail_N, totals, variable_N, weight_V, bytes_V, _, _, _, rival_ptr_P, rivals = tables
    while totals[ASSIGNED] > assigned:
        totals[ASSIGNED] -= 1
        slot = trail_N[totals[ASSIGNED]]
        value = value_N[slot]
        if value == PARTITIONED:
            totals[COUNT] -= weight_V[variable_N[slot]]
            totals[BYTES] -= bytes_V[variable_N[slot]]
        for r in range(rival_ptr_P[2 * slot + value], rival_ptr_P[2 * slot + value + 1]):
            rival = rivals[r]
            blocked_P[rival] -= 1
            if rival & 1 and blocked_P[rival] == 0 and value_N[rival >> 1] == OPEN:
                _hope(rival >> 1, 1, hopes_V, totals, variable_N, weight_V, bytes_V)
        value_N[slot] = OPEN
        if blocked_P[2 * slot + 1] == 0:
            _hope(slot, 1, hopes_V, totals, variable_N, weight_V, bytes_V)
    totals[POINTER], totals[BROKEN] = pointer, 0
    _look(order_N, tables)
