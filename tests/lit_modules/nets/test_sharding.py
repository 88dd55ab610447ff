"""What is divided, and how: the layout that each parameter gets, without other processes; the numbers are tested with some."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_modules.nets.moe import Experts
from lit_modules.nets.sharding import divided_like, shard, whole
from lit_modules.nets.transformer import Transformer

WORLD = 4


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    """Four processes of which there is only one: nothing is sent."""
    dist.init_process_group("fake", rank=1, world_size=WORLD, store=FakeStore())
    yield init_device_mesh("cpu", (WORLD,))
    dist.destroy_process_group()


def _net(experts: Experts | None) -> Transformer:
    torch.manual_seed(0)
    return Transformer(12, 8, 2, 2, 16, experts=experts)


@pytest.mark.parametrize(("expansion", "dim"), [(8, 0), (4, 0), (2, 1)])
def test_experts_are_divided_by_expert_where_there_are_enough(expansion: int, dim: int, mesh: dist.DeviceMesh) -> None:
    net = _net(Experts(expansion, output="learnable"))
    before = {name: (p.shape, p.dtype) for name, p in net.named_parameters()}
    shard(net, mesh)
    assert {name: (p.shape, p.dtype) for name, p in net.named_parameters()} == before
    for name, parameter in net.named_parameters():
        assert isinstance(parameter, DTensor), name
        three = parameter.ndim == 3
        assert parameter.placements == (Shard(dim if three else 0),), name
        if three:
            assert parameter.to_local().numel() * WORLD == parameter.numel()


def test_each_block_is_gathered_for_itself(mesh: dist.DeviceMesh) -> None:
    net = _net(Experts(8))
    shard(net, mesh)
    assert isinstance(net, FSDPModule)
    assert all(isinstance(block, FSDPModule) for block in net.blocks)
    divided = list(net.parameters())
    shard(net, mesh)  # as at the start of a test that follows training
    assert all(a is b for a, b in zip(divided, net.parameters(), strict=True))


def test_a_part_of_a_whole_tensor_is_this_processs(mesh: dist.DeviceMesh) -> None:
    net = _net(None)
    shard(net, mesh)
    like = net.blocks[0].mlp.up.weight  # (16, 8), four rows on each process
    tensor = torch.arange(128.0).view(16, 8)
    part = divided_like(tensor, like)
    assert isinstance(part, DTensor)
    assert torch.equal(part.to_local(), tensor[4:8])  # of the second process
    assert divided_like(part, like) is part
    scalar = torch.tensor(3.0)  # an optimiser's step
    assert divided_like(scalar, like) is scalar
    assert divided_like(tensor, tensor) is tensor


def test_what_is_whole_stays_so(mesh: dist.DeviceMesh) -> None:
    tensor = torch.ones(3)
    assert whole(tensor) is tensor
    assert whole(7) == 7
    replicated = DTensor.from_local(tensor, mesh, [Replicate()])
    assert torch.equal(whole(replicated), tensor)
