"""What DTensor is said to send is what it sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

import pytest
from torch.distributed.tensor.debug import CommDebugMode

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan
from lit_modules.execution.apply import apply
from lit_modules.execution.launch import launch
from lit_modules.execution.messages import Message, messages_of, seconds_of
from lit_modules.execution.plans import executable_plans
from lit_modules.execution.verify import SGD
from lit_modules.execution.workloads import WORKLOADS, Workload
from tests.lit_modules.execution.test_plans import machine

KINDS = ("tp", "mixed", "tp_attention", "tp_mlp")
NAMES = ("mlp_tiny", "bert_tiny", "vgg_tiny")
OPS = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


def counted(workloads: Mapping[str, Workload], graphs: Mapping[str, Graph], plans: dict) -> dict:
    """In each rank: the functional collectives of one step under each plan."""
    found = {}
    for (name, kind), plan in plans.items():
        workload = workloads[name]
        applied = apply(plan, graphs[name], workload.net(), workload.loss, SGD)
        with CommDebugMode() as seen:
            applied.step(*workload.data())
        counts: Counter[str] = Counter()
        for op, count in seen.get_comm_counts().items():
            counts[OPS.get(str(op).rpartition(".")[2], str(op))] += count
        found[name, kind] = dict(counts)
    return found


def _plans() -> dict[tuple[str, str], Plan]:
    found = {name: executable_plans(WORKLOADS[name].graph(), 2, "any") for name in NAMES}
    return {(name, kind): plans[kind] for name, plans in found.items() for kind in KINDS if kind in plans}


@cache
def _counted() -> dict[tuple[str, str], dict[str, int]]:
    graphs = {name: WORKLOADS[name].graph() for name in NAMES}
    return launch(counted, 2, {name: WORKLOADS[name] for name in NAMES}, graphs, _plans())[0]


@pytest.mark.parametrize(("name", "kind"), _plans())
def test_a_step_sends_as_many_messages_of_each_kind(name: str, kind: str) -> None:
    plan, workload = _plans()[name, kind], WORKLOADS[name]
    said = Counter(m.kind for m in messages_of(workload.graph(), plan.stages[0], workload.net()))
    sent = {k: n for k, n in _counted()[name, kind].items() if k in OPS.values()}
    assert dict(said) == sent


def test_a_stage_without_columns_sends_nothing() -> None:
    workload = WORKLOADS["mlp_tiny"]
    stage = executable_plans(workload.graph(), 2, "any")["dp"].stages[0]
    assert messages_of(workload.graph(), stage, workload.net()) == []


def test_micro_batches_cut_messages() -> None:
    workload = WORKLOADS["bert_tiny"]
    stage = executable_plans(workload.graph(), 2, "any")["tp"].stages[0]
    whole, half = (messages_of(workload.graph(), stage, workload.net(), n) for n in (1, 2))
    assert [m.size_bytes for m in whole] == [2 * m.size_bytes for m in half]
    assert {m.size_bytes for m in whole} == {8 * 3 * 8 * 4.0}  # sequences, tokens, width, bytes


def test_more_bytes_take_no_less_time() -> None:
    stage = executable_plans(WORKLOADS["mlp_tiny"].graph(), 2, "any")["tp"].stages[0]
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        times = [seconds_of(Message(kind, size, False), stage, machine()) for size in (0.0, 1e3, 1e6)]
        assert times == sorted(times)
        assert times[0] < times[-1]
