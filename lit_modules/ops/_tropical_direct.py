"""Compiled CPU kernels of the tropical convolution on images as they lie in memory, (B, A, H, W), for small layers.

A padded image is cut into phases: with stride (s, t), pixel (i, j) lies in phase (i mod s, j mod t) at row i div s and
column j div t. There one tap of all windows is one contiguous run, so that inner loops walk over windows and vectorise
for any kernel and dilation. A run goes on through the ends of rows; what it finds there is no window's value and is left
out when rows are copied. A few images at a time are cut, so that their phases stay in the cache.

The forward pass writes down which tap has won, a byte per window, channel and filter, and the backward pass needs no more.
As in `_tropical_numba`, a max is a min of negated operands. The files share nothing, because numba's cache watches one file
for each kernel and would not notice a change in another.

Legend: B batch, A all channels, C channels per group, F filters, H W input, K taps (kernel positions), O P output height
and width, G groups of images cut together, N places of a run, T tile of it, Q phases.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from lit_modules.ops._tropical_blocks import block_copy

TILE = 2048  # windows per inner loop: their values and winners stay in the first-level cache
STEP = 64  # tiles are multiples of it: a vectorised loop does what is left over one by one
SUM, MIN, MAX = 0, 1, 2  # how channels are reduced
NONE = 255  # the winner where another channel has won; taps are numbered from 0 and are fewer
FLAGS = {"reassoc", "nsz"}  # sums may be reordered; NaN and infinity keep their meaning

kernel = numba.njit(cache=True, nogil=True, fastmath=FLAGS, error_model="numpy")
_copy_eight, _copy_four = block_copy(8), block_copy(4)


class Plan(NamedTuple):
    """How images are cut. The phases are an array (phase, A, run), a run (images, rows, pitch) and up to STEP places more."""

    stride_wide: int  # 1 or 2
    filters: int  # in each group of channels
    images: int  # cut together
    rows: int
    pitch: int
    run: int
    channels: int  # of all groups
    image: int  # pixels of a channel, with stride 2 of the even columns
    combed: int  # the same of all images
    skip: int  # from a row of a phase to its next, in combed images
    size: int  # of the phases, and as far again as a tap looks beyond the last
    padded: bool
    taps_K: np.ndarray  # each tap's distance from the window's corner
    blocks_Q4: np.ndarray  # the pixels of each phase: start in the combed image, start in the phases, rows, columns


@kernel
def _copy_rows(source, start, pitch, into, at, into_pitch, rows, wide):
    """Copy rows of `wide` numbers in blocks, the last flush with the row's end: a plain loop is slow on short rows."""
    for r in range(rows):
        i, j = start + r * pitch, at + r * into_pitch
        if wide >= 8:
            for skip in range(0, wide - 8, 8):
                _copy_eight(source, i + skip, into, j + skip)
            _copy_eight(source, i + wide - 8, into, j + wide - 8)
        elif wide >= 4:
            _copy_four(source, i, into, j)
            _copy_four(source, i + wide - 4, into, j + wide - 4)
        else:
            for skip in range(wide):
                into[j + skip] = source[i + skip]


@kernel
def _comb(x_BAHW, stride, sign, combed_2N, back):
    """Write sign * x, with stride 2 its even columns apart from its odd ones; or put x together again."""
    x, odd_rows = x_BAHW.reshape(-1), stride == 2 and x_BAHW.shape[3] % 2
    wide = x_BAHW.shape[3] if odd_rows else x.size  # even rows may go on into each other: one long row
    half, narrow = wide // 2 * (stride - 1), (wide + stride - 1) // stride
    for h in range(x.size // wide):
        row = x[h * wide : (h + 1) * wide]
        even, odd = combed_2N[0, h * narrow : (h + 1) * narrow], combed_2N[1, h * narrow : (h + 1) * narrow]
        if back:
            for j in range(half):
                row[2 * j] = even[j]
                row[2 * j + 1] = odd[j]
            for j in range(half, narrow):  # with stride 1 that is all
                row[half + j] = even[j]
        else:
            for j in range(half):
                even[j] = sign * row[2 * j]
                odd[j] = sign * row[2 * j + 1]
            for j in range(half, narrow):
                even[j] = sign * row[half + j]


@kernel
def _cut(combed_2N, plan, images, phases, back):
    """Copy combed images into the phases, or back."""
    combed = combed_2N.reshape(-1)
    for b in range(images):
        for a in range(plan.channels):
            start, first = (b * plan.channels + a) * plan.image, a * plan.run + b * plan.rows * plan.pitch
            for q in range(plan.blocks_Q4.shape[0]):
                at, place, rows, columns = plan.blocks_Q4[q]
                if back:
                    _copy_rows(phases, first + place, plan.pitch, combed, start + at, plan.skip, rows, columns)
                else:
                    _copy_rows(combed, start + at, plan.skip, phases, first + place, plan.pitch, rows, columns)


@kernel
def _less(a, k, b, q):
    """The smaller of two values, the first among equals, and its number."""
    return (b, q) if b < a else (a, k)


@kernel
def _reduce(phases, start, taps_K, w_K, sign, value_T, winner_T):
    """value[t] = min over the taps of phases[start + tap + t] + sign * w[tap], and the first tap that attains it.

    One tap, and then eight at a time: k * k - 1 is a multiple of eight for every odd k.
    """
    n = value_T.size
    s0, w0 = start + taps_K[0], sign * w_K[0]
    x0 = phases[s0 : s0 + n]
    for t in range(n):
        value_T[t] = x0[t] + w0
        winner_T[t] = 0
    k = 1
    while k + 7 < taps_K.size:
        k0, k1, k2, k3 = np.uint8(k), np.uint8(k + 1), np.uint8(k + 2), np.uint8(k + 3)
        k4, k5, k6, k7 = np.uint8(k + 4), np.uint8(k + 5), np.uint8(k + 6), np.uint8(k + 7)
        w0, w1, w2, w3 = sign * w_K[k], sign * w_K[k + 1], sign * w_K[k + 2], sign * w_K[k + 3]
        w4, w5, w6, w7 = sign * w_K[k + 4], sign * w_K[k + 5], sign * w_K[k + 6], sign * w_K[k + 7]
        s0, s1, s2, s3 = start + taps_K[k], start + taps_K[k + 1], start + taps_K[k + 2], start + taps_K[k + 3]
        s4, s5, s6, s7 = start + taps_K[k + 4], start + taps_K[k + 5], start + taps_K[k + 6], start + taps_K[k + 7]
        x0, x1, x2, x3 = phases[s0 : s0 + n], phases[s1 : s1 + n], phases[s2 : s2 + n], phases[s3 : s3 + n]
        x4, x5, x6, x7 = phases[s4 : s4 + n], phases[s5 : s5 + n], phases[s6 : s6 + n], phases[s7 : s7 + n]
        for t in range(n):
            a, b = _less(value_T[t], winner_T[t], x0[t] + w0, k0)
            a, b = _less(a, b, x1[t] + w1, k1)
            a, b = _less(a, b, x2[t] + w2, k2)
            a, b = _less(a, b, x3[t] + w3, k3)
            a, b = _less(a, b, x4[t] + w4, k4)
            a, b = _less(a, b, x5[t] + w5, k5)
            a, b = _less(a, b, x6[t] + w6, k6)
            value_T[t], winner_T[t] = _less(a, b, x7[t] + w7, k7)
        k += 8
    while k < taps_K.size:
        s0, w0, k0 = start + taps_K[k], sign * w_K[k], np.uint8(k)
        x0 = phases[s0 : s0 + n]
        for t in range(n):
            value_T[t], winner_T[t] = _less(value_T[t], winner_T[t], x0[t] + w0, k0)
        k += 1


@kernel
def _reduce_tile(phases, w_FCK, plan, sign, outer, low, y_FN, winners_FCN, value_T, channel_T):
    """Fill y and winners from `low` on, as far as value_T is long."""
    (filters, channels, _), n = w_FCK.shape, value_T.size
    for f in range(filters):
        y_T = y_FN[f, low : low + n]
        channel_T[:] = 0  # which channel has won a min or max
        for c in range(channels):
            start = (f // plan.filters * channels + c) * plan.run + low
            winner_T = winners_FCN[f, c, low : low + n]
            _reduce(phases, start, plan.taps_K, w_FCK[f, c], sign, value_T if c else y_T, winner_T)
            if c and outer == SUM:
                for t in range(n):
                    y_T[t] += value_T[t]
            elif c:
                for t in range(n):
                    better = value_T[t] < y_T[t] if outer == MIN else value_T[t] > y_T[t]
                    y_T[t] = value_T[t] if better else y_T[t]
                    channel_T[t] = c if better else channel_T[t]
        if outer != SUM:
            for c in range(channels):
                winner_T = winners_FCN[f, c, low : low + n]
                for t in range(n):
                    winner_T[t] = winner_T[t] if channel_T[t] == c else NONE
        if sign < 0:
            for t in range(n):
                y_T[t] = -y_T[t]


@kernel
def _length(plan, images, high, wide):
    """How far in a run the windows of some images reach, in whole steps."""
    places = ((images - 1) * plan.rows + high - 1) * plan.pitch + wide
    return (places + STEP - 1) // STEP * STEP


@kernel
def forward(x_BAHW, w_FCKL, plan, padding, sign, outer, y_BFOP, winners_GFCN):
    """Fill y with sign * the reduction of sign * (x + w), and the winners unless G is 0.

    Returns the sum of all operands, which is NaN if one of them is, or if infinities of both signs meet.
    """
    batch, filters, high, wide = y_BFOP.shape
    number, channels = x_BAHW.dtype.type, w_FCKL.shape[1]
    sign, padding = number(sign), number(padding)
    w_FCK = w_FCKL.reshape(filters, channels, plan.taps_K.size)
    phases, combed_2N = np.full(plan.size, sign * padding), np.empty((2, plan.combed), x_BAHW.dtype)
    y_FN, value_T = np.empty((filters, plan.run), x_BAHW.dtype), np.empty(TILE, x_BAHW.dtype)
    channel_T = np.empty(TILE, np.int32)
    scratch_GFCN = winners_GFCN if winners_GFCN.size else np.empty((1, filters, channels, plan.run), np.uint8)
    total, x = w_FCK.sum() + padding if plan.padded else w_FCK.sum(), x_BAHW.reshape(-1)
    for i in range(x.size):
        total += x[i]
    for first in range(0, batch, plan.images):
        images = min(plan.images, batch - first)
        _comb(x_BAHW[first : first + images], plan.stride_wide, sign, combed_2N, False)
        _cut(combed_2N, plan, images, phases, False)
        winners_FCN = scratch_GFCN[first // plan.images % scratch_GFCN.shape[0]]
        end = _length(plan, images, high, wide)
        for low in range(0, end, TILE):
            n = min(TILE, end - low)
            _reduce_tile(phases, w_FCK, plan, sign, outer, low, y_FN, winners_FCN, value_T[:n], channel_T[:n])
        for i in range(images):
            y_FOP, at = y_BFOP[first + i].reshape(-1), i * plan.rows * plan.pitch
            for f in range(filters):
                _copy_rows(y_FN[f], at, plan.pitch, y_FOP, f * high * wide, wide, high, wide)
    return total


@kernel
def _hand_out(g_T, winner_T, dw_K):
    """Add to dw[k] the gradients of the windows that tap k has won: three taps for each pass. dw has room for two more."""
    zero = g_T.dtype.type(0)
    for low in range(0, dw_K.size - 2, 3):
        k0, k1, k2 = np.uint8(low), np.uint8(low + 1), np.uint8(low + 2)
        d0 = d1 = d2 = zero
        for t in range(g_T.size):
            g, k = g_T[t], winner_T[t]
            d0 += g if k == k0 else zero
            d1 += g if k == k1 else zero
            d2 += g if k == k2 else zero
        dw_K[low] += d0
        dw_K[low + 1] += d1
        dw_K[low + 2] += d2


@kernel
def _hand_back(g_T, h_T, winner_T, other_T, taps_K, start, dphases, dw_K, dv_K):
    """The same for two filters, with gradients g and h, and add both to the pixels that the tap has seen."""
    n, zero = g_T.size, g_T.dtype.type(0)
    for k in range(taps_K.size):
        tap, dw, dv = np.uint8(k), zero, zero
        into = dphases[start + taps_K[k] : start + taps_K[k] + n]
        for t in range(n):
            part = g_T[t] if winner_T[t] == tap else zero
            beside = h_T[t] if other_T[t] == tap else zero
            into[t] += part + beside
            dw += part
            dv += beside
        dw_K[k] += dw
        dv_K[k] += dv


@kernel
def _hand_tile(g_FN, winners_FCN, plan, low, high, dphases, dw_FCK):
    """Do one or the other from `low` to `high`; two filters of one group, the last perhaps beside nothing."""
    filters, channels, _ = winners_FCN.shape
    nothing_T = np.zeros(high - low, g_FN.dtype)
    for f in range(filters):
        g_T, group = g_FN[f, low:high], f // plan.filters
        e = min(f + 1, (group + 1) * plan.filters - 1)
        h_T = g_FN[e, low:high] if e > f else nothing_T
        for c in range(channels):
            winner_T, other_T = winners_FCN[f, c, low:high], winners_FCN[e, c, low:high]
            start = (group * channels + c) * plan.run + low
            if not dphases.size:
                _hand_out(g_T, winner_T, dw_FCK[f, c])
            elif f % plan.filters % 2 == 0:
                _hand_back(g_T, h_T, winner_T, other_T, plan.taps_K, start, dphases, dw_FCK[f, c], dw_FCK[e, c])


@kernel
def backward(g_BFOP, winners_GFCN, plan, dx_BAHW, dw_FCKL):
    """Fill dx, unless its B is 0, and dw with the gradients of sum(g * y)."""
    batch, filters, high, wide = g_BFOP.shape
    channels, taps, one = dw_FCKL.shape[1], plan.taps_K.size, g_BFOP.dtype.type(1)
    dphases = np.empty(plan.size if dx_BAHW.size else 0, g_BFOP.dtype)
    combed_2N = np.empty((2, plan.combed), g_BFOP.dtype)
    dw_FCK = np.zeros((filters, channels, taps + 2))
    g_FN = np.zeros((filters, plan.run), g_BFOP.dtype)  # where there is no window it stays 0
    for first in range(0, batch, plan.images):
        images = min(plan.images, batch - first)
        if images < plan.images:  # the last ones: nothing may stay of those before
            g_FN[:] = 0
        for i in range(images):
            g_FOP, at = g_BFOP[first + i].reshape(-1), i * plan.rows * plan.pitch
            for f in range(filters):
                _copy_rows(g_FOP, f * high * wide, wide, g_FN[f], at, plan.pitch, high, wide)
        dphases[:] = 0
        end = _length(plan, images, high, wide)
        for low in range(0, end, TILE):
            _hand_tile(g_FN, winners_GFCN[first // plan.images], plan, low, min(low + TILE, end), dphases, dw_FCK)
        if dx_BAHW.size:
            _cut(combed_2N, plan, images, dphases, True)
            _comb(dx_BAHW[first : first + images], plan.stride_wide, one, combed_2N, True)
    dw_FCKL.reshape(filters, channels, taps)[:] = dw_FCK[:, :, :taps]
