"""What single splits take along, by shared waves, is what propagating each of them from the root finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from datamodules.planning import waves
from datamodules.planning.graph import Graph
from datamodules.planning.placement import spread
from datamodules.planning.propagate import propagate, propagator_of
from datamodules.planning.repeat import repeated
from datamodules.planning.trace import trace
from datamodules.planning.workloads import build_step
from tests.datamodules.planning.hand_graphs import perceptron

DEVICES = 4


def alone(graph: Graph, tensor: int, split: int) -> tuple[tuple[int, int], ...]:
    """The same by one propagation from the root."""
    found = propagate(graph, DEVICES, {tensor: split})
    if isinstance(found, Mapping):
        return ((tensor, split), *sorted((t, s) for t, s in found.items() if s >= 0 and t != tensor))
    gradient = {p.tensor: p.gradient for p in graph.parameters}.get(tensor)
    return ((tensor, split), *(() if gradient is None else ((gradient, split),)))


def splits_of(graph: Graph) -> list[tuple[int, int]]:
    seeds = [*(p.tensor for p in graph.parameters), *graph.inputs]
    return [(t, d) for t in seeds for d, size in enumerate(graph.tensors[t].shape) if size % DEVICES == 0]


@pytest.mark.parametrize("name", ["bert-tiny", "t5-tiny-paper", "gpt2-tiny", "vgg19-tiny"])
@pytest.mark.parametrize(("far", "near"), [(2048, 256), (60, 8), (12, 2)])
def test_waves_change_no_spread(name: str, far: int, near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(lambda: build_step(name, **({} if "vgg" in name else {"layers": 3})), name)
    monkeypatch.setattr(waves, "FAR", far)
    monkeypatch.setattr(waves, "NEAR", near)
    found = waves.Waves(propagator_of(graph, DEVICES))
    root = found._levels[0].domains.copy()
    for tensor, split in splits_of(graph):
        assert found.spread(tensor, split) == alone(graph, tensor, split)
    assert (found._levels[0].domains == root).all()  # every walk is taken back
    assert far > 60 or "tiny" not in name or "vgg" in name or len(found._levels) > 1


def test_what_a_spread_costs_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    small, walk = trace(lambda: build_step("bert-tiny", layers=4), "bert"), waves.Waves._walk
    lengths: list[int] = []

    def counted(self: waves.Waves, *seed: Any) -> Any:
        ended, log = walk(self, *seed)
        lengths.append(len(log))
        return ended, log

    monkeypatch.setattr(waves.Waves, "_walk", counted)
    each = []
    for blocks in (60, 120):
        graph = repeated(small, blocks)
        found, seeds = waves.Waves(propagator_of(graph, DEVICES)), splits_of(graph)
        lengths.clear()
        for tensor, split in seeds:
            found.spread(tensor, split)
        wide = sum(length > len(graph.tensors) / 2 for length in lengths)
        each.append((len(found._levels), wide, round(sum(lengths) / len(seeds), -1)))
    assert each[0] == each[1]
    assert each[0][1] < 10


def test_what_contradicts_itself_is_split_alone_with_its_gradient() -> None:
    graph = perceptron(batch=8, widths=(8, 32, 8))
    for parameter in graph.parameters:
        for split in (0, 1):
            assert spread(graph, DEVICES, parameter.tensor, split) == alone(graph, parameter.tensor, split)
    tiny = trace(lambda: build_step("bert-tiny"), "bert-tiny")
    norm = next(p for p in tiny.parameters if p.name.endswith("norm.weight"))
    assert spread(tiny, DEVICES, norm.tensor, 0) == ((norm.tensor, 0), (norm.gradient, 0))
