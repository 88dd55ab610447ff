"""Compiled CPU kernels of the tropical convolution: LLVM through numba, so no compiler is needed where they run.

Only the inner reduction by min is written; a max is a min of the negated operands (duality). The batch is the innermost
axis: every inner loop runs over contiguous images, which vectorises for any stride, dilation or kernel size. Patches are
never written out; the backward pass finds the winners again instead of having stored them.

Legend: B batch, C channels per group, F filters, H W padded input, O P output height and width, K L kernel, G groups.
"""

from __future__ import annotations

import numba
import numpy as np

TILE = 256  # images per inner loop: long enough to hide its start-up, short enough for the first-level cache
SUM, MIN, MAX = 0, 1, 2  # how channels are reduced
FLAGS = {"reassoc", "nsz"}  # sums may be reordered; NaN and infinity keep their meaning


@numba.njit(cache=True, nogil=True, fastmath=FLAGS, inline="always")
def _inner(x_CHWB, w_KL, c, y, x, dy, dx, low, high, value_T):
    """value[t] = min over the kernel of x + w, for images low..high of channel c at the window that starts at (y, x)."""
    n = high - low
    for k in range(w_KL.shape[0]):
        for q in range(w_KL.shape[1]):
            weight = w_KL[k, q]
            row = x_CHWB[c, y + k * dy, x + q * dx, low:high]
            if k == 0 and q == 0:
                for t in range(n):
                    value_T[t] = row[t] + weight
            else:
                for t in range(n):
                    candidate = row[t] + weight
                    best = value_T[t]
                    value_T[t] = candidate if candidate < best else best


@numba.njit(cache=True, nogil=True, fastmath=FLAGS)
def forward(x_CHWB, w_FCKL, mix_FC, y_FOPB, outer, sy, sx, dy, dx):
    """Fill y: per channel the min over the kernel of x + w, then over channels the (weighted) sum, min or max."""
    filters, channels = w_FCKL.shape[0], w_FCKL.shape[1]
    batch = x_CHWB.shape[3]
    per_group = filters // (x_CHWB.shape[0] // channels)
    mixed = mix_FC.shape[0] > 0
    value_T = np.empty(TILE, x_CHWB.dtype)
    for low in range(0, batch, TILE):
        high = min(batch, low + TILE)
        n = high - low
        for f in range(filters):
            base = (f // per_group) * channels
            for o in range(y_FOPB.shape[1]):
                for p in range(y_FOPB.shape[2]):
                    out = y_FOPB[f, o, p, low:high]
                    for c in range(channels):
                        _inner(x_CHWB, w_FCKL[f, c], base + c, o * sy, p * sx, dy, dx, low, high, value_T)
                        if mixed:
                            share = mix_FC[f, c]
                            for t in range(n):
                                value_T[t] *= share
                        if c == 0:
                            for t in range(n):
                                out[t] = value_T[t]
                        elif outer == SUM:
                            for t in range(n):
                                out[t] += value_T[t]
                        elif outer == MIN:
                            for t in range(n):
                                out[t] = value_T[t] if value_T[t] < out[t] else out[t]
                        else:
                            for t in range(n):
                                out[t] = value_T[t] if value_T[t] > out[t] else out[t]


@numba.njit(cache=True, nogil=True, fastmath=FLAGS, inline="always")
def _channel_shares(x_CHWB, w_CKL, base, y, x, dy, dx, low, high, outer, split, value_T, best_T, winner_T, count_T):
    """For an outer min or max: the best channel value of each image, its first channel, and how many channels tie."""
    n = high - low
    for c in range(w_CKL.shape[0]):
        _inner(x_CHWB, w_CKL[c], base + c, y, x, dy, dx, low, high, value_T)
        for t in range(n):
            value = value_T[t]
            if c == 0:
                best_T[t] = value
                winner_T[t] = 0
                count_T[t] = 1
            else:
                better = value < best_T[t] if outer == MIN else value > best_T[t]
                tied = value == best_T[t]
                best_T[t] = value if better else best_T[t]
                winner_T[t] = c if better else winner_T[t]
                count_T[t] = 1 if better else (count_T[t] + 1 if tied else count_T[t])


@numba.njit(cache=True, nogil=True, fastmath=FLAGS, inline="always")
def _scatter(x_CHWB, w_KL, c, y, x, dy, dx, low, high, value_T, grad_T, ties_T, open_T, split, dx_CHWB, dw_KL):
    """Hand grad[t] to the winner inside the kernel: the first one, or shared evenly by all that tie."""
    n = high - low
    for t in range(n):
        ties_T[t] = 0
        open_T[t] = 1
    if split:
        for k in range(w_KL.shape[0]):
            for q in range(w_KL.shape[1]):
                weight = w_KL[k, q]
                row = x_CHWB[c, y + k * dy, x + q * dx, low:high]
                for t in range(n):
                    ties_T[t] += 1 if row[t] + weight == value_T[t] else 0
        for t in range(n):
            grad_T[t] /= ties_T[t]
    for k in range(w_KL.shape[0]):
        for q in range(w_KL.shape[1]):
            weight = w_KL[k, q]
            row = x_CHWB[c, y + k * dy, x + q * dx, low:high]
            into = dx_CHWB[c, y + k * dy, x + q * dx, low:high]
            total = grad_T.dtype.type(0)
            for t in range(n):
                wins = (row[t] + weight == value_T[t]) & (open_T[t] == 1)
                part = grad_T[t] if wins else grad_T.dtype.type(0)
                if not split:
                    open_T[t] = 0 if wins else open_T[t]
                into[t] += part
                total += part
            dw_KL[k, q] += total


@numba.njit(cache=True, nogil=True, fastmath=FLAGS)
def backward(x_CHWB, w_FCKL, mix_FC, g_FOPB, outer, split, sy, sx, dy, dx, dx_CHWB, dw_FCKL, dmix_FC):
    """Add to dx, dw and dmix the gradients of sum(g * y). dw and dmix are float64, whatever the operands are."""
    filters, channels = w_FCKL.shape[0], w_FCKL.shape[1]
    batch = x_CHWB.shape[3]
    per_group = filters // (x_CHWB.shape[0] // channels)
    mixed = mix_FC.shape[0] > 0
    value_T, best_T, grad_T = (np.empty(TILE, x_CHWB.dtype), np.empty(TILE, x_CHWB.dtype), np.empty(TILE, x_CHWB.dtype))
    winner_T, count_T = np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    ties_T, open_T = np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    for low in range(0, batch, TILE):
        high = min(batch, low + TILE)
        n = high - low
        for f in range(filters):
            base = (f // per_group) * channels
            for o in range(g_FOPB.shape[1]):
                for p in range(g_FOPB.shape[2]):
                    g = g_FOPB[f, o, p, low:high]
                    y, x = o * sy, p * sx
                    if outer != SUM:
                        _channel_shares(
                            x_CHWB,
                            w_FCKL[f],
                            base,
                            y,
                            x,
                            dy,
                            dx,
                            low,
                            high,
                            outer,
                            split,
                            value_T,
                            best_T,
                            winner_T,
                            count_T,
                        )
                    for c in range(channels):
                        _inner(x_CHWB, w_FCKL[f, c], base + c, y, x, dy, dx, low, high, value_T)
                        if outer == SUM:
                            share = mix_FC[f, c] if mixed else mix_FC.dtype.type(1)
                            total = mix_FC.dtype.type(0)
                            for t in range(n):
                                grad_T[t] = g[t] * share
                            if mixed:
                                for t in range(n):
                                    total += g[t] * value_T[t]
                                dmix_FC[f, c] += total
                        elif split:
                            for t in range(n):
                                grad_T[t] = g[t] / count_T[t] if value_T[t] == best_T[t] else g.dtype.type(0)
                        else:
                            for t in range(n):
                                grad_T[t] = g[t] if winner_T[t] == c else g.dtype.type(0)
                        _scatter(
                            x_CHWB, w_FCKL[f, c], base + c, y, x, dy, dx, low, high,
                            value_T, grad_T, ties_T, open_T, split, dx_CHWB, dw_FCKL[f, c],
                        )  # fmt: skip
