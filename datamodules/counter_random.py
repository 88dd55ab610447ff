"""Random numbers that are a pure function of (key, stream, position): no state, no order, no global generator.

A key stands for one image in one epoch, see `key_of`; each use of the key takes a `Stream` of its own. So an image's
numbers do not depend on the batch it is in, on workers, or on what was drawn before, and a run that resumes draws what an
uninterrupted one would have.

Bits: words, `uniform`, `normal`, `unit_vector` and `square_root` are integer arithmetic and single IEEE additions,
multiplications and divisions, each rounded once, in an order written down here. Library logarithms, cosines and even square
roots (a hundredth of torch's on CPU are off by a bit) differ between devices, and perhaps between the body and the tail of a
vector loop, so none is trusted. Two rules keep it so: no fused operation (addcmul, lerp, alpha=), and no division by a
Python number, which CUDA turns into a multiplication by its reciprocal.

Legend: B keys, N numbers per key.
"""

from __future__ import annotations

import hashlib
import math
import operator
from enum import IntEnum

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
CHUNK = (
    1 << 15
)  # numbers in work at a time on CPU: a quarter of a megabyte per tensor stays in cache, three times as fast
LOG_TERMS = 10  # f ** 2 <= 0.0295, so the first term left out is below 2 ** -54 of the sum
TURN_TERMS = 9  # |x| <= pi / 4, likewise
SUMMED_BELOW = 10.0  # Poisson means whose distribution is summed up; the sum ends at 60, beyond any 32-bit draw


class Stream(IntEnum):
    """What the numbers of a key are for. Two uses of one stream would get the same numbers."""

    GENERAL = 0
    MOTION = 1
    SHAKE = 2
    CAMERA = 3
    NOISE = 4
    PHOTONS = 5
    AUGMENTATION = 6


def key_of(seed: int, split: str, index: Tensor | int, epoch: int = 0) -> Tensor:
    """Return the keys of images, int64 (B,), on the device of `index`; all 64 bits are in use, so half are negative.

    Args:
        seed: any integer.
        split: any name; "train" and "test" share no numbers.
        index: which images, an integer or an integer tensor, flattened.
        epoch: any 64-bit integer; 0 for data that stays the same.
    Raises:
        TypeError: seed or epoch is not an integer, or index is a floating tensor.
    """
    index_B = torch.as_tensor(index).reshape(-1)
    if index_B.is_floating_point() or index_B.is_complex():
        raise TypeError(f"index must hold integers, got {index_B.dtype}; use index.long()")
    root = hashlib.sha256(f"{operator.index(seed)}|{split}".encode()).digest()
    key = (int.from_bytes(root[at : at + 4], "little") for at in (0, 4))
    index_B, epoch_B = index_B.long(), torch.full_like(index_B, operator.index(epoch), dtype=torch.int64)
    counter = (index_B & LOW, index_B >> 32 & LOW, epoch_B & LOW, epoch_B >> 32 & LOW)
    low_B, high_B, _, _ = philox(counter, tuple(torch.full_like(index_B, word) for word in key))
    return high_B << 32 | low_B


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox-4x32-10 at a counter of four words under a key of two.

    Words are int64 holding [0, 2 ** 32); all four of the counter are of the result's shape, the key broadcasts to it. A
    product of two words wraps round in int64, whose 64 bits are still the right ones.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), 3.3; constants of Random123.
    """
    (a, b, c, d), (key_a, key_b) = counter, key
    for _ in range(ROUNDS):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a = (right >> 32).bitwise_xor_(b).bitwise_xor_(key_a).bitwise_and_(LOW)
        c = (left >> 32).bitwise_xor_(d).bitwise_xor_(key_b).bitwise_and_(LOW)
        b, d = right.bitwise_and_(LOW), left.bitwise_and_(LOW)
        key_a, key_b = (key_a + WEYL[0]) & LOW, (key_b + WEYL[1]) & LOW
    return a, b, c, d


def words(keys_B: Tensor, count: int, stream: int = Stream.GENERAL) -> Tensor:
    """Return the first `count` random words of each key's stream, int64 (B, N) in [0, 2 ** 32).

    Word n is the same whatever `count`. Words 4i to 4i + 3 are Philox at counter (i, stream, 0, 0).

    Raises:
        TypeError: keys that are not int64 (B,).
        ValueError: a count below 0, or a stream or a count that has no counter.
    """
    if keys_B.dtype != torch.int64 or keys_B.ndim != 1:
        raise TypeError(f"keys must be int64 (B,), as key_of returns, got {keys_B.dtype} {tuple(keys_B.shape)}")
    if not 0 <= count <= 2**34 or not 0 <= stream <= LOW:
        raise ValueError(f"count must lie in [0, 2 ** 34] and stream in [0, 2 ** 32), got {count} and {int(stream)}")
    key = (keys_B[:, None] & LOW, keys_B[:, None] >> 32 & LOW)
    blocks, B = -(-count // 4), len(keys_B)
    step = max(1, CHUNK // max(1, B)) if keys_B.device.type == "cpu" else max(1, blocks)
    out = keys_B.new_empty(B, blocks, 4)
    for start in range(0, blocks, step):
        block = torch.arange(start, min(blocks, start + step), device=keys_B.device).expand(B, -1)
        zeros = torch.zeros_like(block)
        counter = (block, torch.full_like(block, int(stream)), zeros, zeros)
        torch.stack(philox(counter, key), -1, out=out[:, start : start + step])
    return out.flatten(1)[:, :count]


def uniform(keys_B: Tensor, count: int, stream: int = Stream.GENERAL, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers uniform on [0, 1), (B, N): multiples of 2 ** -24 in float32, of 2 ** -53 in float64, never 1.

    Number n is made of word n in float32, of words 2n and 2n + 1 in float64.

    Raises:
        TypeError: another dtype, or see `words`.
        ValueError: see `words`.
    """
    if dtype == torch.float32:
        return (words(keys_B, count, stream) >> 8).to(dtype) * 2.0**-24
    if dtype != torch.float64:
        raise TypeError(f"uniform numbers are float32 or float64, got {dtype}; convert the float32 ones")
    pairs = words(keys_B, 2 * count, stream).unflatten(1, (count, 2))
    return ((pairs[..., 0] >> 5 << 26) | (pairs[..., 1] >> 6)).to(dtype) * 2.0**-53


def normal(keys_B: Tensor, count: int, stream: int = Stream.GENERAL, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers of N(0, 1), (B, N), by Box and Muller's transform in float64: numbers 2i and 2i + 1 of words 2i, 2i + 1.

    At most 6.77 in magnitude, as a word has 32 bits; `dtype` is what they are rounded to, any floating one.

    Raises:
        TypeError, ValueError: see `words`.
    """
    pairs = words(keys_B, count + count % 2, stream).unflatten(1, (-1, 2))
    return normal_pairs(pairs[..., 0], pairs[..., 1]).flatten(1)[:, :count].to(dtype)


def normal_pairs(radius: Tensor, angle: Tensor) -> Tensor:
    """Return two independent N(0, 1) per pair of words of equal shapes, float64 (..., 2)."""
    size = CHUNK if radius.device.type == "cpu" else max(1, radius.numel())
    pieces = zip(radius.reshape(-1).split(size), angle.reshape(-1).split(size), strict=True)
    return torch.cat([_box_muller(*piece) for piece in pieces]).view(*radius.shape, 2)


def _box_muller(radius: Tensor, angle: Tensor) -> Tensor:
    squared = _log((radius.double() + 0.5) * 2.0**-32) * -2.0  # never the logarithm of 0 or 1
    return square_root(squared)[..., None] * unit_vector(angle.double() * 2.0**-32)


def unit_vector(turns: Tensor) -> Tensor:
    """Return (cos, sin) of 2 pi times float64 `turns`, (..., 2): to 1e-15, and the same bits everywhere."""
    quarters = (turns * 4.0).round()
    x = (turns - quarters * 0.25) * math.tau
    square = x * x
    cos = torch.ones_like(x)
    sin = torch.ones_like(x)
    for k in range(TURN_TERMS, 0, -1):
        cos = 1.0 - square * (1.0 / ((2 * k - 1) * (2 * k))) * cos
        sin = 1.0 - square * (1.0 / ((2 * k) * (2 * k + 1))) * sin
    sin = sin * x
    quadrant = quarters.long() & 3
    odd = (quadrant & 1).bool()
    first, second = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    first = torch.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = torch.where(quadrant >= 2, -second, second)
    return torch.stack((first, second), -1)


def square_root(x: Tensor) -> Tensor:
    """Return the correctly rounded square roots of float64 numbers above 0 (neither subnormal nor huge).

    The residual x - s ** 2 of the library's root s is exact when s is split into halves of 26 bits, so one step of Newton's
    method from any s within a few bits rounds to the same number.
    """
    s = x.sqrt()
    high = (s.view(torch.int64) & -(1 << 27)).view(torch.float64)
    low = s - high
    residual = x - high * high - high * low * 2.0 - low * low
    return s + residual / (s * 2.0)


def poisson(keys_B: Tensor, mean_BN: Tensor, stream: int = Stream.GENERAL) -> Tensor:
    """Return Poisson counts of the given means, float64 (B, N), without a gradient.

    Each is the quantile of its mean at one uniform number, so counts never fall where a mean rises. Means below 10 by
    summing the distribution; others by its expansion for large means, whose distribution function is within 4e-4 of the
    true one. Roots and exponentials are the library's: once in some 1e9 counts another device may differ by one.

    Raises:
        ValueError: means that are negative or not finite.
    Source: Giles, Algorithm 955 (ACM TOMS 42, 2016), approximation Q_N1.
    """
    mean_BN = mean_BN.detach().double()
    if not bool(((mean_BN >= 0) & mean_BN.isfinite()).all()):
        raise ValueError(f"Poisson means must be finite and at least 0, got {mean_BN.min():g} to {mean_BN.max():g}")
    z_BN = normal(keys_B, mean_BN.shape[1], stream, torch.float64)
    root_BN = mean_BN.clamp_min(SUMMED_BELOW).sqrt()
    tail_BN = (z_BN * 2 + z_BN * z_BN * z_BN) * (1 / 72)
    counts_BN = (mean_BN + root_BN * z_BN + (z_BN * z_BN + 2) * (1 / 6) - tail_BN / root_BN).floor()
    small_BN = mean_BN < SUMMED_BELOW
    counts_BN[small_BN] = _summed_quantile(mean_BN[small_BN], torch.special.ndtr(z_BN[small_BN]))
    return counts_BN


def _summed_quantile(mean: Tensor, u: Tensor) -> Tensor:
    term = (-mean).exp()
    total, count = term.clone(), torch.zeros_like(mean)
    for k in range(1, 61):
        above = u > total
        if not bool(above.any()):
            break
        count += above
        term = term * mean * (1.0 / k)
        total += term
    return count


def _log(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive float64 numbers, to 1e-15 of it or of 1."""
    mantissa, exponent = torch.frexp(x)
    below = mantissa < math.sqrt(0.5)
    mantissa = torch.where(below, mantissa * 2.0, mantissa)
    exponent = exponent.double() - below.double()
    f = (mantissa - 1.0) / (mantissa + 1.0)
    square = f * f
    series = torch.zeros_like(f)
    for k in range(LOG_TERMS, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return exponent * math.log(2.0) + f * series * 2.0
