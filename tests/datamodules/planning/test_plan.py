"""Plans: what they refuse, that they survive their file, where backward operations go, what pure data parallelism is."""

from __future__ import annotations

import pytest

from datamodules.planning.plan import (
    Plan,
    PlanError,
    StagePlan,
    batch_dims,
    batch_of,
    pure_data_parallel,
    stage_of_ops,
)
from datamodules.planning.topology import load_topology
from tests.datamodules.planning.hand_graphs import named, perceptron

ONE = load_topology("v100_1x8")


def test_a_plan_survives_its_file(tmp_path) -> None:
    stages = (StagePlan(0, 3, (0, 1), 2, {0: 1, 1: -1}), StagePlan(4, 9, (2, 3), 1, {}, {7: -2, 3: 0}))
    plan = Plan("digest", "v100_1x8", stages, 4, "1f1b")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").stages[1].placements == {7: -2, 3: 0}
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(PlanError, match="not a plan"):
        Plan.load(tmp_path / "other.json")
    with pytest.raises(PlanError, match="holds no plan"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="version 9"):
        Plan.from_dict({**plan.to_dict(), "version": 9})


def test_plans_that_cannot_be_are_refused() -> None:
    stage = StagePlan(0, 3, (0, 1))
    for wrong, message in [
        (lambda: StagePlan(0, 3, ()), "needs devices"),
        (lambda: StagePlan(0, 3, (0, 0)), "each once"),
        (lambda: StagePlan(0, 3, (0, 1, 2), data=2), "cannot be cut into 2 rows"),
        (lambda: StagePlan(3, 2, (0,)), "from operation 3 to 2"),
        (lambda: Plan("", "", ()), "needs a stage"),
        (lambda: Plan("", "", (stage,), 0), "micro-batches"),
        (lambda: Plan("", "", (stage,), 1, "2f2b"), "unknown schedule"),  # type: ignore[arg-type]
        (lambda: Plan("", "", (StagePlan(1, 3, (0,)),)), "starts at operation 0"),
        (lambda: Plan("", "", (stage, StagePlan(5, 6, (2,)))), "ends at operation 3, the next begins at 5"),
        (lambda: Plan("", "", (stage, StagePlan(4, 6, (1,)))), r"two stages: \[1\]"),
    ]:
        with pytest.raises(PlanError, match=message):
            wrong()


def test_the_mesh_of_a_stage_is_rows_of_neighbours() -> None:
    stage = StagePlan(0, 1, tuple(range(8)), data=2)
    assert stage.ways == 4
    assert stage.columns == (0, 1, 2, 3)
    assert stage.rows == (0, 4)


def test_the_batch_comes_from_the_inputs() -> None:
    graph = perceptron(24)
    assert batch_of(graph) == 24
    assert batch_dims(graph) == {graph.inputs[0]: 0}


def test_pure_data_parallelism_has_one_column_and_needs_a_batch_that_divides() -> None:
    graph = perceptron(16)
    (stage,) = pure_data_parallel(graph, ONE).stages
    assert (stage.data, stage.ways, stage.splits) == (8, 1, {})
    with pytest.raises(PlanError, match="batch of 12 cannot be cut into 1 micro-batches for 8 devices"):
        pure_data_parallel(perceptron(12), ONE)


def test_backward_operations_go_where_their_forward_ones_are() -> None:
    graph = perceptron(16, (8, 32, 32, 8))
    cut = 1 + next(i for i, op in enumerate(graph.ops) if op.name.startswith("relu"))
    stages = [StagePlan(0, cut - 1, (0,)), StagePlan(cut, len(graph.ops) - 1, (1,))]
    at = stage_of_ops(graph, stages)
    for i, op in enumerate(graph.ops):
        layer = graph.layer_of(i)
        if layer:
            assert at[i] == (0 if layer == "layer0" and op.phase == "forward" else at[i])
    for name, stage in {"dw0": 0, "dw1": 1, "dw2": 1, "da2": 1}.items():
        assert at[graph.producer(named(graph, name))] == stage
    with pytest.raises(PlanError, match="the forward pass at"):
        stage_of_ops(graph, [StagePlan(0, 1, (0,))])


@pytest.mark.parametrize("cut", range(4))
def test_gradients_never_come_before_they_exist(cut: int) -> None:
    graph = perceptron(16, (8, 32, 32, 8))
    at = stage_of_ops(graph, [StagePlan(0, cut, (0,)), StagePlan(cut + 1, len(graph.ops) - 1, (1,))])
    made = {t: at[i] for i, op in enumerate(graph.ops) if op.phase == "backward" for t in op.outputs}
    for i, op in enumerate(graph.ops):
        if op.phase == "backward":
            assert all(at[i] <= made[t] for t in op.inputs if t in made and graph.ops[graph.producer(t)].inputs)
