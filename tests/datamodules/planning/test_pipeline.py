"""Pipelines: the exact recursion against a slow one, closed forms, and how lengths move with their arguments."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.planning.optimum import NoPlan
from datamodules.planning.optimum_stages import stage_optimum, windows
from datamodules.planning.pipeline import in_flight, short_form, step_length, timeline
from datamodules.planning.plan import SCHEDULES
from datamodules.planning.price import Evaluator
from datamodules.planning.stages import Layers, Pipeline, buckets_of, layers_of, load_profile
from datamodules.planning.topology import load_topology
from tests.datamodules.planning.hand_graphs import perceptron

TIMES = st.floats(0.001, 2.0)


@st.composite
def pipelines(draw):
    stages, m = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    rows = [draw(st.lists(TIMES, min_size=n, max_size=n)) for n in (stages, stages, stages - 1, stages - 1)]
    return *rows, m, draw(st.sampled_from(SCHEDULES))


def slow_length(f, b, hf, hb, m: int, schedule) -> float:
    """The recursion as it is written, with memory of what was computed."""
    stages = len(f)
    forward = [x for pair in itertools.zip_longest(f, hf) for x in pair if x is not None]
    backward = [x for pair in itertools.zip_longest(b, hb) for x in pair if x is not None]
    phi = [held for held in in_flight(stages, m, schedule) for _ in range(2)][: len(forward)]

    @cache
    def end_f(i: int, x: int) -> float:
        if i < 0 or x < 0:
            return 0.0
        waits = [end_f(i - 1, x), end_f(i, x - 1)]
        if i - phi[x] >= 0:
            waits.append(end_b(i - phi[x], x))
        return max(waits) + forward[x]

    @cache
    def end_b(i: int, x: int) -> float:
        if i < 0:
            return 0.0
        waits = [end_b(i - 1, x), end_f(min(i + phi[x] - 1, m - 1), x)]
        waits.append(end_b(i, x + 1) if x + 1 < len(backward) else 0.0)
        return max(waits) + backward[x]

    return max(end_b(m - 1, x) for x in range(len(backward)))


@given(pipelines())
@settings(max_examples=150, deadline=None)
def test_the_timeline_is_the_recursion(pipeline) -> None:
    assert timeline(*pipeline).length == pytest.approx(slow_length(*pipeline))


@given(pipelines())
@settings(max_examples=80, deadline=None)
def test_nothing_overlaps_and_everything_waits_for_what_it_needs(pipeline) -> None:
    line = timeline(*pipeline)
    end_f, end_b = line.start_f + line.forward_X, line.start_b + line.backward_X
    assert (line.start_f[:, 1:] >= end_f[:, :-1] - 1e-9).all()
    assert (line.start_b[:, :-1] >= end_b[:, 1:] - 1e-9).all()
    assert (line.start_b >= end_f - 1e-9).all()
    for x in range(len(line.forward_X)):
        tasks = sorted(
            [*zip(line.start_f[:, x], end_f[:, x], strict=True), *zip(line.start_b[:, x], end_b[:, x], strict=True)]
        )
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(tasks))


@given(pipelines())
@settings(max_examples=80, deadline=None)
def test_no_stage_holds_more_micro_batches_than_its_schedule_says(pipeline) -> None:
    line = timeline(*pipeline)
    held = in_flight(len(pipeline[0]), pipeline[4], pipeline[5])
    for s, most in enumerate(held):
        starts, ends = line.start_f[:, 2 * s], (line.start_b + line.backward_X)[:, 2 * s]
        assert max(sum(starts <= t) - sum(ends <= t) for t in starts) <= most


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "m"), [(1, 1), (2, 4), (4, 16), (3, 2)])
def test_equal_stages_leave_the_bubble_of_the_textbook(schedule, stages: int, m: int) -> None:
    f, b = 1.0, 1.66
    line = timeline([f] * stages, [b] * stages, [0.0] * (stages - 1), [0.0] * (stages - 1), m, schedule)
    assert line.length == pytest.approx((m + stages - 1) * (f + b))
    if (stages, m) in ((2, 4), (4, 16)):
        bubble = 1 - m * (f + b) / line.length
        assert bubble == pytest.approx({(2, 4): 0.2, (4, 16): 3 / 19}[stages, m])


@given(pipelines())
@settings(max_examples=80, deadline=None)
def test_the_short_form_is_below_gpipe_and_equal_where_backward_is_proportional(pipeline) -> None:
    f, _, hf, _, m, _ = pipeline
    assert short_form(*pipeline[:5]) <= timeline(*pipeline[:5], "gpipe").length + 1e-9
    b, hb = [1.66 * x for x in f], [1.66 * x for x in hf]
    assert short_form(f, b, hf, hb, m) == pytest.approx(timeline(f, b, hf, hb, m, "gpipe").length)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gpipe_grows_with_every_time_and_with_micro_batches(schedule) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        f, b, hf, hb = rng.random(3), rng.random(3), rng.random(2), rng.random(2)
        before = timeline(f, b, hf, hb, 4, schedule).length
        assert timeline(f, b, hf, hb, 5, schedule).length >= before
        for row in (f, b, hf, hb):
            for i in range(len(row)):
                row[i] += 0.1
                assert timeline(f, b, hf, hb, 4, schedule).length >= before - 1e-12
                row[i] -= 0.1


def test_a_stage_ends_after_its_tail_and_early_stages_end_last() -> None:
    line = timeline([1.0, 1.0], [2.0, 2.0], [0.0], [0.0], 2)
    assert step_length(line, [0.0, 0.0]) == line.length
    assert step_length(line, [0.0, 1.5]) == line.length
    assert step_length(line, [0.5, 0.0]) == line.length + 0.5
    assert step_length(line, [0.0, 3.0]) == line.length + 1.0


def test_impossible_pipelines_are_refused() -> None:
    with pytest.raises(ValueError, match="1 hops apart, got 0"):
        timeline([1, 1], [1, 1], [], [0], 2)
    with pytest.raises(ValueError, match="not negative"):
        timeline([1, -1], [1, 1], [0], [0], 2)
    with pytest.raises(ValueError, match="micro-batches, got 0"):
        timeline([1], [1], [], [], 0)
    with pytest.raises(ValueError, match="unknown schedule"):
        in_flight(2, 2, "none")  # type: ignore[arg-type]


def drawn(count: int, seed: int) -> Layers:
    rng = np.random.default_rng(seed)
    rows = rng.random(count) * 1e-2, rng.random(count) * 2e-2, rng.random(count) * 1e7, rng.random(count) * 1e8
    return Layers("drawn", *rows, rng.random(count) * 1e7)


def brute_force(pipeline: Pipeline, stages: int) -> float:
    best = float("inf")
    for devices in itertools.product(*windows(pipeline, stages)):
        if any(a >= b for a, b in itertools.pairwise(devices)):
            continue
        for cuts in itertools.combinations(range(1, len(pipeline.layers)), stages - 1):
            best = min(best, pipeline.length(cuts, devices))
    return best


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_branch_and_bound_finds_what_going_through_all_finds(schedule, stages: int, seed: int) -> None:
    for machine in (load_topology("v100_asymmetric_2_1"), load_topology("v100_1x8").meshed(2, 2)):
        pipeline = Pipeline(drawn(7, seed), machine, 4, schedule)
        found = stage_optimum(pipeline, stages)
        assert found.value == pytest.approx(brute_force(pipeline, stages), rel=1e-12)
        assert pipeline.length(found.cuts, found.devices) == pytest.approx(found.value, rel=1e-12)
        assert found.proven


def test_the_programme_of_the_short_form_is_exact() -> None:
    for seed in range(4):
        pipeline = Pipeline(drawn(8, seed), load_topology("v100_asymmetric_2_1"), 5, "gpipe")
        found = stage_optimum(pipeline, 2, exact=False)
        best = float("inf")
        for (device,) in itertools.product(*windows(pipeline, 2)):
            for cut in range(1, 8):
                p = pipeline.parts([cut], [device])
                best = min(best, short_form(p["forward"], p["backward"], p["ahead"], p["back"], 5))
        assert found.value == pytest.approx(best)


@pytest.mark.parametrize(("nodes", "cuts"), [(2, (25,)), (3, (17, 33)), (4, (13, 25, 37))])
def test_bert_48_is_cut_at_servers_into_even_parts(nodes: int, cuts: tuple[int, ...]) -> None:
    pipeline = Pipeline(load_profile("bert48_v100", 64), load_topology(f"v100_{nodes}x8"), 8, "gpipe")
    found = stage_optimum(pipeline, nodes, radius=2)
    assert found.devices == tuple(8 * n for n in range(1, nodes))
    assert all(abs(a - b) <= 1 for a, b in zip(found.cuts, cuts, strict=True))


def test_the_profile_says_what_was_measured() -> None:
    layers = load_profile("bert48_v100", 2)
    assert len(layers) == 49
    assert layers.seconds_K.sum() == pytest.approx(343.8e-3, rel=1e-3)
    assert layers.parameters_K.sum() == pytest.approx(2.55e9, rel=0.01)
    assert load_profile("bert48_v100", 8).seconds_K.sum() == pytest.approx(4 * layers.seconds_K.sum())
    assert "DAPPLE" in layers.source
    with pytest.raises(ValueError, match="no profile 'bert'"):
        load_profile("bert", 2)


def test_memory_forbids_cuts_and_says_what_is_too_large() -> None:
    layers = load_profile("bert48_v100", 64)
    small = load_topology("v100_2x8")
    from dataclasses import replace

    tight = replace(small, memory_bytes=int(6.2e9), usable_memory=1.0)
    found = stage_optimum(Pipeline(layers, tight, 8, "1f1b"), 2, radius=0)
    pipeline = Pipeline(layers, tight, 8, "1f1b")
    assert pipeline.fits(0, 0, found.cuts[0], 8, 2)
    with pytest.raises(NoPlan, match=r"does not fit on 2 stages .* too many"):
        stage_optimum(Pipeline(layers, replace(small, memory_bytes=10**9), 8, "1f1b"), 2)
    with pytest.raises(NoPlan, match="17 stages do not fit on 16 devices"):
        stage_optimum(Pipeline(layers, small, 8, "1f1b"), 17)


def test_buckets_of_a_graph_hold_all_of_it() -> None:
    graph, machine = perceptron(64, (64, 256, 64, 256, 64)), load_topology("v100_1x8")
    layers = layers_of(graph, machine, 5)
    assert layers.parameters_K.sum() == graph.parameter_bytes
    assert layers.ends_K[-1] == max(i for i, op in enumerate(graph.ops) if op.phase == "forward")
    whole = layers_of(graph, machine, 100)
    assert layers.seconds_K.sum() == pytest.approx(whole.seconds_K.sum())
    assert layers.activation_K[-1] == 0
    assert len(buckets_of(layers)) == len(layers)
    with pytest.raises(ValueError, match="into 1 buckets"):
        layers_of(graph, machine, 1)


def test_a_pipeline_of_buckets_is_priced_as_its_plan() -> None:
    graph, machine = perceptron(64, (64, 256, 256, 64)), load_topology("v100_1x8").meshed(2, 2)
    layers = layers_of(graph, machine, 8)
    pipeline = Pipeline(layers, machine, 2, "1f1b")
    plan = pipeline.plan(graph, (3,), (2,))
    cost = Evaluator(graph, machine).price(plan)
    parts = pipeline.parts((3,), (2,))
    assert cost.send_s == pytest.approx(sum(parts["ahead"]) + sum(parts["back"]))
    assert [stage.devices for stage in cost.stages] == [(0, 1), (2, 3)]
    assert cost.step_s > 0


def test_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="one number for each of 2"):
        Layers("x", np.ones(2), np.ones(3), np.ones(2), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="not negative"):
        Layers("x", -np.ones(2), np.ones(2), np.ones(2), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="leave no stage empty"):
        Pipeline(drawn(4, 0), load_topology("v100_1x8"), 2).parts((2, 2), (1, 2))
