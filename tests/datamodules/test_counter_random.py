"""Counter-based random numbers: the published function, the same bits everywhere, and the right distributions.

Legend: B keys, N numbers per key.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from datamodules.counter_random import (
    Stream,
    key_of,
    normal,
    normal_pairs,
    philox,
    poisson,
    square_root,
    uniform,
    unit_vector,
    words,
)

WORD = st.integers(0, 2**32 - 1)
WIDTH_32 = (32, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
WIDTH_64 = (64, (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B))


def _reference(counter, key, width=WIDTH_32) -> list[int]:
    """Philox-4 with 10 rounds at either word size, in Python's integers."""
    bits, (m0, m1), (w0, w1) = width
    mask = (1 << bits) - 1
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * m0, c[2] * m1
        c = [(p1 >> bits) ^ c[1] ^ k0, p1 & mask, (p0 >> bits) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return c


def _words_of(key: int, n: int, stream: int) -> int:
    return _reference((n // 4, stream, 0, 0), (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF))[n % 4]


def _keys(count: int, seed: int = 0) -> Tensor:
    return key_of(seed, "test", torch.arange(count))


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, output: str) -> None:
    as_words = lambda text: tuple(torch.tensor([int(word, 16)]) for word in text.split())  # noqa: E731
    assert [int(word) for word in philox(as_words(counter), as_words(key))] == [int(w, 16) for w in output.split()]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_the_reference_below_is_numpys_philox_at_64_bits(numbers: list[int]) -> None:
    counter, key = numbers[:4], numbers[4:]
    stepped = sum(word << 64 * i for i, word in enumerate(counter)) + 1 & (1 << 256) - 1  # numpy steps, then draws
    expected = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)).random_raw(4)
    assert _reference([stepped >> 64 * i & (1 << 64) - 1 for i in range(4)], key, WIDTH_64) == expected.tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[WORD] * 6), min_size=1, max_size=40))
def test_philox_is_the_reference_at_32_bits(rows: list[tuple[int, ...]]) -> None:
    columns = torch.tensor(rows).T
    found = torch.stack(philox(tuple(columns[:4]), tuple(columns[4:])), 1)
    assert found.tolist() == [_reference(row[:4], row[4:]) for row in rows]


@settings(max_examples=30, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 300), WORD)
def test_a_word_depends_on_key_stream_and_position_only(key: int, count: int, stream: int) -> None:
    keys_B = torch.tensor([5, key, -7])
    found = words(keys_B, count, stream)
    assert found.shape == (3, count)
    assert found[1].tolist() == [_words_of(key, n, stream) for n in range(count)]
    assert torch.equal(words(keys_B[[1]], count + 3, stream)[:, :count], found[[1]])


def test_chunks_change_nothing() -> None:
    keys_B, count = _keys(3), 200_001
    whole = words(keys_B, count)
    for at in (0, 43_689, 43_692, 131_071, 131_072, count - 1):
        assert whole[2, at] == _words_of(int(keys_B[2]), at, 0)
    numbers = normal(keys_B, count, dtype=torch.float64)
    assert torch.equal(numbers[1:2, :77], normal(keys_B[1:2], 77, dtype=torch.float64))


@pytest.mark.parametrize("index", [0, 7, 2**40 + 3, -1])
@pytest.mark.parametrize("epoch", [0, 5, 2**33])
def test_keys_are_the_hash_they_are_said_to_be(index: int, epoch: int) -> None:
    root = hashlib.sha256(b"-3|val").digest()
    parts = [int.from_bytes(root[at : at + 4], "little") for at in (0, 4)]
    low = lambda x: (x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF)  # noqa: E731
    expected = _reference((*low(index), *low(epoch)), parts)
    key = int(key_of(-3, "val", index, epoch)) & (1 << 64) - 1
    assert (key & 0xFFFFFFFF, key >> 32) == (expected[0], expected[1])


def test_other_seeds_splits_indices_and_epochs_have_other_keys() -> None:
    index = torch.arange(5000)
    keys = [key_of(s, split, index, e) for s in (0, 1, 10) for split in ("train", "test") for e in (0, 1, 2)]
    assert len(torch.cat(keys).unique()) == 18 * 5000
    assert torch.equal(key_of(1, "train", index)[[4, 2]], key_of(1, "train", torch.tensor([4, 2])))
    assert key_of(1, "train", index.int()).dtype == torch.int64


def test_uniform_numbers_are_the_words_scaled() -> None:
    keys_B = _keys(4)
    w = words(keys_B, 20, Stream.NOISE).double()
    assert torch.equal(uniform(keys_B, 20, Stream.NOISE).double(), (w / 256).floor() / 2**24)
    exact = ((w[:, 0::2] / 32).floor() * 2**26 + (w[:, 1::2] / 64).floor()) / 2**53
    assert torch.equal(uniform(keys_B, 10, Stream.NOISE, torch.float64), exact)


def test_distributions() -> None:
    keys_B, N = _keys(200), 1000
    for dtype in (torch.float32, torch.float64):
        u = uniform(keys_B, N, dtype=dtype)
        assert u.dtype == dtype
        assert ((u >= 0) & (u < 1)).all()
        assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.01
        z = normal(keys_B, N, dtype=dtype)
        assert z.dtype == dtype
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / z.numel())


def test_neighbours_are_uncorrelated() -> None:
    """Between pairs, positions, indices, epochs, splits and streams; 200 000 samples each, five standard errors."""
    N, index = 1000, torch.arange(200)
    z = normal(key_of(0, "train", index), N, dtype=torch.float64)
    others = [
        z.roll(1, 1),
        z.roll(1, 0),
        normal(key_of(0, "train", index, 1), N, dtype=torch.float64),
        normal(key_of(0, "test", index), N, dtype=torch.float64),
        normal(key_of(1, "train", index), N, dtype=torch.float64),
        normal(key_of(0, "train", index), N, 1, torch.float64),
    ]
    for other in others:
        assert abs(float((z * other).mean())) < 5 / math.sqrt(z.numel())
        assert abs(float(((z * z - 1) * (other * other - 1)).mean())) < 5 * 2 / math.sqrt(z.numel())


def _pairs_in_python(radius: int, angle: int) -> tuple[float, float]:
    """The same roundings in Python's floats, one at a time: only +, -, *, /, frexp and sqrt, all exact or IEEE."""
    mantissa, exponent = math.frexp((radius + 0.5) * 2.0**-32)
    if mantissa < math.sqrt(0.5):
        mantissa, exponent = mantissa * 2.0, exponent - 1
    f = (mantissa - 1.0) / (mantissa + 1.0)
    series = 0.0
    for k in range(10, -1, -1):
        series = series * (f * f) + 1.0 / (2 * k + 1)
    length = math.sqrt((exponent * math.log(2.0) + f * series * 2.0) * -2.0)
    turns = angle * 2.0**-32
    quarters = round(turns * 4.0)
    x = (turns - quarters * 0.25) * math.tau
    cos = sin = 1.0
    for k in range(9, 0, -1):
        cos = 1.0 - x * x * (1.0 / ((2 * k - 1) * (2 * k))) * cos
        sin = 1.0 - x * x * (1.0 / ((2 * k) * (2 * k + 1))) * sin
    sin *= x
    cos, sin = [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)][quarters % 4]
    return length * cos, length * sin


def test_normal_numbers_have_the_bits_of_ieee_arithmetic() -> None:
    """So nothing was fused or taken from a library, neither in vectors nor in their tails."""
    edges = torch.tensor([0, 1, 2**29, 2**30 - 1, 2**31, 2**32 - 1])
    drawn = words(_keys(2), 1001, 3)
    radius, angle = (torch.cat((part, edges)) for part in (drawn[0], drawn[1]))
    each = [_pairs_in_python(r, a) for r, a in zip(radius.tolist(), angle.tolist(), strict=True)]
    assert torch.equal(normal_pairs(radius, angle), torch.tensor(each, dtype=torch.float64))


def test_normal_numbers_are_box_and_mullers() -> None:
    w = words(_keys(50), 100, 2).double()
    length, turn = (-2 * ((w[:, 0::2] + 0.5) / 2**32).log()).sqrt(), w[:, 1::2] / 2**32 * math.tau
    expected = torch.stack((length * turn.cos(), length * turn.sin()), -1).flatten(1)
    found = normal(_keys(50), 100, 2, torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert torch.equal(normal(_keys(50), 99, 2), found[:, :99].float())
    assert torch.equal(normal(_keys(50), 99, 2, torch.bfloat16), found[:, :99].bfloat16())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-280, 1e280), min_size=1, max_size=50))
def test_square_roots_are_correctly_rounded(numbers: list[float]) -> None:
    drawn = uniform(_keys(1), 20_000, 7, torch.float64)[0] + 1e-9
    x = torch.cat((torch.tensor(numbers, dtype=torch.float64), drawn, drawn * 7))
    assert square_root(x).tolist() == [math.sqrt(value) for value in x.tolist()]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20))
def test_unit_vectors(turns: list[float]) -> None:
    t = torch.tensor(turns, dtype=torch.float64)
    expected = torch.stack(((t % 1 * math.tau).cos(), (t % 1 * math.tau).sin()), -1)
    torch.testing.assert_close(unit_vector(t), expected, rtol=0, atol=1e-13)


def test_quarter_turns_are_exact() -> None:
    found = unit_vector(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, -0.25], dtype=torch.float64))
    assert found.tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1], [1, 0], [0, -1]]


@pytest.mark.parametrize("mean", [0.0, 0.05, 1.0, 6.5, 9.99])
def test_small_poisson_counts_are_the_exact_quantiles(mean: float) -> None:
    keys_B, N = _keys(20), 500
    share = stats.norm.cdf(normal(keys_B, N, 9, torch.float64).numpy())
    found = poisson(keys_B, torch.full((20, N), mean), 9)
    expected = stats.poisson.ppf(share, float(np.float32(mean)))
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("mean", [10.0, 37.5, 300.0, 1e5])
def test_large_poisson_counts_follow_the_distribution(mean: float) -> None:
    counts = poisson(_keys(200), torch.full((200, 1000), mean)).flatten().numpy()
    assert np.array_equal(counts, np.floor(counts))
    at = stats.poisson.ppf([0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999], mean)
    share = (counts[:, None] <= at).mean(0)
    truth = stats.poisson.cdf(at, mean)
    assert (np.abs(share - truth) < 4e-4 + 4 * np.sqrt(truth * (1 - truth) / len(counts))).all()
    assert abs(counts.mean() - mean) < 4 * math.sqrt(mean / len(counts))
    assert abs(counts.var() / mean - 1) < 4 * math.sqrt((2 + 1 / mean) / len(counts))


def test_poisson_counts_do_not_fall_where_means_rise() -> None:
    means = torch.linspace(0, 40, 800).expand(50, -1)
    for row, key in zip(means, _keys(50), strict=True):
        same_number = torch.cat([poisson(key[None], mean.view(1, 1), 4) for mean in row[::40]])
        assert (same_number.diff(dim=0) >= 0).all()


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"index must hold integers, got torch.float32; use index.long\(\)"):
        key_of(0, "train", torch.rand(3))
    with pytest.raises(TypeError):
        key_of(0.5, "train", 3)  # type: ignore[arg-type]
    for keys in (torch.zeros(3, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"keys must be int64 \(B,\), as key_of returns, got"):
            words(keys, 4)
    for count, stream in ((-1, 0), (2**34 + 1, 0), (1, -1), (1, 2**32)):
        with pytest.raises(ValueError, match=f"got {count} and {stream}"):
            words(_keys(1), count, stream)
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.float16"):
        uniform(_keys(1), 3, dtype=torch.float16)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="Poisson means must be finite and at least 0"):
            poisson(_keys(1), torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("draw", [words, uniform, normal])
def test_nothing_can_be_drawn(draw) -> None:
    assert draw(_keys(3), 0).shape == (3, 0)
    assert draw(_keys(0), 5).shape == (0, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_bits() -> None:
    keys_B = _keys(300)
    on_gpu = key_of(0, "test", torch.arange(300, device="cuda"))
    assert torch.equal(on_gpu.cpu(), keys_B)
    for draw in (words, uniform, normal):
        assert torch.equal(draw(on_gpu, 1001, 5).cpu(), draw(keys_B, 1001, 5))
