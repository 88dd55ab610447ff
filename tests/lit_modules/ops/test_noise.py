"""Noise does what its name says, within exact bounds, and is the same for everyone."""

from __future__ import annotations

import math

import pytest
import torch

from lit_modules.ops.noise import NOISE_SUITE, add_noise, noise_generator

GREY = torch.full((8, 3, 40, 40), 0.5)
N = GREY.numel()


def _noisy(kind: str, level: float, clip: bool = True, seed: int = 0, x: torch.Tensor = GREY) -> torch.Tensor:
    return add_noise(x, kind, level, noise_generator(seed, kind, level, 0), clip)


def test_the_suite_has_fourteen_distinct_conditions() -> None:
    assert len(set(NOISE_SUITE)) == len(NOISE_SUITE) == 14


@pytest.mark.parametrize(
    ("kind", "level", "expected"),
    [("gaussian", 0.1, 0.1), ("uniform", 0.4, 0.4 / math.sqrt(3)), ("speckle", 0.3, 0.15)],
)
def test_spread_is_the_level(kind: str, level: float, expected: float) -> None:
    noise = _noisy(kind, level, clip=False) - GREY
    assert abs(noise.mean()) < 5 * expected / math.sqrt(N)
    assert abs(noise.std() - expected) < 5 * expected / math.sqrt(N)


@pytest.mark.parametrize(("kind", "up", "down"), [("salt_pepper", 0.5, 0.5), ("salt", 1.0, 0.0), ("pepper", 0.0, 1.0)])
def test_extremes_take_the_share_they_say(kind: str, up: float, down: float) -> None:
    noisy = _noisy(kind, 0.1)
    for value, part in ((1.0, up), (0.0, down)):
        share = (noisy == value).double().mean().item()
        assert abs(share - 0.1 * part) <= 5 * math.sqrt(0.1 * 0.9 / N) * (part > 0)
    assert ((noisy == GREY) | (noisy == 0) | (noisy == 1)).all()


@pytest.mark.parametrize(("kind", "level"), NOISE_SUITE)
def test_noise_is_clipped_keyed_and_leaves_its_input_alone(kind: str, level: float) -> None:
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    torch.manual_seed(123)
    noisy = _noisy(kind, level, x=x)
    torch.manual_seed(321)
    torch.rand(5)
    assert torch.equal(noisy, _noisy(kind, level, x=x))
    assert torch.equal(x, before)
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert not torch.equal(noisy, _noisy(kind, level, seed=1, x=x))
    other_batch = add_noise(x, kind, level, noise_generator(0, kind, level, 1))
    assert not torch.equal(noisy, other_batch)


def test_black_pixels_stay_black_under_speckle_and_salt_never_darkens() -> None:
    black = torch.zeros_like(GREY)
    assert not _noisy("speckle", 0.6, x=black).any()
    assert (_noisy("salt", 0.05) >= GREY).all()
    assert (_noisy("pepper", 0.05) <= GREY).all()


def test_level_zero_changes_nothing() -> None:
    for kind in ("gaussian", "salt_pepper", "salt", "pepper", "speckle", "uniform"):
        assert torch.equal(_noisy(kind, 0.0), GREY)


@pytest.mark.parametrize(
    ("kind", "level", "words"),
    [
        ("gausian", 0.1, "'gaussian'"),
        ("salt", 1.5, "between 0 and 1"),
        ("gaussian", -0.1, "-0.1"),
        ("uniform", math.nan, "nan"),
    ],
)
def test_bad_noise_is_named(kind: str, level: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        add_noise(GREY, kind, level, torch.Generator())
