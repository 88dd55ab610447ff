"""Lightning's ModelParallelStrategy under a plan trains as one process does."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, PlanError
from lit_modules.execution.launch import launch
from lit_modules.execution.module import PlannedModule, strategy_of
from lit_modules.execution.plans import executable_plans
from lit_modules.execution.verify import SGD
from lit_modules.execution.workloads import WORKLOADS, Workload
from lit_modules.nets.sharding import whole

BERT = WORKLOADS["bert_tiny"]
SPLITS = {name: plan for name, plan in executable_plans(BERT.graph(), 2, "any").items() if name in ("dp", "tp")}


def _module(workload: Workload, graph: Graph, plan: Plan) -> PlannedModule:
    return PlannedModule(workload.net(dtype=torch.float64), graph, plan, workload.loss, SGD)


def trained(workload: Workload, graph: Graph, plan: Plan) -> dict[str, torch.Tensor]:
    """In each rank: two steps on two batches, as Lightning takes them."""
    place = {"LOCAL_RANK": dist.get_rank(), "NODE_RANK": 0, "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({name: str(value) for name, value in (place | {"MASTER_ADDR": "127.0.0.1"}).items()})
    batches = [workload.data(step, torch.float64) for step in range(2)]
    loader: Any = DataLoader(TensorDataset(*map(torch.cat, zip(*batches, strict=True))), batch_size=workload.batch)
    module = _module(workload, graph, plan)
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy_of(plan),
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return {name: whole(p).detach().clone() for name, p in module.net.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tp", "dp"])
def test_lightning_trains_under_a_plan_as_one_process_does(kind: str) -> None:
    net = BERT.net(dtype=torch.float64)
    optimizer = SGD(net.parameters())
    for step in range(2):
        x, y = BERT.data(step, torch.float64)
        optimizer.zero_grad()
        BERT.loss(net(x), y).backward()
        optimizer.step()
    found = launch(partial(trained, BERT), 2, BERT.graph(), SPLITS[kind])
    for weights in found:
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-10, atol=1e-12)


def test_plans_without_a_place_in_lightning_are_refused() -> None:
    plans = executable_plans(BERT.graph(), 2, "any")
    with pytest.raises(PlanError, match="2 stages"):
        strategy_of(plans["gpipe_2"])
    with pytest.raises(PlanError, match="one stage"):
        _module(BERT, BERT.graph(), plans["gpipe_2"])
    with pytest.raises(PlanError, match="cut over columns"):
        _module(BERT, BERT.graph(), plans["mixed"])
