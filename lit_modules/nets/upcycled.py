"""Give a built net its dense parent's weights: as they are, or upcycled into its mixtures.

Callables for a configuration: each is called as f(net, parent_state, generator), changes the net in place and returns the
receipt. Weights move tensor by tensor, so that no second copy of the model is ever held. Legend: E expansion, G
granularity, T experts per token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_modules.ops import upcycling_rules as mapping
from lit_modules.ops.upcycling import Factors, Receipt, Recipe, Target, UpcycleError, plan, upcycled_tensors


@dataclass(frozen=True)
class Copy:
    """Continue a parent as it is: every key has its namesake, of the same shape and dtype, or it is an error."""

    def __call__(self, net: nn.Module, parent_state: Mapping[str, Tensor], generator: torch.Generator) -> Receipt:
        """Load the parent's weights. The generator is taken for the sake of a common signature and left alone.

        Raises:
            UpcycleError: keys, shapes or dtypes that differ; all keys and shapes are named, and the net is untouched.
        """
        own = net.state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in parent_state.items()}
        steps = mapping.match(shapes, {k: tuple(t.shape) for k, t in own.items()}, [mapping.copy_rule(".+")])
        _load(own, mapping.tensors(steps, parent_state, torch.Generator(), own))
        count = sum(math.prod(shape) for shape in shapes.values())
        return Receipt(tuple(own), (), (), 1.0, Factors(1.0, 1.0, 1.0), count, count)


@dataclass(frozen=True)
class Upcycle(Recipe):
    """Upcycle a dense parent into the net's mixtures; the fields are those of `Recipe`.

    E, G, T, the routing order, the activation and the output factor are read from the net's MoE layers, so that they are
    said in one place. With scale="output" the layers' output factor becomes C.
    """

    def __call__(self, net: nn.Module, parent_state: Mapping[str, Tensor], generator: torch.Generator) -> Receipt:
        """Load the parent's weights.

        Args:
            net: with `moe_layers()`, a dict from block index to MoE layer; on one device or several, but not sharded.
            parent_state: the dense parent's state dict, of the net's dtypes.
            generator: for the router (unless router_std is None) and whatever makes copies differ.
        Raises:
            UpcycleError: no MoE layer, layers that differ, or a parent that does not fit; see `plan`.
        """
        layers: dict[int, Any] = net.moe_layers()  # type: ignore[operator]
        target = target_of(layers)
        own = net.state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in parent_state.items()}
        made = plan(shapes, {key: tuple(tensor.shape) for key, tensor in own.items()}, target, self)
        _load(own, upcycled_tensors(made, parent_state, generator, own))
        self.settle(net)
        return made.receipt

    def settle(self, net: nn.Module) -> None:
        """Set what a state dict does not hold: the constant output factor under scale="output".

        A net that is built again to resume a run needs this, and not the parent's weights.

        Raises:
            UpcycleError: as `target_of`.
        """
        layers: dict[int, Any] = net.moe_layers()  # type: ignore[operator]
        target = target_of(layers)
        if self.scale == "output" and target.output == "constant":
            for layer in layers.values():
                layer.experts = dataclasses.replace(layer.experts, output_value=self.factors(target).output)


def target_of(layers: Mapping[int, Any]) -> Target:
    """Return what a net's MoE layers are.

    Args:
        layers: block index to MoE layer, each with `experts` (its settings) and `activation`.
    Raises:
        UpcycleError: there is none, or two of them differ (the checkpoint mapping knows one kind).
    """
    if not layers:
        raise UpcycleError("the net has no MoE layer to upcycle into: a dense continuation is Copy")
    kinds = {index: (layer.experts, layer.activation) for index, layer in layers.items()}
    first = next(iter(kinds))
    for index, kind in kinds.items():
        if kind != kinds[first]:
            raise UpcycleError(f"MoE layers {first} and {index} differ: {kinds[first]} and {kind}")
    settings, activation = kinds[first]
    return Target(
        settings.expansion,
        settings.granularity,
        settings.top_k,
        settings.order,
        activation,
        tuple(layers),
        settings.shared,
        settings.output,
        settings.output_value,
        settings.router_std,
    )


@torch.no_grad()
def _load(own: Mapping[str, Tensor], made: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into the net's own; that all keys are there and all shapes and dtypes agree is known by now."""
    for key, tensor in made:
        own[key].copy_(tensor)
