"""Is a step under a plan the step of one process? Loss, gradients and new weights, of every kind of plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan
from lit_modules.execution.apply import Optimizer, Rows, apply
from lit_modules.execution.launch import launch
from lit_modules.execution.workloads import Workload

STEPS = 2  # the second sees what the first did to weights and momentum
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False)


@dataclass(frozen=True)
class Taken:
    """What a few steps came to: the loss of each, the last gradients, the new weights."""

    losses: tuple[float, ...]
    gradients: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One plan to check."""

    name: str
    workload: Workload
    plan: Plan
    rows: Rows = "ddp"


def alone(workload: Workload, optimizer: Optimizer = SGD, dtype: torch.dtype = torch.float64) -> Taken:
    """Take the steps in this process, without any plan."""
    net = workload.net(dtype=dtype)
    chosen, losses = optimizer(net.parameters()), []
    for step in range(STEPS):
        x, y = workload.data(step, dtype)
        chosen.zero_grad(set_to_none=True)
        loss = workload.loss(net(x), y)
        loss.backward()
        chosen.step()
        losses.append(loss.item())
    named = dict(net.named_parameters())
    return Taken(
        tuple(losses),
        {n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None},
        {n: p.detach().clone() for n, p in named.items()},
    )


def together(cases: Sequence[Case], dtype: torch.dtype = torch.float64) -> list[Taken]:
    """Take the steps under each plan, on as many ranks as the plans have devices.

    Raises:
        RanksFailed: a plan could not be set up or run.
        ValueError: plans for different numbers of ranks.
    """
    ranks = {sum(len(stage.devices) for stage in case.plan.stages) for case in cases}
    if len(ranks) != 1:
        raise ValueError(f"plans for {sorted(ranks)} ranks cannot be checked at once")
    graphs = {case.workload: case.workload.graph() for case in cases}
    answers = launch(_steps, ranks.pop(), list(cases), graphs, dtype)
    found = []
    for of_case in zip(*answers, strict=True):
        first = of_case[0]
        gradients = {name: g for taken in of_case for name, g in taken.gradients.items()}
        weights = {name: w for taken in of_case for name, w in taken.weights.items()}
        found.append(Taken(first.losses, gradients, weights))
    return found


def distance(one: Taken, other: Taken) -> float:
    """Return the largest difference of a loss, a gradient or a weight, relative to the largest number in that tensor.

    Gradients that are zero but for rounding (of a bias that softmax cancels) are compared with the largest gradient of all.
    Infinite where one lacks a tensor or a number is not finite.
    """
    if one.gradients.keys() != other.gradients.keys() or one.weights.keys() != other.weights.keys():
        return float("inf")
    apart = [abs(a - b) / max(abs(a), 1e-300) for a, b in zip(one.losses, other.losses, strict=True)]
    for mine, theirs in ((one.gradients, other.gradients), (one.weights, other.weights)):
        largest = max(float(t.abs().max()) for t in mine.values())
        for name, a in mine.items():
            scale = max(float(a.abs().max()), 1e-3 * largest)
            apart.append(float((a - theirs[name]).abs().max()) / scale)
    return max(apart) if all(map(math.isfinite, apart)) else float("inf")  # max alone would pass over a NaN


def largest_error(cases: Sequence[Case], dtype: torch.dtype = torch.float64) -> float:
    """Return the largest `distance` of any case from the single-process step."""
    references: dict[Workload, Taken] = {}
    worst = 0.0
    for case, taken in zip(cases, together(cases, dtype), strict=True):
        if case.workload not in references:
            references[case.workload] = alone(case.workload, dtype=dtype)
        worst = max(worst, distance(references[case.workload], taken))
    return worst


def _steps(cases: Sequence[Case], graphs: Mapping[Workload, Graph], dtype: torch.dtype) -> list[Taken]:
    return [_under_plan(case, graphs[case.workload], dtype) for case in cases]


def _under_plan(case: Case, graph: Graph, dtype: torch.dtype) -> Taken:
    workload = case.workload
    applied = apply(case.plan, graph, workload.net(dtype=dtype), workload.loss, SGD, case.rows)
    losses = tuple(applied.mean_loss(applied.step(*workload.data(step, dtype))) for step in range(STEPS))
    return Taken(losses, applied.gradients(), applied.weights())
