"""Paths of a shaken camera: the published equations step by step, their statistics, and the scaling that is ours.

Legend: B paths, M samples, 2 = (column, row).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.blur_motion import Motion, draw
from datamodules.blur_paths import GRID, LENGTH, SAMPLES, _shaken, exposed, trajectories
from datamodules.counter_random import Stream, key_of, normal_pairs, unit_vector, words

AS_PUBLISHED = Motion(parametrise="length", samples=SAMPLES)  # at a side of 256 px, L = 60 px
# The dossier's table at L = 60, M = 2000, of 400 trajectories each: mean of the larger side of the box / L, by anxiety.
PILOT = {0.0: 0.90, 0.001: 0.56, 0.003: 0.41, 0.005: 0.33, 0.01: 0.23, 0.05: 0.10, 0.1: 0.06}


def _keys(count: int, seed: int = 0) -> Tensor:
    return key_of(seed, "test", torch.arange(count))


def _box(path_BM2: Tensor) -> Tensor:
    return (path_BM2.amax(1) - path_BM2.amin(1)).amax(-1)


def _reference(motion: Motion, keys_B: Tensor, length: float) -> np.ndarray:
    """The equations of Boracchi and Foi as published, in complex float64, from the same random words; x (B, M)."""
    M = motion.samples
    a, turn, c, g, p = (
        getattr(draw(motion, keys_B, 256), name).numpy()
        for name in ("anxiety", "turn", "inertia", "gaussian", "impulse")
    )
    w = words(keys_B, 4 * (M - 1), Stream.SHAKE).numpy().reshape(len(keys_B), M - 1, 4) / 2.0**32
    n = np.sqrt(-2 * np.log(w[..., 2] + 2.0**-33)) * np.exp(2j * np.pi * w[..., 3])
    s = length / (M - 1)
    v = np.where(a > 0, a, s) * np.exp(2j * np.pi * turn)
    x = np.zeros((len(keys_B), M), complex)
    for t in range(M - 1):
        jump = 2 * v * np.exp(1j * (np.pi + (w[:, t, 1] - 0.5)))
        jump[w[:, t, 0] >= p * a] = 0
        v = v + jump + a * (g * n[:, t] - c * x[:, t]) * s
        v = v / np.abs(v) * s
        x[:, t + 1] = x[:, t] + v
    return x


def test_paths_are_those_of_the_published_equations() -> None:
    """At 2000 samples and 60 px no departure acts but the last, which moves the path as a whole.

    Three roundings by half a unit of the grid: of the sample, of the centroid, and of the mean of the others.
    """
    for anxiety in (0.0, 0.001, 0.003, 0.01, 0.1):
        motion = replace(AS_PUBLISHED, anxiety=(anxiety,))
        found = trajectories(motion, _keys(12), 256)
        expected = _reference(motion, _keys(12), LENGTH)
        moved = torch.view_as_real(torch.from_numpy(expected - expected.mean(1, keepdims=True)))
        assert (found - moved).abs().max() <= 1.5 / GRID


def test_the_reference_jumps() -> None:
    """Or the test above would not have seen one."""
    motion = replace(AS_PUBLISHED, anxiety=(0.1,))
    x = _reference(motion, _keys(12), LENGTH)
    turns = np.angle(np.diff(x)[:, 1:] / np.diff(x)[:, :-1])
    assert (np.abs(turns) > 2.5).sum() > 12


@pytest.mark.parametrize(("samples", "anxieties"), [(500, tuple(PILOT)), (2000, (0.001, 0.01))])
def test_spread_of_paths_is_the_pilots_whatever_the_number_of_samples(samples: int, anxieties) -> None:
    """Within four standard errors of the difference of two means of 400, and the table's rounding."""
    for anxiety in anxieties:
        motion = replace(AS_PUBLISHED, anxiety=(anxiety,), samples=samples)
        box_B = _box(trajectories(motion, _keys(400), 256)) / LENGTH
        error = float(box_B.std()) * math.sqrt(2 / 400)
        assert abs(float(box_B.mean()) - PILOT[anxiety]) < 4 * error + 0.005, anxiety


@pytest.mark.parametrize("samples", [500, 2000])
def test_a_path_jumps_as_often_whatever_the_number_of_samples(samples: int) -> None:
    """On average a p 2000 times, p uniform up to 0.2. A jump turns by at least 2.24 rad; shakes of this strength by less."""
    motion = replace(AS_PUBLISHED, anxiety=(0.01,), samples=samples, gaussian=(0, 3))
    steps = torch.view_as_complex(trajectories(motion, _keys(500), 256).diff(dim=1).contiguous()).numpy()
    turns = np.abs(np.angle(steps[:, 1:] / steps[:, :-1]))
    expected = 500 * 0.01 * 0.1 * 2000
    assert abs((turns > 1.7).sum() - expected) < 4 * math.sqrt(expected * (1 + 2 / 3))  # the variance of p adds 2 / 3


def test_steps_have_the_bits_of_ieee_arithmetic() -> None:
    """So no library root or product with another rounding took part."""
    M, keys_B = 60, _keys(7)
    motion = Motion(anxiety=(0.05,), samples=M)
    drawn = draw(motion, keys_B, 64)
    words_BM4 = words(keys_B, 4 * (M - 1), Stream.SHAKE).view(7, M - 1, 4)
    step, coarser = 60.0 / (M - 1), 2000 / M
    shaken = _shaken(drawn, keys_B, M)
    for b in range(7):
        a, c, g, p = (float(values[b]) for values in (drawn.anxiety, drawn.inertia, drawn.gaussian, drawn.impulse))
        noise = (normal_pairs(words_BM4[b, :, 2], words_BM4[b, :, 3]) * (a * g * math.sqrt(coarser))).tolist()
        v = [part * (a * (1 / step)) for part in unit_vector(drawn.turn[b]).tolist()]
        x, pull = [0.0, 0.0], a * c * (coarser * step)
        for t in range(M - 1):
            if int(words_BM4[b, t, 0]) * 2.0**-32 < a * p * coarser:
                turn = words_BM4[b, t, 1].double() * (2.0**-32 / math.tau) + (0.5 - 0.5 / math.tau)
                real, imaginary = (unit_vector(turn) * 2.0).tolist()
                real += 1.0
                v = [v[0] * real - v[1] * imaginary, v[0] * imaginary + v[1] * real]
            w = [v[i] + noise[t][i] - x[i] * pull for i in (0, 1)]
            speed = math.sqrt(w[0] * w[0] + w[1] * w[1])
            v = [w[0] / speed, w[1] / speed]
            x = [x[0] + v[0], x[1] + v[1]]
            assert shaken[b, t + 1].tolist() == [x[0] * step, x[1] * step]


def test_every_step_has_the_same_length() -> None:
    path_BM2 = trajectories(AS_PUBLISHED, _keys(20), 256)
    steps_BM = path_BM2.diff(dim=1).norm(dim=-1)
    assert (steps_BM - LENGTH / (SAMPLES - 1)).abs().max() < 2 / GRID
    longer = trajectories(replace(AS_PUBLISHED, length=(0.5, 0.5)), _keys(20), 128)
    assert (longer.diff(dim=1).norm(dim=-1).sum(1) - 64).abs().max() < 0.1


MOTIONS = st.builds(
    Motion,
    kind=st.sampled_from(["shake", "linear"]),
    extent=st.tuples(st.floats(0, 0.2), st.floats(0.2, 1)),
    anxiety=st.lists(st.floats(0, 0.1), min_size=1, max_size=3).map(tuple),
    exposures=st.lists(st.floats(0.1, 1), min_size=1, max_size=3).map(tuple),
    samples=st.integers(20, 60),
    parametrise=st.sampled_from(["extent", "length"]),
    angle=st.tuples(st.floats(-360, 0), st.floats(0, 360)),
)


@settings(max_examples=60, deadline=None)
@given(MOTIONS, st.integers(1, 300), st.integers(0, 1000))
def test_the_exposed_part_has_the_drawn_extent_about_the_origin(motion: Motion, side: int, seed: int) -> None:
    keys_B = _keys(5, seed)
    path_BM2, drawn = trajectories(motion, keys_B, side), draw(motion, keys_B, side)
    weights_BM = exposed(drawn.exposure, motion.samples)
    for path_M2, weights_M, size in zip(path_BM2, weights_BM, drawn.size, strict=True):
        seen = path_M2[weights_M > 0]
        if motion.parametrise == "extent":
            assert abs(float(_box(seen[None])[0] - size)) <= 1.01 / GRID
        else:
            assert float(_box(seen[None])[0] - size) <= 1.01 / GRID
        centroid = (weights_M[:, None] * path_M2).sum(0) / weights_M.sum()
        assert centroid.abs().max() <= 0.501 / GRID
    assert torch.equal(path_BM2, (path_BM2 * GRID).round() / GRID)


@settings(max_examples=40, deadline=None)
@given(MOTIONS, st.permutations(range(9)), st.integers(1, 9))
def test_a_path_has_the_same_bits_in_any_batch(motion: Motion, order: list[int], count: int) -> None:
    keys_B = _keys(9)
    chosen = torch.tensor(order[:count])
    assert torch.equal(trajectories(motion, keys_B, 64)[chosen], trajectories(motion, keys_B[chosen], 64))


def test_jumps_of_others_change_no_bit() -> None:
    motion = Motion(anxiety=(0.0, 0.1), samples=300)
    keys_B = _keys(24)
    alone = torch.cat([trajectories(motion, key[None], 64) for key in keys_B])
    assert torch.equal(trajectories(motion, keys_B, 64), alone)


def test_shape_does_not_depend_on_the_size_of_the_image() -> None:
    for motion in (Motion(), replace(AS_PUBLISHED, samples=500)):
        small, large = (trajectories(motion, _keys(20), side) for side in (64, 256))
        assert (large - 4 * small).abs().max() <= 4 / GRID


def test_a_shake_without_anxiety_is_a_straight_line() -> None:
    shake = Motion(anxiety=(0.0,))
    difference = trajectories(shake, _keys(50), 128) - trajectories(replace(shake, kind="linear"), _keys(50), 128)
    assert difference.abs().max() <= 2 / GRID


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 135, 200, 300, -60])
def test_a_line_runs_at_the_asked_angle_clockwise_on_the_screen(degrees: float) -> None:
    motion = Motion(kind="linear", angle=(degrees, degrees), parametrise="length", length=(0.25, 0.25))
    path_BM2 = trajectories(motion, _keys(2), 128)
    along = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], dtype=torch.float64)
    assert (path_BM2[:, -1] - path_BM2[:, 0] - 32 * along).abs().max() < 2 / GRID
    assert (path_BM2[:, 125] + path_BM2[:, -126]).abs().max() < 4 / GRID


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 1), st.integers(40, 3000))
def test_exposure_is_a_share_of_the_time_from_the_start(exposure: float, samples: int) -> None:
    weights_M = exposed(torch.tensor([exposure], dtype=torch.float64), samples)[0]
    assert abs(float(weights_M.sum()) - exposure * samples) < 2**-16
    assert ((weights_M >= 0) & (weights_M <= 1)).all()
    assert (weights_M.diff() <= 0).all()
    assert ((weights_M > 0) & (weights_M < 1)).sum() <= 1


def test_other_keys_give_other_paths() -> None:
    paths = [
        trajectories(Motion(), key_of(seed, split, torch.arange(2), epoch), 64)
        for seed in (0, 1)
        for split in ("train", "test")
        for epoch in (0, 1)
    ]
    assert len(torch.cat(paths).flatten(1).unique(dim=0)) == 16


def test_a_kind_without_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="'disk' has no path; kinds with one: shake, linear"):
        trajectories(Motion(kind="disk"), _keys(2), 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_bits() -> None:
    motion = Motion(anxiety=(0.0, 0.003, 0.1), exposures=(0.3, 1.0))
    assert torch.equal(trajectories(motion, _keys(50).cuda(), 64).cpu(), trajectories(motion, _keys(50), 64))
