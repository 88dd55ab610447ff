"""A graph written out from four blocks is the one that tracing as many blocks gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datamodules.planning.graph import Graph
from datamodules.planning.repeat import repeated
from datamodules.planning.trace import trace
from datamodules.planning.workloads import build_step


def traced(name: str, layers: int) -> Graph:
    return trace(lambda: build_step(name, layers=layers), name)


def shape_of(graph: Graph) -> tuple:
    """All but the names, of which only those of parameters and inputs mean anything."""
    named = {*(p.tensor for p in graph.parameters), *graph.inputs}
    tensors = tuple(replace(info, name=info.name if t in named else "") for t, info in enumerate(graph.tensors))
    ops = tuple(replace(op, name="") for op in graph.ops)
    return tensors, ops, graph.parameters, graph.inputs, graph.outputs, graph.buffers, graph.batch_dims


@pytest.mark.parametrize("name", ["bert-tiny", "gpt2-tiny"])
def test_blocks_written_out_are_those_that_tracing_finds(name: str) -> None:
    small = traced(name, 4)
    assert shape_of(repeated(small, 4)) == shape_of(small)
    for blocks in (5, 7, 12):
        assert shape_of(repeated(small, blocks)) == shape_of(traced(name, blocks))


def test_other_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="has not 4 blocks"):
        repeated(traced("bert-tiny", 3), 8)
    with pytest.raises(ValueError, match="not as 3"):
        repeated(traced("bert-tiny", 4), 3)
