"""Compiled CPU kernels of the tropical convolution: LLVM through numba, so no compiler is needed where they run.

Only the inner reduction by min is written; a max is a min of the negated operands (duality). The batch is the innermost
axis: every inner loop runs over contiguous images, which vectorises for any stride, dilation or kernel size. Patches are
never written out; the backward pass finds the winners again instead of having stored them.

Arrays come flat. `taps` holds the distance, in elements, of each kernel position from the window's corner.

Legend: B batch, C channels per group, F filters, H W padded input, P output positions, K taps (kernel positions), T tile.
"""

from __future__ import annotations

import numba
import numpy as np

TILE = 256  # images per inner loop: long enough to hide its start-up, short enough for the first-level cache
SUM, MIN, MAX = 0, 1, 2  # how channels are reduced
LANES = 4  # partial sums of a weight's gradient
FLAGS = {"reassoc", "nsz"}  # sums may be reordered; NaN and infinity keep their meaning


@numba.njit(cache=True, nogil=True, fastmath=FLAGS, inline="always")
def _reduce(x, corner, taps, w_K, n, value_T):
    """value[t] = min over the taps of x[corner + tap + t] + w[tap]: four taps for each pass over the tile."""
    first = x[corner + taps[0] : corner + taps[0] + n]
    weight = w_K[0]
    for t in range(n):
        value_T[t] = first[t] + weight
    k = 1
    while k + 3 < taps.size:
        w0, w1, w2, w3 = w_K[k], w_K[k + 1], w_K[k + 2], w_K[k + 3]
        r0, r1, r2, r3 = corner + taps[k], corner + taps[k + 1], corner + taps[k + 2], corner + taps[k + 3]
        x0, x1, x2, x3 = x[r0 : r0 + n], x[r1 : r1 + n], x[r2 : r2 + n], x[r3 : r3 + n]
        for t in range(n):
            a, b, c, d = x0[t] + w0, x1[t] + w1, x2[t] + w2, x3[t] + w3
            a = b if b < a else a
            c = d if d < c else c
            a = c if c < a else a
            best = value_T[t]
            value_T[t] = a if a < best else best
        k += 4
    while k < taps.size:
        r0, w0 = corner + taps[k], w_K[k]
        x0 = x[r0 : r0 + n]
        for t in range(n):
            a = x0[t] + w0
            best = value_T[t]
            value_T[t] = a if a < best else best
        k += 1


@numba.njit(cache=True, nogil=True, fastmath=FLAGS, inline="always")
def _reduce_with_winner(x, corner, taps, w_K, n, value_T, winner_T):
    """The same, and the first tap that attains it."""
    first = x[corner + taps[0] : corner + taps[0] + n]
    weight = w_K[0]
    for t in range(n):
        value_T[t] = first[t] + weight
        winner_T[t] = 0
    k = 1
    while k + 3 < taps.size:
        w0, w1, w2, w3 = w_K[k], w_K[k + 1], w_K[k + 2], w_K[k + 3]
        r0, r1, r2, r3 = corner + taps[k], corner + taps[k + 1], corner + taps[k + 2], corner + taps[k + 3]
        x0, x1, x2, x3 = x[r0 : r0 + n], x[r1 : r1 + n], x[r2 : r2 + n], x[r3 : r3 + n]
        k0, k1, k2, k3 = np.int32(k), np.int32(k + 1), np.int32(k + 2), np.int32(k + 3)
        for t in range(n):
            a, b, c, d = x0[t] + w0, x1[t] + w1, x2[t] + w2, x3[t] + w3
            ab = k1 if b < a else k0
            a = b if b < a else a
            cd = k3 if d < c else k2
            c = d if d < c else c
            which = cd if c < a else ab
            a = c if c < a else a
            best = value_T[t]
            winner_T[t] = which if a < best else winner_T[t]
            value_T[t] = a if a < best else best
        k += 4
    while k < taps.size:
        r0, w0, k0 = corner + taps[k], w_K[k], np.int32(k)
        x0 = x[r0 : r0 + n]
        for t in range(n):
            a = x0[t] + w0
            best = value_T[t]
            winner_T[t] = k0 if a < best else winner_T[t]
            value_T[t] = a if a < best else best
        k += 1


@numba.njit(cache=True, nogil=True, fastmath=FLAGS)
def forward(x, corners_P, planes_C, taps, w_FCK, mix_FC, y_FPB, outer, batch):
    """Fill y: per channel the min over the taps of x + w, then over channels the (weighted) sum, min or max."""
    filters, channels = w_FCK.shape[0], w_FCK.shape[1]
    per_group = filters // (planes_C.size // channels)
    mixed = mix_FC.shape[0] > 0
    value_T = np.empty(TILE, x.dtype)
    for low in range(0, batch, TILE):
        n = min(batch, low + TILE) - low
        for p in range(corners_P.size):
            for f in range(filters):  # inside positions: all filters read one window while it is in cache
                base = (f // per_group) * channels
                out = y_FPB[f, p, low : low + n]
                for c in range(channels):
                    _reduce(x, planes_C[base + c] + corners_P[p] + low, taps, w_FCK[f, c], n, value_T)
                    share = mix_FC[f, c] if mixed else mix_FC.dtype.type(1)
                    if c == 0:
                        for t in range(n):
                            out[t] = value_T[t] * share
                    elif outer == SUM:
                        for t in range(n):
                            out[t] += value_T[t] * share
                    elif outer == MIN:
                        for t in range(n):
                            out[t] = value_T[t] if value_T[t] < out[t] else out[t]
                    else:
                        for t in range(n):
                            out[t] = value_T[t] if value_T[t] > out[t] else out[t]


@numba.njit(cache=True, nogil=True, fastmath=FLAGS)
def _channel_winners(x, corner, planes_C, base, taps, w_CK, n, outer, value_T, best_T, winner_T, count_T):
    """For an outer min or max: each image's best channel value, the first channel that has it, and how many have."""
    for c in range(w_CK.shape[0]):
        _reduce(x, planes_C[base + c] + corner, taps, w_CK[c], n, value_T)
        for t in range(n):
            value, best = value_T[t], best_T[t]
            better = c == 0 or (value < best if outer == MIN else value > best)
            tied = c > 0 and value == best
            best_T[t] = value if better else best
            winner_T[t] = c if better else winner_T[t]
            count_T[t] = 1 if better else count_T[t] + tied


@numba.njit(cache=True, nogil=True, fastmath=FLAGS, inline="always")
def _hand_to_first(corner, taps, n, winner_T, grad_T, dx, dw_KL):
    """Give grad[t] to the winning tap. An empty dx is one that nobody needs."""
    for t in range(n):  # neighbours add to different lanes, so that no addition waits for the one before
        dw_KL[winner_T[t], t % LANES] += grad_T[t]
    if dx.size:
        for t in range(n):
            dx[corner + taps[winner_T[t]] + t] += grad_T[t]


@numba.njit(cache=True, nogil=True, fastmath=FLAGS)
def _share_among_ties(x, corner, taps, w_K, n, value_T, grad_T, count_T, dx, dw_KL):
    """Give grad[t] in equal parts to all taps that attain value[t]."""
    zero = grad_T.dtype.type(0)
    for t in range(n):
        count_T[t] = 0
    for k in range(taps.size):
        row, weight = x[corner + taps[k] : corner + taps[k] + n], w_K[k]
        for t in range(n):
            count_T[t] += row[t] + weight == value_T[t]
    for t in range(n):
        grad_T[t] /= count_T[t]
    for k in range(taps.size):
        start, weight = corner + taps[k], w_K[k]
        row = x[start : start + n]
        total = zero
        for t in range(n):
            total += grad_T[t] if row[t] + weight == value_T[t] else zero
        if dx.size:
            into = dx[start : start + n]
            for t in range(n):
                into[t] += grad_T[t] if row[t] + weight == value_T[t] else zero
        dw_KL[k, 0] += total


@numba.njit(cache=True, nogil=True, fastmath=FLAGS)
def backward(x, corners_P, planes_C, taps, w_FCK, mix_FC, g_FPB, outer, batch, split, dx, dw_FCKL, dmix_FC):
    """Add to dx, dw and dmix the gradients of sum(g * y). Both are float64, dw in LANES parts."""
    filters, channels = w_FCK.shape[0], w_FCK.shape[1]
    per_group = filters // (planes_C.size // channels)
    mixed = mix_FC.shape[0] > 0
    one, zero = mix_FC.dtype.type(1), mix_FC.dtype.type(0)
    value_T, best_T, grad_T = np.empty(TILE, x.dtype), np.zeros(TILE, x.dtype), np.empty(TILE, x.dtype)
    winner_T, channel_T, count_T = np.zeros(TILE, np.int32), np.zeros(TILE, np.int32), np.zeros(TILE, np.int32)
    for low in range(0, batch, TILE):
        n = min(batch, low + TILE) - low
        for p in range(corners_P.size):
            at = corners_P[p] + low
            for f in range(filters):
                base = (f // per_group) * channels
                g = g_FPB[f, p, low : low + n]
                if outer != SUM:
                    _channel_winners(
                        x, at, planes_C, base, taps, w_FCK[f], n, outer, value_T, best_T, channel_T, count_T
                    )
                for c in range(channels):
                    corner = planes_C[base + c] + at
                    _reduce_with_winner(x, corner, taps, w_FCK[f, c], n, value_T, winner_T)
                    if outer == SUM:
                        share = mix_FC[f, c] if mixed else one
                        for t in range(n):
                            grad_T[t] = g[t] * share
                        if mixed:
                            total = zero
                            for t in range(n):
                                total += g[t] * value_T[t]
                            dmix_FC[f, c] += total
                    elif split:
                        for t in range(n):
                            grad_T[t] = g[t] / count_T[t] if value_T[t] == best_T[t] else zero
                    else:
                        for t in range(n):
                            grad_T[t] = g[t] if channel_T[t] == c else zero
                    if split:
                        _share_among_ties(x, corner, taps, w_FCK[f, c], n, value_T, grad_T, winner_T, dx, dw_FCKL[f, c])
                    else:
                        _hand_to_first(corner, taps, n, winner_T, grad_T, dx, dw_FCKL[f, c])
