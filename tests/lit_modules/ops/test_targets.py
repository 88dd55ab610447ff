"""The functions to approximate: their Lipschitz constants hold, and are the smallest powers of two that do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lit_modules.ops.targets import FAMILIES, target

SEEDS = (0, 1, 7)


def _points(dims: int, count: int = 4000, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_two_points_are_steeper_than_the_constant(name: str, seed: int) -> None:
    f = target(name, seed)
    a, b = _points(f.dims), _points(f.dims, seed=1)
    for step in (1.0, 1e-2, 1e-5):  # far apart and near each other
        far_N = (step * (b - a)).abs().amax(1)
        assert ((f(a + step * (b - a)) - f(a)).abs() <= f.lipschitz * far_N).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_constant_is_the_least_power_of_two(name: str) -> None:
    """The slope in the sup norm is the gradient's sum of absolutes; half the constant is exceeded somewhere."""
    f = target(name)
    x = _points(f.dims).requires_grad_()
    slope = torch.autograd.grad(f(x).sum(), x)[0].abs().sum(1).max()
    assert f.lipschitz / 2 < slope <= f.lipschitz
    assert math.frexp(f.lipschitz)[0] == 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_seeds_are_members_of_one_family(name: str) -> None:
    x = _points(target(name).dims)
    values = [target(name, seed)(x) for seed in SEEDS]
    assert torch.equal(values[0], target(name, 0)(x))
    assert all((a - b).abs().max() > 0.05 for a, b in itertools.pairwise(values))
    assert all(v.shape == (4000,) and v.abs().max() <= 1 for v in values)


def test_phases_shift_the_argument() -> None:
    """A wave has period 1 in each of its arguments, and a half period turns its sign."""
    x = _points(2)
    for name in ("sine_1d", "waves_2d"):
        f = target(name, 3)
        at = x[:, : f.dims]
        first = torch.eye(f.dims, dtype=torch.float64)[0]
        torch.testing.assert_close(f(at + first), f(at))
        torch.testing.assert_close(f(at + first / 2), -f(at))


def test_global_randomness_is_neither_read_nor_moved() -> None:
    x = _points(8)
    torch.manual_seed(1)
    first, drawn = target("waves_8d", 5)(x), torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    assert torch.equal(target("waves_8d", 5)(x), first)


def test_single_precision_is_close_to_double() -> None:
    f = target("waves_8d", 2)
    x = _points(8).float()
    assert f(x).dtype == torch.float32
    torch.testing.assert_close(f(x).double(), f(x.double()), atol=1e-5, rtol=0)


def test_bad_names_and_points_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown target 'wave_2d', nearest: 'waves_2d'"):
        target("wave_2d")
    with pytest.raises(ValueError, match=r"points \(N, 2\), got \(5, 3\)"):
        target("waves_2d")(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        target("waves_2d")(torch.zeros(2))
