"""A net's weights divided among processes (FSDP2), and back: each process holds a part, and gathers a block when it needs it.

Legend: W processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lit_modules.nets.transformer import Transformer


def shard(net: Transformer, mesh: DeviceMesh) -> None:
    """Shard a net in place over a one-dimensional mesh: block by block, then embedding, last norm and head together.

    Names and dtypes of parameters stay; they become DTensors. Weights are gathered in float32 and autocast does the rest, so
    that routers stay in float32. Experts (N, F, D) are divided by expert or, where there are fewer than processes, by their
    second dimension. A net that is sharded already is left as it is.
    """
    if isinstance(net, FSDPModule):
        return
    world = mesh.size()

    def placement(parameter: torch.nn.Parameter) -> Shard | None:
        narrow = parameter.ndim == 3 and parameter.shape[0] < world
        return (
            Shard(1) if narrow and parameter.shape[1] % world == 0 else None
        )  # FSDP2 divides dimension 1 evenly or not

    for block in net.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=placement)
    fully_shard(net, mesh=mesh)


def whole(value: Any) -> Any:
    """Return a tensor as a plain one, gathered if it is sharded: all processes must ask. Anything else is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def divided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, divided as `other` is; the tensor itself if `other` is not.

    Every process holds the whole; nothing is sent.
    """
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or tensor.shape != other.shape:
        return tensor
    there = tensor.to(other.device)
    return distribute_tensor(there, other.device_mesh, other.placements, src_data_rank=None)
