"""Upcycling: the weights of a mixture of experts out of those of a dense model, as pure functions on state dicts.

Follows arXiv 2410.07524: virtual-group initialisation (2.3, appendix A) and weight scaling (2.3.1). The arithmetic is in
`upcycling_scale`, the tensors in `upcycling_experts`, the strict mapping in `upcycling_rules`; this file says which key
comes from which. Key names: blocks.{i}.mlp.{up,gate,down}.weight in the dense parent, blocks.{i}.mlp.{router.weight,up,
gate,down}, .shared.{up,gate,down}.weight, .output_scale and .output_norm.weight in the target.

Legend: E expansion, G granularity, T experts per token, N = E * G experts, F hidden units of the dense MLP, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_modules.ops import upcycling_experts as experts
from lit_modules.ops import upcycling_scale as scaling
from lit_modules.ops.upcycling_experts import expert_layout, shard_experts, virtual_group_router
from lit_modules.ops.upcycling_recipe import Receipt, Recipe, Target, cautions
from lit_modules.ops.upcycling_rules import Call, Rule, Shape, Step, UpcycleError, copy_rule, match, tensors
from lit_modules.ops.upcycling_scale import Factors, correction, expected_error, expected_gain, scale_of

__all__ = [
    "Factors",
    "Plan",
    "Receipt",
    "Recipe",
    "Rule",
    "Target",
    "UpcycleError",
    "correction",
    "expected_error",
    "expected_gain",
    "expert_layout",
    "plan",
    "rules",
    "scale_of",
    "shard_experts",
    "upcycle",
    "upcycled_tensors",
    "virtual_group_router",
]


@dataclass(frozen=True)
class Plan:
    """A conversion that fits, before any tensor is read."""

    steps: tuple[Step, ...]
    receipt: Receipt


def plan(
    source_shapes: Mapping[str, Sequence[int]],
    target_shapes: Mapping[str, Sequence[int]],
    target: Target,
    recipe: Recipe,
) -> Plan:
    """Check that a checkpoint fits a target, and say what will be done.

    Raises:
        UpcycleError: keys or shapes that do not fit (see `match`), a bias, d_ff not divisible by G, or scale="output"
            for a target without an output factor.
        ValueError: as `scale_of`.
    """
    biases = [key for key in (*source_shapes, *target_shapes) if key.split(".")[-1] == "bias"]
    if biases:
        raise UpcycleError(f"biases are not supported (the paper's models have none): {', '.join(map(repr, biases))}")
    if recipe.scale == "output" and target.output not in ("constant", "learnable"):
        raise UpcycleError(
            f"scale='output' needs a constant or learnable output factor, the target's is {target.output!r}"
        )
    steps = match(source_shapes, target_shapes, rules(target, recipe, head="head.weight" in source_shapes))
    width = source_shapes["embedding.weight"][1] if "embedding.weight" in source_shapes else None
    std = target.router_std if recipe.router_std is None else recipe.router_std
    sigma = std * math.sqrt(width) if std is not None and width is not None else None
    keys = {kind: tuple(s.key for s in steps if s.rule.kind == kind) for kind in ("copied", "derived", "new")}
    receipt = Receipt(
        **keys,
        correction=correction(target.expansion, target.granularity, target.top_k, target.order),
        factors=recipe.factors(target),
        parameters_before=sum(math.prod(shape) for shape in source_shapes.values()),
        parameters_after=sum(math.prod(shape) for shape in target_shapes.values()),
        router_sigma=sigma,
        warnings=cautions(target, recipe, sigma, untied="head.weight" in set(target_shapes) - set(source_shapes)),
    )
    return Plan(steps, receipt)


def upcycled_tensors(
    made: Plan, state: Mapping[str, Tensor], generator: torch.Generator, fresh: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the target's tensors one by one; see `lit_modules.ops.upcycling_rules.tensors`."""
    return tensors(made.steps, state, generator, fresh)


def upcycle(
    state: Mapping[str, Tensor],
    target_shapes: Mapping[str, Sequence[int]],
    target: Target,
    recipe: Recipe,
    generator: torch.Generator,
    fresh: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Receipt]:
    """Return the target's state dict and a receipt.

    Args:
        state: the dense parent's. Copied keys of the result are the parent's own tensors, not clones.
        target_shapes: key to shape of the target's state dict.
        generator: every random draw comes from it; the result does not depend on the order of the keys.
        fresh: the target net's own freshly initialised tensors, needed where recipe.router_std is None.
    Raises:
        UpcycleError: as `plan` and `upcycled_tensors`.
    """
    made = plan({key: tensor.shape for key, tensor in state.items()}, target_shapes, target, recipe)
    return dict(upcycled_tensors(made, state, generator, fresh)), made.receipt


def rules(target: Target, recipe: Recipe, head: bool = True) -> list[Rule]:
    """Return the mapping from a dense checkpoint to `target`.

    Args:
        head: whether the parent has a head of its own. If it has not (tied embeddings) and the target has one, the head
            is copied from the embedding.
    """
    mixed = "|".join(map(str, target.layers)) or "(?!)"  # (?!) matches nothing: no layer is a mixture
    block = rf"blocks\.(?P<layer>{mixed})\.mlp"
    factors = recipe.factors(target)
    names = ("up", "gate", "down") if target.activation in scaling.GATED else ("up", "down")
    found = [
        copy_rule(r"(?!blocks\.\d+\.mlp\.|head\.weight$).+"),
        copy_rule(r"head\.weight", "head.weight" if head else "embedding.weight"),
        copy_rule(rf"blocks\.(?!(?:{mixed})\.)\d+\.mlp\..+"),
        _router_rule(block, target, recipe),
    ]
    for name in names:
        found.append(_expert_rule(block, name, target, recipe, getattr(factors, name)))
        if target.shared:
            found.append(_shared_rule(block, name, target, recipe))
    return found + _output_rules(block, target, recipe)


def _router_rule(block: str, target: Target, recipe: Recipe) -> Rule:
    grouped = recipe.init == "virtual_group"
    rows = target.expansion if grouped else target.experts

    def make(parent: Tensor, call: Call) -> Tensor:
        if recipe.router_std is None and call.fresh is None:
            raise UpcycleError(
                f"target key {call.key!r}: router_std=None keeps the net's own router, and none was given"
            )
        if recipe.router_std is None:
            drawn = call.fresh[:rows]  # type: ignore[index]
        else:
            # at least float32: a bf16 router's softmax ties replicas and breaks the groups (measured, not the paper's)
            dtype = torch.promote_types(parent.dtype, torch.float32)
            drawn = torch.randn(rows, parent.shape[1], generator=call.draws.of(call.key)) * recipe.router_std
            drawn = drawn.to(parent.device, dtype)
        return virtual_group_router(drawn, target.granularity) if grouped else drawn

    source = "blocks.{layer}.mlp.up.weight"
    return Rule(rf"{block}\.router\.weight", "new", source, lambda shape: (target.experts, _matrix(shape)[1]), make)


def _expert_rule(block: str, name: str, target: Target, recipe: Recipe, factor: float) -> Rule:
    """Return the rule of the routed experts' up, gate or down."""
    dim = 1 if name == "down" else 0
    expansion, granularity, count = target.expansion, target.granularity, target.experts

    def shape(parent: Shape) -> Shape:
        width = experts.held_units(_matrix(parent)[dim], granularity, 1).shape[1]
        return (count, width, parent[1]) if dim == 0 else (count, parent[0], width)

    def make(parent: Tensor, call: Call) -> Tensor:
        layer = call.key.rsplit(".", 1)[0]
        d_ff = parent.shape[dim]
        order_EF = experts.permutations(expansion, d_ff, call.draws.of(f"{layer}.order")) if recipe.permute else None
        made = shard_experts(parent, granularity, expansion, dim, order_EF)
        random = call.draws.of(call.key)
        if recipe.reinit and recipe.reinit_rule == "qwen2":
            made = experts.reinit_entries(made, recipe.reinit, _initial(made, recipe, call), random)
        elif recipe.reinit:
            units = experts.dropped_units(count, d_ff // granularity, recipe.reinit, call.draws.of(f"{layer}.dropped"))
            made = experts.reinit_units(made, units, dim + 1, random)
        if recipe.noise:
            made = experts.add_noise(made, recipe.noise, random)
        if name == "down" and recipe.halves(target):
            units_NH = experts.held_units(d_ff, granularity, expansion, order_EF)
            made *= experts.unit_shares(d_ff, granularity, target.shared)[units_NH][:, None].to(made)
        return made.mul_(factor)

    return Rule(rf"{block}\.{name}", "derived", f"blocks.{{layer}}.mlp.{name}.weight", shape, make)


def _initial(like: Tensor, recipe: Recipe, call: Call) -> Tensor:
    """Return weights as they are before any training, of the shape of `like`."""
    if recipe.init_std is not None:
        return torch.randn(like.shape, generator=call.draws.of(f"{call.key}.initial")) * recipe.init_std
    if call.fresh is None:
        raise UpcycleError(
            f"target key {call.key!r}: init_std=None redraws from the net's own weights, and none were given"
        )
    return call.fresh


def _shared_rule(block: str, name: str, target: Target, recipe: Recipe) -> Rule:
    """Return the rule of the shared experts' up, gate or down: plain rows of the parent, down by its share."""
    dim = 1 if name == "down" else 0

    def units(parent: Shape) -> Tensor:
        return experts.shared_units(_matrix(parent)[dim], target.granularity, target.shared)

    def shape(parent: Shape) -> Shape:
        width = len(units(parent))
        return (width, parent[1]) if dim == 0 else (parent[0], width)

    def make(parent: Tensor, call: Call) -> Tensor:
        held = units(tuple(parent.shape))
        made = parent.index_select(dim, held.to(parent.device))
        if name == "down" and recipe.halves(target):
            made *= experts.unit_shares(parent.shape[1], target.granularity, target.shared)[held].to(made)
        return made

    source = f"blocks.{{layer}}.mlp.{name}.weight"
    return Rule(rf"{block}\.shared\.{name}\.weight", "derived", source, shape, make)


def _output_rules(block: str, target: Target, recipe: Recipe) -> list[Rule]:
    """Return the rule of what follows the experts; a constant is no tensor and has none."""
    source = "blocks.{layer}.mlp.down.weight"
    value = recipe.factors(target).output if recipe.scale == "output" else target.output_value

    def one(parent: Tensor, call: Call, shape: Shape, fill: float) -> Tensor:
        dtype = parent.dtype if call.fresh is None else call.fresh.dtype
        return torch.full(shape, fill, dtype=dtype, device=parent.device)

    if target.output == "learnable":
        return [Rule(rf"{block}\.output_scale", "new", source, lambda _: (1,), lambda p, c: one(p, c, (1,), value))]
    if target.output == "layernorm":
        pattern = rf"{block}\.output_norm\.weight"
        return [
            Rule(pattern, "new", source, lambda p: _matrix(p)[:1], lambda p, c: one(p, c, tuple(p.shape[:1]), value))
        ]
    return []


def _matrix(shape: Shape) -> Shape:
    if len(shape) != 2:
        raise ValueError(f"an MLP's weight is a matrix, this one has {len(shape)} dimensions")
    return shape
