"""A plan of one stage in Lightning: ModelParallelStrategy makes the mesh, `configure_model` applies the plan to it.

Rows are FSDP2's there, as is the strategy's own way: weights are divided among rows, not copied. Step for step
the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, PlanError
from lit_modules.execution.apply import Loss, Optimizer, parameter_groups
from lit_modules.execution.layouts import layout_of


def strategy_of(plan: Plan) -> ModelParallelStrategy:
    """Return Lightning's strategy for a plan's rows and columns.

    Raises:
        PlanError: a pipeline, which ModelParallelStrategy has no place for.
    """
    if len(plan.stages) > 1:
        raise PlanError(
            f"{len(plan.stages)} stages: Lightning's ModelParallelStrategy has rows and columns only; use `apply`"
        )
    stage = plan.stages[0]
    made = ModelParallelStrategy(
        data_parallel_size=stage.data, tensor_parallel_size=stage.ways, save_distributed_checkpoint=False
    )
    made.cluster_environment = LightningEnvironment()  # processes are started elsewhere, also under SLURM or torchrun
    return made


class PlannedModule(LightningModule):
    """Train a net under a plan. Batches come whole to every process; each row takes its own part.

    Args:
        net: named blocks, one tensor in and out, equal on all processes.
        graph, plan: the plan is of this graph of this net.
        loss: of outputs and targets, a mean over rows.
        optimizer: takes parameter groups.
    Raises:
        PlanError: a plan of another graph, a pipeline, or one that cuts the batch over columns.
    """

    def __init__(self, net: nn.Sequential, graph: Graph, plan: Plan, loss: Loss, optimizer: Optimizer) -> None:
        super().__init__()
        if plan.graph_digest != graph.digest or len(plan.stages) > 1:
            raise PlanError(f"this needs a plan of one stage of {graph.name}")
        self.layout = layout_of(net, graph, plan.stages[0])
        if self.layout.cuts_batch:
            raise PlanError(
                "a batch cut over columns: Lightning's strategy hands a batch to rows; cut it there (`data`)"
            )
        self.net, self.plan, self.loss, self.optimizer = net, plan, loss, optimizer

    def configure_model(self) -> None:
        """Apply the plan to the strategy's mesh; called again it does nothing."""
        if getattr(self, "_applied", False):
            return
        mesh: Any = self.device_mesh
        if self.layout.styles:
            parallelize_module(self.net, mesh["tensor_parallel"], self.layout.styles)
        if self.plan.stages[0].data > 1:
            for child in self.net.children():
                fully_shard(child, mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])
        self._applied = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of this row's part of a whole batch."""
        mesh: Any = self.device_mesh
        row = mesh.get_local_rank("data_parallel")
        x, y = (tensor.chunk(self.plan.stages[0].data)[row] for tensor in batch)
        return self.loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: Iterable[Any] = parameter_groups(self.net)
        return self.optimizer(groups)
