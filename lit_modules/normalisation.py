"""Restricted normalisation of a whole net while it trains, and a monitor of the weights that ever win.

Legend: N samples, K inputs and M outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_modules.nets.layers import TropicalLinear
from lit_modules.ops.restricted import require_finite, restricted_weight, tighter
from lit_modules.ops.tropical import tropical_matmul

Which = Literal["min", "max", "both"]
Hearer = Callable[[str, Tensor, Tensor], None]


def tropical_layers(net: nn.Module, which: Which = "both") -> dict[str, TropicalLinear]:
    """Return the net's min-plus ("min"), max-plus ("max") or all tropical linear layers by name, front to back.

    Tropical convolutions are none of them: they are never normalised, nor are their weights watched.

    Raises:
        ValueError: another word for `which`.
    """
    if which not in ("min", "max", "both"):
        raise ValueError(f"which must be min, max or both, got {which!r}")
    found = {name: module for name, module in net.named_modules() if isinstance(module, TropicalLinear)}
    return {name: layer for name, layer in found.items() if which in ("both", layer.kind)}


@contextmanager
def _listening(layers: dict[str, TropicalLinear], hear: Hearer) -> Iterator[None]:
    """Hand each layer's own input (N, K) and output before bias (N, M) to `hear` whenever it runs."""

    def hook(name: str, layer: TropicalLinear) -> Callable[..., None]:
        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            f_NK = inputs[0].detach().reshape(-1, layer.in_features)
            # output - bias would not give the product back: it rounds
            g_NM = output if layer.bias is None else tropical_matmul(f_NK, layer.weight, kind=layer.kind)
            hear(name, f_NK, g_NM.reshape(-1, layer.out_features))

        return after

    handles = [layer.register_forward_hook(hook(name, layer)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def normalised_weights(net: nn.Module, samples: Iterable[Tensor], which: Which = "both") -> dict[str, Tensor]:
    """Return the restricted normal form (M, K) of each tropical linear layer on all samples together.

    A layer's outputs on the samples do not move, so neither do the next layer's inputs: one pass over the samples serves
    all layers, and only one batch of them is in memory at a time. A layer that runs twice keeps its outputs at both places.

    Args:
        net: any module; run in evaluation mode, its state does not change.
        samples: batches of the net's input, an iterator is enough; or one batch.
        which: "min", "max" or "both".
    Returns:
        W' by layer name: never above W for a min-plus layer, never below it for a max-plus layer.
    Raises:
        ValueError, TypeError: no samples, samples the net does not take, weights or values that are not finite, a layer
            without inputs, two layers that share a weight, no such layer: naming the layer and the value.
    """
    layers = tropical_layers(net, which)
    _check_layers(layers, which)
    found: dict[str, Tensor] = {}

    def join(name: str, f_NK: Tensor, g_NM: Tensor) -> None:
        kind = layers[name].kind
        try:
            new_MK = restricted_weight(f_NK, g_NM, kind)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        found[name] = tighter(found[name], new_MK, kind) if name in found else new_MK

    _run(net, samples, layers, join)
    # Only rounding can carry a normal form past the weight it came from.
    bound: dict[str, Callable[..., Tensor]] = {"min": torch.minimum, "max": torch.maximum}
    return {name: bound[layers[name].kind](w_MK, layers[name].weight) for name, w_MK in found.items()}


@torch.no_grad()
def normalise_(net: nn.Module, samples: Iterable[Tensor], which: Which = "both", share: float = 1.0) -> float:
    """Move the tropical weights to their restricted normal form, W := (1 - share) * W + share * W', in place.

    Args:
        net, samples, which: as `normalised_weights`.
        share: how far to go, in (0, 1]. Outputs on the samples stay what they are for every share.
    Returns:
        The mean absolute change of the weights.
    Raises:
        ValueError, TypeError: as `normalised_weights`, or a share outside (0, 1]. Nothing is changed then.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    layers = tropical_layers(net, which)
    moved, count = 0.0, 0
    for name, target_MK in normalised_weights(net, samples, which).items():
        weight = layers[name].weight
        change_MK = share * (target_MK - weight)
        weight.copy_(target_MK if share == 1 else weight + change_MK)
        moved, count = moved + change_MK.abs().sum().item(), count + weight.numel()
    return moved / count


@torch.no_grad()
def layer_inputs(net: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Return what each tropical linear layer is given (N, K) when the net runs on these samples.

    Raises:
        ValueError, TypeError: as `normalised_weights`.
    """
    found: dict[str, Tensor] = {}
    _run(net, samples, tropical_layers(net), lambda name, f_NK, _: found.update({name: f_NK.clone()}))
    return found


def winning_shares(net: nn.Module, samples: Iterable[Tensor]) -> dict[str, float]:
    """Return, per tropical linear layer, the share of its weights that win for at least one sample (first index at ties).

    The gradient of the sum of a layer's outputs with respect to a weight is the number of samples for which it wins.

    Args:
        net, samples: as `normalised_weights`; a net without such layers gives an empty dictionary.
    Raises:
        ValueError, TypeError: no samples, or samples the net does not take.
    """
    layers = tropical_layers(net)
    if not layers:
        return {}
    wins = {name: torch.zeros_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}

    def mark(name: str, f_NK: Tensor, _: Tensor) -> None:
        w_MK = layers[name].weight.detach().requires_grad_()
        with torch.enable_grad():
            total = tropical_matmul(f_NK, w_MK, kind=layers[name].kind, ties="first").sum()
        wins[name] |= torch.autograd.grad(total, w_MK)[0] > 0

    _run(net, samples, layers, mark)
    return {name: won.double().mean().item() for name, won in wins.items()}


def _check_layers(layers: dict[str, TropicalLinear], which: str) -> None:
    if not layers:
        raise ValueError(f"the net has no tropical linear layer to normalise (which={which!r})")
    owner: dict[int, str] = {}
    for name, layer in layers.items():
        if not layer.weight.numel():
            raise ValueError(f"layer {name!r} has a weight of shape {tuple(layer.weight.shape)}: nothing to normalise")
        require_finite(layer.weight, f"layer {name!r} weight")
        first = owner.setdefault(id(layer.weight), name)
        if first != name:
            raise ValueError(f"layers {first!r} and {name!r} share one weight, which has no normal form for both")


@torch.no_grad()
def _run(net: nn.Module, samples: Iterable[Tensor], layers: dict[str, TropicalLinear], hear: Hearer) -> None:
    """Run the net in evaluation mode on every batch, each layer heard; the modes of its modules are put back."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    seen = 0
    try:
        with _listening(layers, hear):
            for batch in [samples] if isinstance(samples, Tensor) else samples:
                if not isinstance(batch, Tensor) or not batch.ndim:
                    raise TypeError(f"samples must be batches of the net's input, tensors (B, ...); got {batch!r:.80}")
                if len(batch):
                    _call(net, batch)
                seen += len(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    if not seen:
        raise ValueError("at least one sample is needed, got 0")


def _call(net: nn.Module, batch: Tensor) -> None:
    try:
        net(batch)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # out of memory, say, is no fault of the samples
            raise
        raise ValueError(f"the net does not take samples of shape {tuple(batch.shape)}: {error}") from error


@dataclass(frozen=True)
class Normalisation:
    """When and how the restricted normalisation is done.

    Args:
        schedule: "off", "init" (once, before the first step), "steps" (before the first step and after every `every`) or
            "epoch" (before each epoch).
        every: steps between two, for "steps".
        samples: size of D, drawn from the training data anew each time; None for all training data.
        share: how far to go towards the normal form, in (0, 1].
        which: "min", "max" or "both".
        reset_moments: forget the optimiser's state of the weights that were moved.
    Raises:
        ValueError: an impossible value, named.
    Source: arXiv 2102.06358 has such an algorithm; its schedule is unknown, so all of this is an axis.
    """

    schedule: Literal["off", "init", "steps", "epoch"] = "off"
    every: int = 100
    samples: int | None = 2000
    share: float = 1.0
    which: Which = "both"
    reset_moments: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in ("off", "init", "steps", "epoch"):
            raise ValueError(f"schedule must be off, init, steps or epoch, got {self.schedule!r}")
        if self.which not in ("min", "max", "both"):
            raise ValueError(f"which must be min, max or both, got {self.which!r}")
        for name, value in (("every", self.every), ("samples", 1 if self.samples is None else self.samples)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")


class RestrictedNormalisation(Callback):
    """Normalise the module's `net` during training by a schedule; D comes from the datamodule's `sample_inputs(n, key)`.

    The key is the optimiser's step, so that a run that is cut and goes on draws what an uninterrupted one would. Logs
    `normalisation/change`, the mean absolute change of the weights moved.
    """

    def __init__(self, how: Normalisation) -> None:
        self.how = how
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self.how.schedule in ("init", "steps") and trainer.global_step == 0:
            self._normalise(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped = trainer.global_step != self._step  # a batch whose gradient is only accumulated is no step
        self._step = trainer.global_step
        if self.how.schedule == "steps" and stepped and trainer.global_step % self.how.every == 0:
            self._normalise(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # At an epoch's start, so that the weights that were validated are those that are kept.
        if self.how.schedule == "epoch":
            self._normalise(trainer, pl_module)

    def _normalise(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net: Any = pl_module.net
        samples = _samples(trainer, pl_module, self.how.samples, trainer.global_step)
        change = normalise_(net, samples, self.how.which, self.how.share)
        if self.how.reset_moments:
            for optimizer in trainer.optimizers:
                for layer in tropical_layers(net, self.how.which).values():
                    optimizer.state.pop(layer.weight, None)
        for logger in trainer.loggers:
            logger.log_metrics({"normalisation/change": change}, step=trainer.global_step)


class DeadWeights(Callback):
    """Log `active/layer1`, ..., the share of each tropical layer's weights, in percent, that win for at least one sample.

    Taken after each validation, over the same `samples` training inputs each time; `active/mean` is the layers' mean.
    """

    def __init__(self, samples: int = 2000) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.samples = samples

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net: Any = pl_module.net
        shares = list(winning_shares(net, _samples(trainer, pl_module, self.samples, 0)).values())
        for place, share in enumerate(shares, start=1):
            pl_module.log(f"active/layer{place}", 100 * share)
        if shares:
            pl_module.log("active/mean", 100 * sum(shares) / len(shares))


def _samples(trainer: Trainer, pl_module: LightningModule, count: int | None, key: int) -> Iterator[Tensor]:
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "sample_inputs"):
        raise TypeError(
            f"the normalisation draws its samples from a datamodule's sample_inputs(n, key); got {data!r:.80}"
        )
    return (batch.to(pl_module.device) for batch in data.sample_inputs(count, key=key))
