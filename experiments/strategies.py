"""What conf/trainer asks for, as Lightning's Trainer takes it. None of it says what is computed.

Checkpoints are one file with whole tensors whatever the strategy, so that a run stopped under one goes on under another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from lit_modules.nets.sharding import divided_like, whole
from lit_modules.nets.transformer import Transformer


def processes(trainer: Mapping[str, Any]) -> int:
    """Return how many processes a cell takes under these settings: one per device."""
    devices = trainer["devices"]
    everything = torch.cuda.device_count() if trainer["accelerator"] != "cpu" else 1
    if devices in ("auto", "-1", -1):
        return max(1, everything)
    return int(devices)


def trainer_arguments(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer for these settings.

    Raises:
        ValueError: micro-batches that cannot be dealt evenly to the processes.
    """
    count, micro = processes(trainer), trainer.get("micro_batch")
    if micro is not None and micro % count:
        raise ValueError(f"a micro-batch of {micro} sequences cannot be dealt evenly to {count} processes")
    own = None if micro is None else micro // count
    arguments = {name: trainer[name] for name in ("accelerator", "num_nodes")} | {"devices": count}
    if count > 1:
        # Lightning's own environment: processes are started by experiments.ranks, also under SLURM or torchrun
        kind: Any = FullySharded if trainer["strategy"] == "fsdp" else Replicated
        return arguments | {"strategy": kind(own, count)}
    if own is None:
        return arguments | {"devices": trainer["devices"], "strategy": "auto"}
    return arguments | {"strategy": Alone(own, "cpu" if trainer["accelerator"] == "cpu" else "cuda:0")}


def compile_blocks(net: torch.nn.Module) -> None:
    """Have every block of a transformer compiled when it is first called; names of weights stay. Other nets are left alone."""
    for block in net.blocks if isinstance(net, Transformer) else ():
        block.compile()


class MicroBatches(Strategy):
    """Take a batch in parts one after the other, whose gradients add up to that of their mean weighted by size.

    Lightning's own accumulation wants a loader of parts, and counts them as batches. Here a batch stays one: one call of the
    module's hooks, one step of the optimiser, one place in the order of the data.

    Attributes:
        own: samples of a part in this process; None for whole batches.
    """

    own: int | None = None
    _left: Sequence[tuple[tuple[Tensor, ...], int, float]] = ()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Any:
        """Return the first part's share of the loss; `backward` sees to the other parts."""
        whole_size = len(batch[0])
        parts = list(zip(*(tensor.split(self.own or whole_size) for tensor in batch), strict=True))
        if len(parts) == 1:
            return super().training_step(batch, batch_idx)
        first, *rest = ((part, batch_idx, len(part[0]) / whole_size) for part in parts)
        self._left = rest
        return self._share(first)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Add up the gradients of all parts of the batch; return the first part's share of the loss."""
        left, self._left = self._left, ()
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        module: Any = self.lightning_module
        within, module._current_fx_name = module._current_fx_name, "training_step"  # what is logged is logged by a step
        for part in left:
            super().backward(self._share(part), optimizer, *args, **kwargs)
        module._current_fx_name = within
        return loss

    def _share(self, part: tuple[tuple[Tensor, ...], int, float]) -> Any:
        batch, batch_idx, weight = part
        loss: Any = super().training_step(batch, batch_idx)
        return loss * weight


class Alone(MicroBatches, SingleDeviceStrategy):
    """One process, batches in parts."""

    def __init__(self, own: int | None, device: str) -> None:
        super().__init__(device=device)
        self.own = own


class Replicated(MicroBatches, DDPStrategy):
    """Every process holds all weights and sees other data."""

    def __init__(self, own: int | None, count: int) -> None:
        super().__init__(cluster_environment=LightningEnvironment())
        self.own = own


class FullySharded(MicroBatches, ModelParallelStrategy):
    """FSDP2 on one axis: weights, gradients and optimiser state are divided among processes, which all see other data.

    The module shards itself in `configure_model`. Lightning's own single-file checkpoints number optimiser states by the
    order of the parameters in the module, all others by that in the optimiser's groups: here too, so that they can be read by
    any strategy and come from any.
    """

    def __init__(self, own: int | None, count: int) -> None:
        super().__init__(data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.own, self.cluster_environment = own, LightningEnvironment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return whole weights on the first process, and nothing on the others."""
        assert self.lightning_module is not None
        return gathered(self.lightning_module.state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return whole optimiser states on the first process, and nothing on the others."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        whole_state = {index: gathered(each, self.is_global_zero) for index, each in state["state"].items()}
        return {**state, "state": whole_state} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint in every process; processes of one machine share its pages."""
        path = Path(self.broadcast(checkpoint_path))
        return torch.load(path, map_location="cpu", mmap=True, weights_only=bool(weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        divided = {
            name: divided_like(value, own[name]) for name, value in checkpoint["state_dict"].items() if name in own
        }
        self.lightning_module.load_state_dict({**checkpoint["state_dict"], **divided}, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            indices = [index for group in state["param_groups"] for index in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            own = dict(zip(indices, parameters, strict=True))
            divided = {
                index: {name: _divided(value, own[index]) for name, value in each.items()}
                for index, each in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": divided})


def gathered(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Return whole tensors on the CPU, one after the other; where they are not kept, {} (but all processes must ask)."""
    kept = {}
    for name, value in tensors.items():
        value = whole(value)
        if keep:
            kept[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return kept


def _divided(value: Any, parameter: Tensor) -> Any:
    return divided_like(value, parameter) if isinstance(value, Tensor) else value
