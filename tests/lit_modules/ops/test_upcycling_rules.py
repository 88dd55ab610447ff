"""The mapping is total and strict, says what it did, streams, and gives the same model in any order.

Legend: E expansion, G granularity, K experts per token, F hidden units, D width, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from lit_modules.ops.upcycling import Recipe, Target, UpcycleError, plan, rules, upcycle, upcycled_tensors
from lit_modules.ops.upcycling_rules import copy_rule, match

V, D, F, LAYERS = 11, 8, 16, 3
RECIPE = Recipe(router_std=1e-3)
Shapes = dict[str, tuple[int, ...]]


def dense_shapes(gated: bool = False, tied: bool = False) -> Shapes:
    shapes: Shapes = {"embedding.weight": (V, D), "norm.weight": (D,)}
    for i in range(LAYERS):
        block = f"blocks.{i}."
        shapes |= {f"{block}{norm}.weight": (D,) for norm in ("attention_norm", "mlp_norm")}
        shapes |= {f"{block}attention.{name}.weight": (D, D) for name in ("query", "output")}
        shapes |= {f"{block}attention.{name}.weight": (D // 2, D) for name in ("key", "value")}  # grouped queries
        shapes |= {f"{block}mlp.up.weight": (F, D), f"{block}mlp.down.weight": (D, F)}
        shapes |= {f"{block}mlp.gate.weight": (F, D)} if gated else {}
    return shapes if tied else shapes | {"head.weight": (V, D)}


def target_of(E: int = 2, G: int = 2, K: int = 2, layers: tuple[int, ...] = (0, 1, 2), **more) -> Target:
    more = {"order": "softmax_topk", "activation": "squared_relu"} | more
    return Target(E, G, K, layers=layers, **more)


def moe_shapes(target: Target, tied: bool = False) -> Shapes:
    gated, N, H = target.activation in ("swiglu", "geglu", "reglu"), target.experts, F // target.granularity
    shapes = dense_shapes(gated, tied)
    for i in target.layers:
        block = f"blocks.{i}.mlp"
        for name in ("up", "gate", "down") if gated else ("up", "down"):
            del shapes[f"{block}.{name}.weight"]
            shapes[f"{block}.{name}"] = (N, D, H) if name == "down" else (N, H, D)
            if target.shared:
                part = target.shared * H
                shapes[f"{block}.shared.{name}.weight"] = (D, part) if name == "down" else (part, D)
        shapes[f"{block}.router.weight"] = (N, D)
        if target.output == "learnable":
            shapes[f"{block}.output_scale"] = (1,)
        if target.output == "layernorm":
            shapes[f"{block}.output_norm.weight"] = (D,)
    return shapes


def state_of(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=random).to(dtype) for key, shape in shapes.items()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_target_key_is_made_and_every_kind_is_told() -> None:
    target = target_of(
        E=4, G=2, K=2, layers=(0, 2), activation="swiglu", shared=1, output="learnable", output_value=3.0
    )
    dense, shapes = state_of(dense_shapes(gated=True)), moe_shapes(target)
    state, receipt = upcycle(dense, shapes, target, RECIPE, seeded())
    assert {key: tuple(t.shape) for key, t in state.items()} == shapes
    assert sorted((*receipt.copied, *receipt.derived, *receipt.new)) == sorted(shapes)
    assert {key.split("mlp.")[1] for key in receipt.new} == {"router.weight", "output_scale"}
    assert all(".mlp.shared." in key or key.endswith(("up", "gate", "down")) for key in receipt.derived)
    assert all(state[key] is dense[key] for key in receipt.copied)
    assert "blocks.1.mlp.gate.weight" in receipt.copied
    assert state["blocks.0.mlp.output_scale"] == 3.0
    # model = dense + layers * ((E - 1) * MLP + router + shared + scalar)
    mlp = 3 * F * D
    assert receipt.parameters_before == sum(t.numel() for t in dense.values())
    assert receipt.parameters_after == receipt.parameters_before + 2 * (3 * mlp + 8 * D + mlp // 2 + 1)
    assert receipt.correction == 8.0
    assert receipt.factors.gate == pytest.approx(2.0)
    assert json.loads(json.dumps(receipt.as_dict()))["factors"]["down"] == pytest.approx(2.0)


def test_experts_are_the_scaled_shards() -> None:
    target = target_of(E=3, G=4, K=4)
    dense = state_of(dense_shapes())
    state, receipt = upcycle(dense, moe_shapes(target), target, Recipe(scale=2.5, router_std=1e-3), seeded())
    assert receipt.factors.up == receipt.factors.down == 2.5
    for e in range(12):
        rows = slice(4 * (e % 4), 4 * (e % 4) + 4)
        assert torch.equal(state["blocks.1.mlp.up"][e], 2.5 * dense["blocks.1.mlp.up.weight"][rows])
        assert torch.equal(state["blocks.1.mlp.down"][e], 2.5 * dense["blocks.1.mlp.down.weight"][:, rows])
        same = [f for f in range(12) if torch.equal(*(state["blocks.1.mlp.router.weight"][i] for i in (e, f)))]
        assert same == [4 * (e // 4) + i for i in range(4)]
    router = torch.cat([state[f"blocks.{i}.mlp.router.weight"][::4] for i in range(LAYERS)])
    assert router.std().item() == pytest.approx(1e-3, rel=0.3)
    assert len(router.unique(dim=0)) == 3 * LAYERS  # no two replicas, no two layers share a row


@pytest.mark.parametrize(("parent_tied", "target_tied"), [(True, True), (False, False), (True, False)])
def test_tied_embeddings(parent_tied: bool, target_tied: bool) -> None:
    target = target_of()
    dense = state_of(dense_shapes(tied=parent_tied))
    state, receipt = upcycle(dense, moe_shapes(target, tied=target_tied), target, RECIPE, seeded())
    assert ("head.weight" in state) != target_tied
    assert any("the head starts as a copy" in w for w in receipt.warnings) == (parent_tied and not target_tied)
    if not target_tied:
        assert torch.equal(state["head.weight"], dense["embedding.weight" if parent_tied else "head.weight"])


def test_untied_parent_of_a_tied_target_is_refused() -> None:
    target = target_of()
    with pytest.raises(UpcycleError, match=r"source key 'head.weight' is used by no target key"):
        upcycle(state_of(dense_shapes()), moe_shapes(target, tied=True), target, RECIPE, seeded())


def _broken(what: str) -> tuple[Shapes, Shapes, Target, Recipe]:
    target, recipe = target_of(), RECIPE
    source, wanted = dense_shapes(), moe_shapes(target)
    if what == "missing":
        source["blocks.1.mlp.upp.weight"] = source.pop("blocks.1.mlp.up.weight")
    elif what == "missing norm":
        del source["blocks.0.mlp_norm.weight"]
    elif what == "extra source":
        source["blocks.0.attention.sink.weight"] = (D,)
    elif what == "extra target":
        wanted["blocks.0.mlp.router.scale"] = (D,)
    elif what == "moe parent":
        source["blocks.0.mlp.router.weight"] = (4, D)
    elif what == "gate without a gated activation":
        source["blocks.0.mlp.gate.weight"] = (F, D)
    elif what == "misshaped":
        source["blocks.2.mlp.down.weight"] = (D, F + 2)
    elif what == "vocabulary":
        source["embedding.weight"] = (V + 1, D)
    elif what == "d_ff":
        source |= {f"blocks.{i}.mlp.up.weight": (F + 1, D) for i in range(LAYERS)}
    elif what == "not a matrix":
        source["blocks.0.mlp.up.weight"] = (F * D,)
    elif what == "bias":
        source["blocks.0.mlp.down.bias"] = (D,)
    elif what == "target bias":
        wanted["blocks.0.attention.query.bias"] = (D,)
    elif what == "output":
        recipe = Recipe(scale="output", router_std=1e-3)
    return source, wanted, target, recipe


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "missing",
            "'blocks.1.mlp.up' needs source key 'blocks.1.mlp.up.weight', which the checkpoint has not (nearest: ",
        ),
        (
            "missing norm",
            "'blocks.0.mlp_norm.weight' needs source key 'blocks.0.mlp_norm.weight', which the checkpoint",
        ),
        ("extra source", "source key 'blocks.0.attention.sink.weight' is used by no target key"),
        ("extra target", "target key 'blocks.0.mlp.router.scale' is covered by no rule"),
        ("moe parent", "source key 'blocks.0.mlp.router.weight' is used by no target key"),
        ("gate without a gated activation", "source key 'blocks.0.mlp.gate.weight' is used by no target key"),
        (
            "misshaped",
            "'blocks.2.mlp.down' has shape (4, 8, 8), but source key 'blocks.2.mlp.down.weight' of shape (8, 18)",
        ),
        ("vocabulary", "'embedding.weight' has shape (11, 8), but source key 'embedding.weight' of shape (12, 8)"),
        ("d_ff", "d_ff=17 is not divisible by granularity=2"),
        ("not a matrix", "an MLP's weight is a matrix, this one has 1 dimensions"),
        ("bias", "biases are not supported (the paper's models have none): 'blocks.0.mlp.down.bias'"),
        ("target bias", "biases are not supported (the paper's models have none): 'blocks.0.attention.query.bias'"),
        ("output", "scale='output' needs a constant or learnable output factor, the target's is 'none'"),
    ],
)
def test_what_does_not_fit_is_named_before_any_tensor_is_read(what: str, message: str) -> None:
    with pytest.raises(UpcycleError, match=re.escape(message)):
        plan(*_broken(what))


def test_all_problems_come_at_once() -> None:
    source, wanted, target, recipe = _broken("d_ff")
    with pytest.raises(UpcycleError) as caught:
        plan(source, wanted, target, recipe)
    for i in range(LAYERS):
        assert f"'blocks.{i}.mlp.up'" in str(caught.value)


def test_two_rules_for_one_key_are_refused() -> None:
    with pytest.raises(UpcycleError, match=r"target key 'up' is covered by several rules: up, u\."):
        match({"up": (1,)}, {"up": (1,)}, [copy_rule("up"), copy_rule("u.")])
    target = target_of(activation="reglu", shared=2, output="layernorm")
    for key in moe_shapes(target):
        assert sum(bool(re.fullmatch(rule.pattern, key)) for rule in rules(target, RECIPE)) == 1


def test_dtypes_are_kept_and_never_cast() -> None:
    target = target_of()
    state, _ = upcycle(state_of(dense_shapes(), torch.bfloat16), moe_shapes(target), target, RECIPE, seeded())
    for key, tensor in state.items():  # a router in bf16 would break the groups
        assert tensor.dtype == (torch.float32 if key.endswith("router.weight") else torch.bfloat16)
    fresh = state_of(moe_shapes(target))
    with pytest.raises(UpcycleError, match=r"is torch.float32, but source key 'embedding.weight' gives torch.bfloat16"):
        upcycle(state_of(dense_shapes(), torch.bfloat16), moe_shapes(target), target, RECIPE, seeded(), fresh)


def test_the_nets_own_router_is_kept() -> None:
    target = target_of(E=2, G=4, K=4)
    fresh = state_of(moe_shapes(target), seed=3)
    arguments = (state_of(dense_shapes()), moe_shapes(target), target)
    key = "blocks.1.mlp.router.weight"
    grouped, _ = upcycle(*arguments, Recipe(), seeded(), fresh)
    assert torch.equal(grouped[key], fresh[key][[0, 0, 0, 0, 1, 1, 1, 1]])  # Megatron-LM takes its first E rows
    independent, _ = upcycle(*arguments, Recipe(init="random_router"), seeded(), fresh)
    assert torch.equal(independent[key], fresh[key])
    with pytest.raises(UpcycleError, match=r"router_std=None keeps the net's own router, and none was given"):
        upcycle(*arguments, Recipe(), seeded())


class Lazy(Mapping[str, Tensor]):
    """A checkpoint whose tensors are read on access, in shards or not: counts what is read."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state, self.reads = state, [0]

    def __getitem__(self, key: str) -> Tensor:
        self.reads[0] += 1
        return self._state[key].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def test_streaming_reads_one_tensor_per_step_and_order_does_not_matter() -> None:
    target = target_of(shared=1)
    recipe = Recipe(router_std=0.02, permute=True, reinit=0.5, reinit_rule="drop_upcycling", noise=0.1)
    dense, shapes = state_of(dense_shapes()), moe_shapes(target)
    lazy, made = Lazy(dense), plan(dense_shapes(), shapes, target, recipe)
    assert lazy.reads == [0]
    streamed = {}
    for count, (key, tensor) in enumerate(upcycled_tensors(made, lazy, seeded(7)), start=1):
        assert lazy.reads == [count]
        streamed[key] = tensor
    backwards, _ = upcycle(dense, dict(reversed(shapes.items())), target, recipe, seeded(7))
    assert list(streamed) == list(shapes)
    assert all(torch.equal(streamed[key], backwards[key]) for key in shapes)
    other, _ = upcycle(dense, shapes, target, recipe, seeded(8))
    assert not torch.equal(other["blocks.0.mlp.up"], streamed["blocks.0.mlp.up"])


@pytest.mark.parametrize(
    ("target", "recipe", "message"),
    [
        (
            target_of(E=4, G=4, K=6),
            RECIPE,
            "top_k=6 is not divisible by granularity=4.* every shard 1 times and only 2",
        ),
        (target_of(E=4, G=4, K=2), RECIPE, "only 2 of the 4 shards once more.* off by 1.00 of the dense output"),
        (
            target_of(E=8, G=8, K=8),
            Recipe("random_router", router_std=1e-3),
            "random router .* 8 shards: .* off by 0.88",
        ),
        (target_of(activation="swiglu"), RECIPE, "scale='paper' does not multiply a swiglu MLP by C=4 exactly"),
        (target_of(E=8, G=1, K=1), Recipe(router_std=0.1), "spread by about 0.28 .* about 1.4 times too large"),
        (target_of(E=1, G=2, K=2), RECIPE, "expansion 1: one replica of every shard"),
        (target_of(output="layernorm"), RECIPE, "a norm after the experts sets their scale itself"),
        (target_of(output="constant", output_value=4.0), RECIPE, "the output factor 4 comes on top of scale='paper'"),
        (target_of(), Recipe(router_std=1e-3, reinit=0.5, init_std=0.02), "re-initialised or noisy experts"),
        (target_of(), Recipe(router_std=1e-3, permute=True), "permuted replicas"),
    ],
)
def test_warnings_say_what_is_lost(target: Target, recipe: Recipe, message: str) -> None:
    activation = target.activation
    receipt = plan(dense_shapes(activation == "swiglu"), moe_shapes(target), target, recipe).receipt
    assert len(receipt.warnings) == 1
    assert re.search(message, receipt.warnings[0])


def test_a_faithful_start_has_no_warning() -> None:
    for activation, scale in (("squared_relu", "paper"), ("swiglu", "exact"), ("gelu", "down_only")):
        target = target_of(E=8, G=8, K=16, activation=activation)
        made = plan(
            dense_shapes(activation == "swiglu"), moe_shapes(target), target, Recipe(scale=scale, router_std=1e-3)
        )
        assert made.receipt.warnings == ()
