"""Splits become torch's styles, and what torch cannot do is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, PlanError, StagePlan
from lit_modules.execution.apply import check, children_of
from lit_modules.execution.layouts import Layout, layout_of
from lit_modules.execution.plans import aligned, combined, executable_plans, pipeline
from lit_modules.execution.workloads import WORKLOADS, Workload

BERT, VGG, MLP = WORKLOADS["bert_tiny"], WORKLOADS["vgg_tiny"], WORKLOADS["mlp_tiny"]


def _layout(workload: Workload, splits: dict[str, int], ways: int = 2) -> Layout:
    graph = workload.graph()
    tensors = {p.name: p.tensor for p in graph.parameters} | {graph.tensors[t].name: t for t in graph.inputs}
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(ways)), 1, {tensors[n]: s for n, s in splits.items()})
    return layout_of(workload.net(), graph, stage)


def test_megatrons_block() -> None:
    """Columns and then rows; q, k and v are given their input as one DTensor, so that its gradient is summed once."""
    graph = BERT.graph()
    layout = layout_of(BERT.net(), graph, executable_plans(graph, 2, "any")["tp"].stages[0])
    columns = {f"block{i}.{leaf}" for i in range(2) for leaf in ("attention.q", "attention.k", "attention.v", "mlp.up")}
    rows = {f"block{i}.{leaf}" for i in range(2) for leaf in ("attention.o", "mlp.down")}
    assert {path for path, style in layout.styles.items() if isinstance(style, ColwiseParallel)} == columns
    assert {path for path, style in layout.styles.items() if isinstance(style, RowwiseParallel)} == rows
    shared = {path for path, style in layout.styles.items() if isinstance(style, PrepareModuleInput)}
    assert shared == {"block0.attention", "block1.attention"}
    for path in rows:
        assert layout.styles[path].input_layouts == (Shard(-1),)
        assert layout.styles[path].output_layouts == (Replicate(),)
    assert not layout.summed
    assert not layout.cuts_batch


def test_one_split_takes_its_linkage_group_along() -> None:
    """q split by heads forces k, v and o: the paper's propagation decides, not the list of splits alone."""
    layout = _layout(BERT, {"block0.attention.q.weight": 0})
    kinds = {path: type(style) for path, style in layout.styles.items() if not isinstance(style, PrepareModuleInput)}
    assert kinds == {f"block0.attention.{n}": ColwiseParallel for n in "qkv"} | {"block0.attention.o": RowwiseParallel}


def test_embedding_and_head() -> None:
    rows = _layout(BERT, {"embedding.table.weight": 0}).styles["embedding.table"]
    assert isinstance(rows, RowwiseParallel)
    assert rows.input_layouts == rows.output_layouts == (Replicate(),)
    head = _layout(BERT, {"head.weight": 0}).styles["head"]
    assert isinstance(head, ColwiseParallel)
    assert head.output_layouts == (Replicate(),)  # the loss is taken of whole rows


def test_batch_over_columns_gathers_rows_before_split_weights_only() -> None:
    layout = layout_of(VGG.net(), VGG.graph(), executable_plans(VGG.graph(), 2, "any")["mixed"].stages[0])
    assert layout.styles.keys() == {"head.fc1", "head.fc2"}
    assert layout.styles["head.fc1"].input_layouts == (Shard(0),)
    assert layout.styles["head.fc2"].output_layouts == (Shard(0),)
    whole = ("stage0.convs.0", "stage1.convs.0", "head.predictions")
    assert layout.summed == {f"{path}.{kind}" for path in whole for kind in ("weight", "bias")}
    assert layout.cuts_batch
    assert layout.cuts_output


@pytest.mark.parametrize(
    ("workload", "name", "split"), [(VGG, "stage0.convs.0.weight", 0), (BERT, "block0.mlp_norm.weight", 0)]
)
def test_modules_without_a_style_are_named(workload: Workload, name: str, split: int) -> None:
    with pytest.raises(PlanError, match=name.rpartition(".")[0].replace(".", r"\.") + r"|needs communication"):
        _layout(workload, {name: split})


def _one_stage(graph: Graph, **changes: object) -> Plan:
    return replace(Plan(graph.digest, "any", (StagePlan(0, len(graph.ops) - 1, (0, 1), 2),)), **changes)  # type: ignore


def test_plans_that_cannot_be_run_are_refused_with_the_way_out() -> None:
    graph = BERT.graph()
    line = pipeline(graph, 2, "any", 2, "1f1b")
    check(line, graph)
    with pytest.raises(PlanError, match="is of graph"):
        check(_one_stage(graph, graph_digest="0" * 64), graph)
    with pytest.raises(PlanError, match="3 micro-batches need 2 or more stages"):
        check(_one_stage(graph, micro_batches=3), graph)
    with pytest.raises(PlanError, match=r"1F1B needs as many micro-batches as stages \(2\), got 1"):
        check(replace(line, micro_batches=1), graph)
    first, second = line.stages
    with pytest.raises(PlanError, match="different forms"):
        check(replace(line, stages=(replace(first, devices=(0, 1)), replace(second, devices=(2,)))), graph)
    with pytest.raises(PlanError, match=r"uses devices \[0, 2\]"):
        check(replace(line, stages=(first, replace(second, devices=(2,)))), graph)
    with pytest.raises(PlanError, match="FSDP2"):
        check(executable_plans(graph, 2, "any")["tp"], graph, "fsdp")


def test_a_cut_inside_a_block_is_refused_and_can_be_aligned() -> None:
    graph, net = BERT.graph(), BERT.net()
    plan = pipeline(graph, 2, "any", 2, "gpipe")
    first, second = plan.stages
    for shift in (-3, 4):
        end = first.last_op + shift
        moved = replace(plan, stages=(replace(first, last_op=end), replace(second, first_op=end + 1)))
        with pytest.raises(PlanError, match=r"inside block\d: move the cut"):
            children_of(graph, net, moved)
        assert aligned(graph, moved) == plan
    assert aligned(graph, plan) == plan


def test_columns_of_pipelined_stages_split_what_the_stage_holds() -> None:
    graph, net = BERT.graph(), BERT.net()
    plan = combined(graph, "any")["1f1b_tp"]
    for names, stage in zip(children_of(graph, net, plan), plan.stages, strict=True):
        styles = layout_of(net, graph, stage).styles
        assert styles
        assert {path.split(".")[0] for path in styles} <= set(names)
