"""Environments: what they pay adds up, what they mask would break a rule, and where they stand can be kept and taken up."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from datamodules.planning.environment import PlanEnvironment
from datamodules.planning.partition_env import (
    EXTRAS,
    OPEN,
    PARTITIONED,
    Assignments,
    PartitionProblem,
    Pruning,
    SlotTable,
)
from datamodules.planning.pipeline_env import Buckets, PipelineProblem, Window, random_buckets
from datamodules.planning.problem import take
from datamodules.planning.slot_table import largest_first
from datamodules.planning.toys import EvenStages, blocks_table, chained_table, coupled_pricer, exclusive_table

SWITCHES = [Pruning(*on) for on in itertools.product((False, True), repeat=4)]


def _free(slots: int) -> SlotTable:
    names = tuple(f"v{n}[0]" for n in range(slots))
    nothing = ((),) * slots
    return SlotTable(names, tuple(range(slots)), (100,) * slots, nothing, nothing, (1,) * slots)


def _pipeline(window: Window | None = None, arrays: bool = False, memory: float = math.inf) -> PipelineProblem:
    rng = np.random.default_rng(0)
    buckets = random_buckets(rng, 24)
    model = EvenStages(buckets, 8, memory_bytes=memory * buckets.parameters_K.sum())
    return PipelineProblem(buckets, model, 3, 8, 4, window or Window(1, 2), arrays)


def _walk(environment: PlanEnvironment, rng: np.random.Generator) -> tuple[list[float], int]:
    """A random allowed episode: its rewards and how many steps it took."""
    observed, _ = environment.reset()
    rewards, done = [], False
    while not done:
        action = int(rng.choice(np.flatnonzero(observed["mask"])))
        observed, reward, done, cut, _ = environment.step(action)
        assert not cut
        assert observed in environment.observation_space
        rewards.append(reward)
    return rewards, len(rewards)


@pytest.mark.parametrize(
    "make", [lambda: PartitionProblem("b", blocks_table(2)), _pipeline], ids=["partition", "pipeline"]
)
def test_it_is_a_gymnasium_environment(make) -> None:
    check_env(PlanEnvironment(make(), "inverse_sqrt"), skip_render_check=True)


@pytest.mark.parametrize("pruning", SWITCHES, ids=str)
def test_structural_rewards_of_a_sound_plan_add_up_to_the_share_of_variables(pruning: Pruning) -> None:
    problem = PartitionProblem("blocks", blocks_table(2, useless=2), pruning=pruning)
    environment, rng = PlanEnvironment(problem), np.random.default_rng(0)
    whole = 0
    for _ in range(40):
        rewards, steps = _walk(environment, rng)
        assert steps <= problem.horizon
        if problem.broken:
            assert rewards[-1] == -1.0
            assert not pruning.mask  # a masked action never breaks a rule
            continue
        whole += 1
        assert sum(rewards) == pytest.approx(problem.progress())
        assert problem.progress() == sum(v == PARTITIONED for v in problem.values()) / problem.variables
        assert OPEN not in problem.values()
    assert whole > 0 or not pruning.mask


def _sound(table: SlotTable, values: tuple[int, ...]) -> bool:
    """Whether complete values contradict no group and split no variable twice, checked from the table alone."""
    split = [slot for slot, value in enumerate(values) if value == PARTITIONED]
    variables = [table.variable[slot] for slot in split]
    if len(set(variables)) != len(variables):
        return False
    for slot, value in enumerate(values):
        group = table.partitioned[slot] if value == PARTITIONED else table.replicated[slot]
        if group is None or any(values[other] != wanted for other, wanted in group):
            return False
    return True


@pytest.mark.parametrize("table", [blocks_table(1), exclusive_table(), chained_table(6)], ids=["blocks", "fc", "chain"])
@pytest.mark.parametrize("pruning", [Pruning(), Pruning(linkage=False), Pruning(ordering=False)], ids=str)
def test_the_plans_that_can_be_reached_are_exactly_the_sound_ones(table: SlotTable, pruning: Pruning) -> None:
    problem = PartitionProblem("t", table, pruning=pruning)
    reached = set()

    def walk() -> None:
        if problem.done:
            assert not problem.broken
            reached.add(problem.values())
            return
        for action in np.flatnonzero(problem.allowed()):
            before = problem.values(), problem.cost(), problem.bound()
            assert problem.step(int(action))
            assert problem.bound() >= before[2] - 1e-12  # bounds only rise
            walk()
            problem.undo()
            assert (problem.values(), problem.cost(), problem.bound()) == before

    walk()
    wanted = {v for v in itertools.product((0, 1), repeat=len(table.names)) if _sound(table, v)}
    assert reached == wanted


@pytest.mark.parametrize("table", [blocks_table(2), exclusive_table(), chained_table(7)], ids=["blocks", "fc", "chain"])
@pytest.mark.parametrize("pruning", SWITCHES, ids=str)
def test_what_is_counted_step_by_step_is_what_the_values_say(table: SlotTable, pruning: Pruning) -> None:
    problem, rng = PartitionProblem("t", table, pruning=pruning), np.random.default_rng(3)
    groups = table.groups
    for _ in range(15):
        problem.reset()
        while not problem.done:
            if len(problem.decisions) and rng.random() < 0.3:
                problem.undo()
            if not problem.step(int(rng.integers(2))):
                break
            values = problem.values()

            def clashes(group: Assignments | None, values: tuple[int, ...] = values) -> bool:
                return group is None or any(values[slot] not in (OPEN, wanted) for slot, wanted in group)

            blocked = [clashes(group) for group in groups]
            split = {table.variable[slot] for slot, value in enumerate(values) if value == PARTITIONED}
            hopeful = {
                table.variable[slot] for slot, v in enumerate(values) if v == OPEN and not blocked[2 * slot + 1]
            } - split
            assert problem.progress() == len(split) / problem.variables
            assert problem.bound() == pytest.approx(_counted(table, split | hopeful))
            assert problem.cost() == pytest.approx(_counted(table, split))
            if not problem.done:
                pair = 2 * problem.slot
                assert problem.consistent().tolist() == [not blocked[pair], not blocked[pair + 1]]


def _counted(table: SlotTable, split: set[int]) -> float:
    share = sum(table.bytes_V[v] for v in split) / sum(table.bytes_V)
    return 1 + len(table.bytes_V) - len(split) + 0.5 * (1 - share)


def test_without_a_mask_exactly_the_inconsistent_actions_end_the_plan_at_a_penalty() -> None:
    problem = PartitionProblem("blocks", blocks_table(1), pruning=Pruning(mask=False, linkage=False))
    environment, rng = PlanEnvironment(problem), np.random.default_rng(1)
    seen = {True: 0, False: 0}
    for _ in range(60):
        observed, _ = environment.reset()
        done = False
        while not done:
            assert observed["mask"].all()
            action = int(rng.integers(2))
            sound = bool(problem.consistent()[action])
            observed, reward, done, _, _ = environment.step(action)
            seen[sound] += 1
            assert (reward == -1.0) == (not sound)
            assert problem.broken == (not sound)
    assert min(seen.values()) > 10


def test_folding_leaves_one_decision_for_each_group() -> None:
    table = blocks_table(4)
    folded, raw = PartitionProblem("f", table), PartitionProblem("r", table, pruning=Pruning(linkage=False))
    for problem, decisions in ((folded, 4), (raw, len(table.names))):
        problem.reset()
        while not problem.done:
            problem.step(int(np.flatnonzero(problem.allowed())[-1]))
        assert len(problem.decisions) == decisions
    assert folded.plan() == raw.plan()


def test_the_largest_reach_comes_first() -> None:
    table = blocks_table(3)
    order = largest_first(table)
    assert [table.reach[slot] for slot in order] == sorted(table.reach, reverse=True)
    assert PartitionProblem("t", table).slot == order[0]


def test_the_pricer_follows_decisions_and_comes_back() -> None:
    pricer = coupled_pricer(6, seed=2)
    problem = PartitionProblem("c", _free(6), "time", pricer)
    before = pricer.step_s
    assert problem.reference == before
    for values in itertools.product((0, 1), repeat=6):
        assert take(problem, [values[slot] for slot in problem.order])
        chosen = [n for n, value in enumerate(values) if value]
        wanted = pricer.base + pricer.single_N[chosen].sum() + pricer.pair_NN[np.ix_(chosen, chosen)].sum() / 2
        assert problem.cost() == pytest.approx(wanted)
    problem.reset()
    assert pricer.step_s == pytest.approx(before)
    pricer.most = 2
    assert take(problem, [1, 1, 1, 0, 0, 0])
    assert problem.cost() == math.inf  # what does not fit is no plan


@pytest.mark.parametrize("reward", ["relative", "shaped", "inverse_sqrt", "negative_log"])
def test_rewards_of_time_say_what_they_are_defined_as(reward) -> None:
    problem = PartitionProblem("c", _free(5), "time", coupled_pricer(5, seed=3))
    environment, rng = PlanEnvironment(problem, reward), np.random.default_rng(0)
    for _ in range(20):
        rewards, _ = _walk(environment, rng)
        ratio = problem.reference / problem.cost()
        wanted = {"inverse_sqrt": math.sqrt(ratio), "negative_log": math.log(ratio)}.get(reward, 1 - 1 / ratio)
        assert sum(rewards) == pytest.approx(wanted, abs=1e-6)
        assert reward == "shaped" or all(r == 0 for r in rewards[:-1])


def test_features_show_values_pointer_and_padding() -> None:
    problem = PartitionProblem("b", blocks_table(1))
    environment = PlanEnvironment(problem, width=40)
    observed, _ = environment.reset()
    n = problem.horizon
    assert problem.width == 2 * n + EXTRAS
    assert observed["obs"][n : 2 * n].tolist() == [float(slot == problem.slot) for slot in range(n)]
    assert not observed["obs"][problem.width :].any()
    with pytest.raises(ValueError, match="there is room for 5"):
        PlanEnvironment(problem, width=5)
    with pytest.raises(ValueError, match="unknown reward"):
        PlanEnvironment(problem, "gold")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="actions 0 to 1"):
        environment.step(2)


def test_a_snapshot_is_taken_up_where_it_was_taken() -> None:
    def draw(rng: np.random.Generator) -> PipelineProblem:
        buckets = random_buckets(rng, 16)
        return PipelineProblem(buckets, EvenStages(buckets, 4), 2, 4, window=Window(1, 1))

    first, second = (PlanEnvironment(draw, "negative_log", seed=seed) for seed in (5, 6))
    first.reset()
    first.step(int(np.flatnonzero(first.problem.allowed())[0]))
    second.restore(first.snapshot())
    for _ in range(3):
        done = False
        while not done:
            action = int(np.flatnonzero(first.problem.allowed())[-1])
            a, b = first.step(action), second.step(action)
            assert np.array_equal(a[0]["obs"], b[0]["obs"])
            assert a[1:3] == b[1:3]
            done = a[2]
        assert np.array_equal(first.reset()[0]["obs"], second.reset()[0]["obs"])


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("window", [Window(1, 2), Window(0, 1), Window(None, None), Window(2, None)], ids=str)
def test_pipelines_give_every_stage_devices_and_buckets(window: Window, arrays: bool) -> None:
    problem, rng = _pipeline(window, arrays), np.random.default_rng(4)
    for _ in range(30):
        _walk(PlanEnvironment(problem, "inverse_sqrt"), rng)
        cuts, devices = problem.completed()
        assert list(cuts) == sorted(set(cuts))
        assert list(devices) == sorted(set(devices))
        assert 0 < cuts[0] <= cuts[-1] < len(problem.buckets)
        assert 0 < devices[0] <= devices[-1] < 8
        assert problem.cost() == problem.model.length(cuts, devices)
        assert problem.bound() <= problem.cost() + 1e-12
        if window.device_radius is not None:
            assert all(
                abs(cut - centre) <= window.device_radius for cut, centre in zip(devices, problem._centres, strict=True)
            )


def test_bars_are_the_stages_shares_of_the_time() -> None:
    problem = _pipeline()
    while not problem.done:
        problem.step(int(np.flatnonzero(problem.allowed())[0]))
    bars = problem.features()[:3]
    edges = (0, *problem.cuts, len(problem.buckets))
    shares = [
        problem.buckets.seconds_K[a:b].sum() / problem.buckets.seconds_K.sum() for a, b in itertools.pairwise(edges)
    ]
    assert bars == pytest.approx(shares, rel=1e-5)


def test_stages_that_do_not_fit_are_not_offered() -> None:
    roomy, tight = _pipeline(Window(0, None)), _pipeline(Window(0, None), memory=1.7)
    for problem in (roomy, tight):
        for _ in range(2):
            problem.step(0)
    assert tight.allowed().sum() < roomy.allowed().sum()
    offered = [tight._place_of(int(a)) for a in np.flatnonzero(tight.allowed())]
    assert all(tight.model.fits(0, 0, place, 4) for place in offered)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Buckets("b", np.ones(1), np.ones(1), np.ones(1)), "two at least"),
        (lambda: Buckets("b", np.ones(3), np.ones(2), np.ones(3)), "activation_K"),
        (lambda: Buckets("b", np.zeros(3), np.ones(3), np.ones(3)), "no bucket takes any time"),
        (lambda: Buckets("b", np.array([1.0, math.nan]), np.ones(2), np.ones(2)), "finite"),
        (lambda: Window(-1, 2), "device_radius"),
        (lambda: PipelineProblem(b := Buckets("b", np.ones(3), np.ones(3), np.ones(3)), EvenStages(b, 2), 3, 2), "3 stages"),
        (lambda: PartitionProblem("p", _free(2), "time"), "needs a pricer"),
        (lambda: SlotTable(("a",), (0,), (1,), ((),), (((3, 1),),), (0,)), "slot 3"),
        (lambda: SlotTable(("a",), (0, 1), (1,), ((),), ((),), (0,)), "variable has 2 entries"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
