"""A plan set up on the ranks of a process group by torch's own engines: DTensor styles for the columns of a stage's mesh, DDP
(or FSDP2) for its rows, PipelineStage with GPipe or 1F1B for its stages.

Rank r is the plan's device r. The mesh has four dims: stages, rows, one, columns; "one" is what FSDP2 is told to shard over
where rows merely replicate a net whose columns are DTensors already, or which is a stage of several: DDP has no public way for
the former, and torch's pipelines failed on it in the latter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, PlanError, StagePlan
from lit_modules.execution.launch import device
from lit_modules.execution.layouts import Layout, layout_of

Optimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]
Rows = Literal["ddp", "fsdp"]
DIMS = ("stage", "row", "one", "column")


@dataclass
class Applied:
    """A rank's share of a plan, ready to take steps.

    Attributes:
        part: this rank's modules, under their names in the whole net, without wrappers.
        runs: what is called: `part`, or DDP round it, or a schedule of a pipeline.
    """

    plan: Plan
    mesh: DeviceMesh
    stage: int
    layout: Layout
    part: nn.Module
    runs: Any
    optimizer: torch.optim.Optimizer
    loss: Loss

    @property
    def is_last(self) -> bool:
        """Whether this rank knows the loss."""
        return self.stage == len(self.plan.stages) - 1

    def step(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Take one step on the whole batch, of which this rank takes its share.

        Returns:
            the mean loss of this rank's rows, detached; None where the loss is in another stage.
        """
        self.optimizer.zero_grad(set_to_none=True)
        x, y = self._own_rows(x), self._own_rows(y)
        found = self._once(x, y) if len(self.plan.stages) == 1 else self._through(x, y)
        self.optimizer.step()
        return found

    def mean_loss(self, loss: Tensor | None) -> float:
        """Return the mean over all rows of the batch, on every rank. A collective."""
        share = torch.zeros(2, dtype=torch.float64, device=device())
        if loss is not None:
            share += torch.tensor([float(loss), 1.0], dtype=torch.float64, device=device())
        dist.all_reduce(share)
        return float(share[0] / share[1])

    def gradients(self) -> dict[str, Tensor]:
        """Return this stage's gradients, whole, by name. A collective."""
        return {name: _whole(p.grad) for name, p in self.part.named_parameters() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """Return this stage's weights, whole, by name. A collective."""
        return {name: _whole(p) for name, p in self.part.named_parameters()}

    def _own_rows(self, tensor: Tensor) -> Tensor:
        stage = self.plan.stages[self.stage]
        rows = tensor.chunk(stage.data)[self.mesh.get_local_rank("row")]
        return rows.to(device())

    def _once(self, x: Tensor, y: Tensor) -> Tensor:
        ways, column = self.plan.stages[0].ways, self.mesh.get_local_rank("column")
        if self.layout.cuts_batch:
            x = x.chunk(ways)[column]
        if self.layout.cuts_output:
            y = y.chunk(ways)[column]
        loss = self.loss(self.runs(x), y)
        # Between columns gradients are added, not averaged, so the loss is the share in the mean over all rows.
        (loss / ways if self.layout.cuts_output else loss).backward()
        return loss.detach()

    def _through(self, x: Tensor, y: Tensor) -> Tensor | None:
        if self.stage == 0:
            self.runs.step(x)
        elif not self.is_last:
            self.runs.step()
        else:
            losses: list[Tensor] = []
            self.runs.step(target=y, losses=losses)
            return torch.stack([loss.detach() for loss in losses]).mean()
        return None


def apply(
    plan: Plan, graph: Graph, net: nn.Sequential, loss: Loss, optimizer: Optimizer, rows: Rows = "ddp"
) -> Applied:
    """Set a plan up. Every rank calls this, in the same order of plans, with the same net; each keeps its part of it.

    Args:
        net: named blocks, one tensor in and out, whole and equal on all ranks; its modules are used, not copied.
        loss: of outputs and targets, a mean over rows.
        optimizer: takes parameter groups. Plain tensors and DTensors come in separate groups.
        rows: "ddp", or "fsdp" to divide weights among the rows.
    Raises:
        PlanError: a plan of another graph, for another number of ranks, or one that torch's engines cannot express.
    """
    check(plan, graph, rows)
    shape = (len(plan.stages), plan.stages[0].data, 1, plan.stages[0].ways)
    devices = torch.tensor([stage.devices for stage in plan.stages]).view(shape)
    mesh = DeviceMesh(device().type, devices, mesh_dim_names=DIMS)
    at = mesh.get_local_rank("stage")
    stage = plan.stages[at]
    layout = layout_of(net, graph, stage)
    if layout.summed and stage.data > 1:
        raise PlanError("a batch that is cut over rows and over columns: cut it over rows alone, or give one row")
    if layout.cuts_batch and len(plan.stages) > 1:
        raise PlanError("stages that cut the batch over columns: cut it over rows (`data`) instead")
    part = take(net, children_of(graph, net, plan)[at]).to(device())
    if layout.styles:
        parallelize_module(part, mesh["column"], layout.styles)
    runs: Any = _rows(part, mesh, len(plan.stages), stage, layout, rows)
    if len(plan.stages) > 1:
        runs = _pipeline(runs, mesh, at, plan, loss)
    return Applied(plan, mesh, at, layout, part, runs, optimizer(parameter_groups(part)), loss)


def check(plan: Plan, graph: Graph, rows: Rows = "ddp") -> None:
    """Refuse plans that cannot be run: PlanError with the way out."""
    if plan.graph_digest != graph.digest:
        raise PlanError(f"the plan is of graph {plan.graph_digest[:12]}, not of {graph.name} ({graph.digest[:12]})")
    ranks = dist.get_world_size() if dist.is_initialized() else sum(len(s.devices) for s in plan.stages)
    used = sorted(device for stage in plan.stages for device in stage.devices)
    if used != list(range(ranks)):
        raise PlanError(
            f"the plan uses devices {used}; {ranks} ranks run it, and each must have work: 0 to {ranks - 1}"
        )
    forms = {(stage.data, stage.ways) for stage in plan.stages}
    if len(forms) > 1:
        raise PlanError(
            f"stages of different forms (rows, columns) {sorted(forms)}: torch's pipelines pair ranks one to one, so give each "
            "stage as many rows and columns"
        )
    if len(plan.stages) == 1 and plan.micro_batches > 1:
        raise PlanError(f"{plan.micro_batches} micro-batches need 2 or more stages")
    if len(plan.stages) > 1 and plan.schedule == "1f1b" and plan.micro_batches < len(plan.stages):
        raise PlanError(f"1F1B needs as many micro-batches as stages ({len(plan.stages)}), got {plan.micro_batches}")
    if rows == "fsdp" and forms != {(len(plan.stages[0].devices), 1)}:
        raise PlanError("FSDP2 divides weights among rows: give a plan without columns")


def children_of(graph: Graph, net: nn.Sequential, plan: Plan) -> list[tuple[str, ...]]:
    """Return the names of the net's children that each stage holds.

    Raises:
        PlanError: a cut inside a child, or a stage without one.
    """
    stage_of: dict[str, int] = {}
    for s, stage in enumerate(plan.stages):
        for i in range(stage.first_op, min(stage.last_op + 1, len(graph.ops))):
            op = graph.ops[i]
            if op.phase != "forward" or not op.layer:
                continue
            child = op.layer.split(".")[0]
            if stage_of.setdefault(child, s) != s:
                raise PlanError(
                    f"stage {s} begins at operation {stage.first_op}, inside {child}: move the cut to where a child of the net "
                    "ends (`plans.aligned` does)"
                )
    found = [
        tuple(name for name, _ in net.named_children() if stage_of.get(name) == s) for s in range(len(plan.stages))
    ]
    if not all(found):
        raise PlanError(f"a stage without a child of the net: {found}")
    return found


def take(net: nn.Sequential, names: Sequence[str]) -> nn.Sequential:
    """Return some children of a net as a net, under their names."""
    modules = dict(net.named_children())
    return nn.Sequential(OrderedDict((name, modules[name]) for name in names))


def _rows(part: nn.Module, mesh: DeviceMesh, stages: int, stage: StagePlan, layout: Layout, rows: Rows) -> nn.Module:
    """Gradients of a stage's rows, or of columns that see other rows of the batch."""
    if stage.data == 1:
        return _summed(part, mesh, layout) if layout.summed else part
    if rows == "ddp" and stage.ways == stages == 1:
        return DistributedDataParallel(part, process_group=mesh.get_group("row"))
    # One rank to shard over is no sharding: rows keep whole copies, and gradients are averaged as DDP would do it.
    over = mesh["row"] if rows == "fsdp" else mesh["row", "one"]
    for child in part.children():
        fully_shard(child, mesh=over)
    fully_shard(part, mesh=over)
    return part


def _summed(part: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """DDP over columns for the weights that are whole, with sums in the place of means."""
    group = mesh.get_group("column")
    left_out = [name for name, _ in part.named_parameters() if name not in layout.summed]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(part, left_out)
    wrapped = DistributedDataParallel(part, process_group=group)
    wrapped.register_comm_hook(group, _add)
    return wrapped


def _add(group, bucket):  # DDP refuses annotations that are text, as all in this file are
    """Sum a bucket of gradients over a group; DDP itself would take the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _pipeline(runs: nn.Module, mesh: DeviceMesh, at: int, plan: Plan, loss: Loss) -> Any:
    stage = PipelineStage(runs, at, len(plan.stages), device(), group=mesh.get_group("stage"))
    kind = ScheduleGPipe if plan.schedule == "gpipe" else Schedule1F1B
    return kind(stage, n_microbatches=plan.micro_batches, loss_fn=loss)


def parameter_groups(part: nn.Module) -> list[dict[str, Any]]:
    """Return plain parameters and DTensors apart: fused optimisers take tensors of one kind at once."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in part.parameters():
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return [{"params": parameters} for parameters in kinds.values()]


def _whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone().cpu()
