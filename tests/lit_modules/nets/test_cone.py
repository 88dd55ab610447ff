"""Universal approximation by construction: the proven bound, the predicted rate, and slopes that are shifts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_modules.nets.cone import ConeNet, cone_net, grid_centres
from lit_modules.ops.targets import target

CASES = [("sine_1d", 8), ("sine_1d", 50), ("waves_2d", 6), ("waves_2d", 17), ("waves_8d", 1), ("waves_8d", 2)]


def _points(dims: int, per_axis: int, count: int = 2000) -> Tensor:
    """Random points of the unit cube and corners of the centres' cells, where a cone is worst."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(count, dims, generator=generator, dtype=torch.float64)
    corners = torch.randint(0, per_axis + 1, (count, dims), generator=generator) / per_axis
    return torch.cat([random, corners.double()])


def _gap(name: str, seed: int, per_axis: int) -> Tensor:
    f = target(name, seed)
    x = _points(f.dims, per_axis)
    with torch.no_grad():
        return f(x) - ConeNet(name, seed, per_axis)(x)[:, 0]


@pytest.mark.parametrize(("name", "per_axis"), CASES)
@pytest.mark.parametrize("seed", [0, 3])
def test_it_lies_below_and_within_the_bound(name: str, per_axis: int, seed: int) -> None:
    gap = _gap(name, seed, per_axis)
    assert gap.min() >= -1e-12
    assert gap.max() <= ConeNet(name, seed, per_axis).bound + 1e-12
    assert gap.max() > 0.2 * min(1.0, ConeNet(name, seed, per_axis).bound)  # and the bound is not idle


@pytest.mark.parametrize(("name", "per_axis"), CASES)
def test_it_is_exact_at_the_centres_and_no_steeper_than_allowed(name: str, per_axis: int) -> None:
    f = target(name, 1)
    net = ConeNet(name, 1, per_axis)
    centres = grid_centres(per_axis, f.dims)
    a, b = _points(f.dims, per_axis).chunk(2)
    with torch.no_grad():
        torch.testing.assert_close(net(centres)[:, 0], f(centres), rtol=0, atol=1e-12)
        steep = (net(a) - net(b)).abs()[:, 0]
    assert (steep <= f.lipschitz * (a - b).abs().amax(1) + 1e-12).all()


@pytest.mark.parametrize(("name", "sizes"), [("sine_1d", (8, 32, 128, 512)), ("waves_2d", (4, 8, 16, 32))])
def test_the_error_falls_as_predicted_with_the_width(name: str, sizes: tuple[int, ...]) -> None:
    """The bound is c width ** (-1 / d); the error follows it: a factor of 4 per factor 4 (d = 1) or 16 (d = 2)."""
    dims = target(name).dims
    errors = [_gap(name, 0, per_axis).max().item() for per_axis in sizes]
    widths = [per_axis**dims for per_axis in sizes]
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1 / dims, rel=0.08)
    assert errors == sorted(errors, reverse=True)


def test_in_eight_dimensions_more_centres_help_too() -> None:
    few, more = (_gap("waves_8d", 0, per_axis).mean() for per_axis in (1, 2))
    assert more < 0.7 * few


@pytest.mark.parametrize(("name", "per_axis"), CASES)
def test_only_fixed_powers_of_two_are_multiplied(name: str, per_axis: int) -> None:
    """2 d rows of one weight each, whatever the accuracy; the rest adds and compares."""
    net = ConeNet(name, 0, per_axis).net
    dims = target(name).dims
    assert net.spec == f"L{2 * dims} m{per_axis**dims} M1"
    weight = net[1].weight.detach()
    assert torch.count_nonzero(weight) == 2 * dims
    assert {math.frexp(abs(w))[0] for w in weight[weight != 0].tolist()} == {0.5}
    assert not net[1].bias.any()
    assert not net[3].weight.any()


def test_scattered_centres_and_any_function_keep_the_bound_point_by_point() -> None:
    """0 <= f - g <= 2 c times the distance to the nearest centre."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.rand(60, 3, generator=generator, dtype=torch.float64)
    x = torch.rand(1000, 3, generator=generator, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return x.abs().amax(1) - 0.5 * x[:, 1].clamp(max=0.3)

    with torch.no_grad():
        gap = f(x) - cone_net(f, centres, 1.5)(x)[:, 0]
    near = (x[:, None] - centres).abs().amax(2).amin(1)
    assert gap.min() >= -1e-12
    assert (gap <= 2 * 1.5 * near + 1e-12).all()


def test_a_constant_that_is_too_small_breaks_the_promise() -> None:
    f = target("sine_1d")
    x = _points(1, 64)
    with torch.no_grad():
        gap = f(x) - cone_net(f, grid_centres(64, 1), f.lipschitz / 4)(x)[:, 0]
    assert gap.min() < -0.05


def test_centres_are_the_middles_of_equal_cubes() -> None:
    assert grid_centres(2, 2).tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    assert grid_centres(3, 1).shape == (3, 1)
    x = _points(3, 4)
    centres = grid_centres(4, 3)
    radius = (x[:, None] - centres).abs().amax(2).amin(1).max()
    assert radius == 1 / 8


def test_single_precision_points_are_taken() -> None:
    net = ConeNet("waves_2d", 0, 5)
    x = torch.rand(4, 2)
    assert net(x).dtype == torch.float64
    assert torch.equal(net(x), net(x.double()))
    assert net.bound == 8 / 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grid_centres(0, 2), "got 0 and 2"),
        (lambda: grid_centres(2, 0), "got 2 and 0"),
        (lambda: cone_net(lambda x: x[:, 0], torch.zeros(0, 2), 1.0), r"at least one, got \(0, 2\)"),
        (lambda: cone_net(lambda x: x[:, 0], torch.zeros(2), 1.0), r"got \(2,\)"),
        (lambda: cone_net(lambda x: x[:, 0], torch.zeros(1, 2), 0.0), "positive and finite, got 0.0"),
        (lambda: cone_net(lambda x: x[:, 0], torch.zeros(1, 2), math.inf), "got inf"),
        (lambda: cone_net(lambda x: x, torch.zeros(3, 1), 1.0), r"\(3, 1\) to \(3,\), got \(3, 1\)"),
        (lambda: cone_net(lambda x: 1 / x[:, 0], torch.tensor([[1.0], [0.0]]), 1.0), r"inf at centre \[0.0\]"),
        (lambda: ConeNet("sine", 0, 4), "unknown target 'sine', nearest: 'sine_1d'"),
        (lambda: ConeNet("waves_2d", 0, 4)(torch.zeros(3, 1)), r"of 2 values per sample, got \(3, 1\)"),
    ],
)
def test_impossible_values_are_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
