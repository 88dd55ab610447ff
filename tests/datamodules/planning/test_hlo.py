"""Programs that JAX printed become graphs that compute the same, whichever of the two texts they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.planning.graph import Graph
from datamodules.planning.hlo import import_hlo, join_notes, keys_of, load_hlo
from datamodules.planning.hlo_kinds import layer_of
from datamodules.planning.hlo_module import HloError, matching, split_top

SAMPLES = Path(__file__).parent / "samples"


def _dot(x: Tensor, y: Tensor, contract: Any, batch: Any) -> Tensor:
    """By einsum: batch, lhs free, rhs free."""
    names = iter("abcdefghijklmnop")
    left, right = [""] * x.ndim, [""] * y.ndim
    for pairs in (batch, contract):
        for i, j in zip(*pairs, strict=True):
            left[i] = right[j] = next(names)
    free = [[d for d, n in enumerate(side) if not n] for side in (left, right)]
    for side, dims in zip((left, right), free, strict=True):
        for d in dims:
            side[d] = next(names)
    shared = [left[i] for i in batch[0]]
    out = [*shared, *(left[d] for d in free[0]), *(right[d] for d in free[1])]
    return torch.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", x, y)


def _broadcast(meta: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    shape = [1] * meta.ndim
    for d, size in zip(dims, x.shape, strict=True):
        shape[d] = size
    return x.reshape(shape).expand(meta.shape)


def _iota(meta: Tensor, dim: int = 0) -> Tensor:
    shape = [1] * meta.ndim
    shape[dim] = -1
    return torch.arange(meta.shape[dim], dtype=meta.dtype).view(shape).expand(meta.shape)


KINDS: dict[str, Callable[..., Tensor]] = {
    **{"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "exp": torch.exp},
    **{
        "maximum": torch.maximum,
        "where": torch.where,
        "lt": torch.lt,
        "ge": torch.ge,
        "mm": torch.mm,
        "bmm": torch.bmm,
    },
    "dot_general": _dot,
    "permute": lambda x, dims: x.permute(dims),
    "sum": lambda x, dims, keepdim: x.sum(dims),
    "amax": lambda x, dims, keepdim: x.amax(dims),
    "embedding": lambda table, ids: table[ids],
}
BY_SHAPE: dict[str, Callable[..., Tensor]] = {
    "view": lambda meta, x: x.reshape(meta.shape),
    "expand": _broadcast,
    "cast": lambda meta, x: x.to(meta.dtype),
    "full": lambda meta, value: torch.full_like(meta, value),
    "constant": lambda meta: torch.full_like(meta, -torch.inf) if meta.is_floating_point() else torch.ones_like(meta),
    "iota": _iota,
    "embedding_backward": lambda meta, g, ids: torch.zeros_like(meta).index_add(0, ids.flatten(), g.flatten(0, -2)),
}


def run(graph: Graph, given: dict[str, Tensor]) -> list[Tensor]:
    """Compute a graph's outputs."""
    values = {t: given[graph.tensors[t].name] for t in (*graph.inputs, *(p.tensor for p in graph.parameters))}
    for op in graph.ops:
        operands = [values[t] for t in op.inputs]
        info = graph.tensors[op.outputs[0]]
        if op.kind in BY_SHAPE:
            meta = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
            result = BY_SHAPE[op.kind](meta, *operands, **op.attributes)
        else:
            result = KINDS[op.kind](*operands, **op.attributes)
        assert (tuple(result.shape), str(result.dtype)) == (info.shape, f"torch.{info.dtype}"), op
        values[op.outputs[0]] = result
    return [values[t] for t in graph.outputs]


def attention_loss(p: dict[str, Tensor], ids: Tensor, y: Tensor) -> Tensor:
    """What the attention sample computes, in torch."""
    x = p["embed"][ids]
    q, k, v = (torch.einsum("bsd,dhk->bhsk", x, p[name]) for name in "qkv")
    scores = torch.einsum("bhsk,bhtk->bhst", q, k) * 0.5
    scores = torch.where(torch.ones(8, 8, dtype=torch.bool).tril(), scores, torch.tensor(-1e9))
    out = torch.einsum("bhst,bhtk->bshk", scores.softmax(-1), v).flatten(2) @ p["o"]
    return F.mse_loss(x + out, y)


@pytest.mark.parametrize("kind", ["mlir", "hlo"])
def test_the_graph_computes_what_jax_computes(kind: str) -> None:
    graph = load_hlo(SAMPLES / f"attention.{kind}")
    torch.manual_seed(0)
    shapes = {
        "embed": (64, 16),
        "k": (16, 4, 4),
        "o": (16, 16),
        "q": (16, 4, 4),
        "v": (16, 4, 4),
    }  # sorted, as JAX does
    p = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    ids, y = torch.randint(0, 64, (4, 8)), torch.randn(4, 8, 16)
    loss = attention_loss(p, ids, y)
    gradients = torch.autograd.grad(loss, list(p.values()))
    given = {n: t.detach() for n, t in zip([f"params['{n}']" for n in p], p.values(), strict=True)}
    given |= {"ids": ids.int(), "y": y}
    if kind == "hlo":  # without names
        given = {f"arg{i}": tensor for i, tensor in enumerate(given.values())}
    found = run(graph, given)
    torch.testing.assert_close(found[0], loss.detach(), rtol=1e-5, atol=1e-5)
    for after, before, gradient in zip(found[1:], p.values(), gradients, strict=True):
        torch.testing.assert_close(after, before.detach() - 0.1 * gradient, rtol=1e-4, atol=1e-5)


def test_arguments_and_results_find_each_other_by_name() -> None:
    graph = load_hlo(SAMPLES / "attention.mlir")
    assert [graph.tensors[t].name for t in graph.inputs] == ["ids", "y"]
    assert [p.name for p in graph.parameters] == [f"params['{n}']" for n in ("embed", "k", "o", "q", "v")]
    assert all(graph.tensors[p.tensor].shape == graph.tensors[p.gradient or 0].shape for p in graph.parameters)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_without_names_the_order_of_value_and_grad_decides(name: str) -> None:
    graph = load_hlo(SAMPLES / f"{name}.mlir")
    assert [p.gradient for p in graph.parameters] == list(graph.outputs[1:])
    assert [graph.tensors[p.tensor].shape for p in graph.parameters] == [
        graph.tensors[t].shape for t in graph.outputs[1:]
    ]


def test_ties_can_be_told() -> None:
    text = (SAMPLES / "mlp.mlir").read_text()
    graph = import_hlo(text, {3: 4, 1: None})
    assert [(graph.tensors[p.tensor].shape, p.gradient is None) for p in graph.parameters] == [
        ((32, 8), True),
        ((12, 32), False),
    ]
    with pytest.raises(HloError, match="no argument 9"):
        import_hlo(text, {9: 1})
    with pytest.raises(HloError, match="no result 9"):
        import_hlo(text, {0: 9})


@pytest.mark.parametrize("name", ["attention", "conv"])
def test_both_texts_of_a_program_give_the_same_products(name: str) -> None:
    graphs = [load_hlo(SAMPLES / f"{name}.{kind}") for kind in ("mlir", "hlo")]
    heavy = [
        Counter((op.kind, op.flops, graph.tensors[op.outputs[0]].shape) for op in graph.ops if op.flops > 500)
        for graph in graphs
    ]
    products = [Counter({k: n for k, n in h.items() if k[0] in ("mm", "dot_general", "convolution")}) for h in heavy]
    assert products[0] == products[1]
    assert sum(products[0].values()) >= 5


def test_fusions_and_calls_are_spread_out() -> None:
    plain, optimised = load_hlo(SAMPLES / "mlp.mlir"), load_hlo(SAMPLES / "mlp_optimised.hlo")
    assert "fusion" not in {op.kind for op in optimised.ops}
    shapes = [sorted(op.flops for op in graph.ops if op.kind == "mm") for graph in (plain, optimised)]
    assert shapes[0] == shapes[1] == sorted([2 * 16 * 12 * 32] * 2 + [2 * 16 * 32 * 8] * 3)


def test_layers_and_phases_come_from_the_name_stack() -> None:
    graph = load_hlo(SAMPLES / "mlp_optimised.hlo")
    products = {(op.layer, op.phase) for op in graph.ops if op.kind == "mm"}
    assert products == {(layer, phase) for layer in ("hidden", "head") for phase in ("forward", "backward")}
    assert layer_of("jit(step)/transpose(jvp(Net))/dense_0/dot_general") == "Net.dense_0"
    assert layer_of("jit(step)/jit(main)/jvp()/mul") == ""
    assert layer_of("") == ""
    assert join_notes("jit(f)/jvp(a)/jit", "relu/max") == "jit(f)/jvp(a)/jit/relu/max"
    assert join_notes("jit(f)/jvp(a)/jit", "jit(f)/b/max") == "jit(f)/b/max"
    assert keys_of("result[1]['a']['b']") == keys_of("params['a']['b']") == "['a']['b']"


def test_convolutions_get_torchs_layout() -> None:
    """The first convolution of the sample, on numbers: NHWC and HWIO turned, computed, turned back."""
    graph = load_hlo(SAMPLES / "conv.mlir")
    first = next(op for op in graph.ops if op.kind == "convolution")
    assert [graph.tensors[t].shape for t in first.inputs] == [(2, 3, 8, 8), (8, 3, 3, 3)]
    assert graph.tensors[first.outputs[0]].shape == (2, 8, 8, 8)
    assert first.attributes["padding"] == [1, 1]
    assert first.flops == 2 * (2 * 8 * 8 * 8) * (3 * 9)
    second = [op for op in graph.ops if op.kind == "convolution"][1]
    assert second.attributes["stride"] == [2, 2]
    assert (second.attributes["padding"], second.attributes["padding_high"]) == ([0, 0], [1, 1])


def test_slices_pads_and_concatenations() -> None:
    graph = load_hlo(SAMPLES / "conv.mlir")
    kinds = Counter(op.kind for op in graph.ops)
    assert kinds["cat"] == 1
    stepped = next(op for op in graph.ops if op.kind == "slice")
    assert dict(stepped.attributes) == {"dim": 1, "start": 0, "end": 64, "step": 2}
    pad = next(op for op in graph.ops if op.kind == "pad")
    assert (pad.attributes["low"], pad.attributes["high"]) == ([0, 1], [0, 2])


@pytest.mark.parametrize("kind", ["mlir", "hlo"])
def test_loops_are_refused_with_the_way_out(kind: str) -> None:
    with pytest.raises(HloError, match=r"is a loop.*unroll"):
        load_hlo(SAMPLES / f"loop.{kind}")


def module(
    body: str, arguments: str = "%arg0: tensor<8x4xf32>, %arg1: tensor<8x4xf32>", out: str = "tensor<8x4xf32>"
) -> str:
    """StableHLO of one function; the last line names the result."""
    return f"module @m {{\n  func.func public @main({arguments}) -> ({out}) {{\n{body}\n  }}\n}}\n"


def test_kinds_that_nobody_knows_keep_their_name() -> None:
    body = """
    %0 = stablehlo.custom_call @my_kernel(%arg0, %arg1) {api_version = 2 : i32}
      : (tensor<8x4xf32>, tensor<8x4xf32>) -> tensor<8x4xf32>
    %1 = stablehlo.custom_call @Sharding(%0) {mhlo.sharding = "{replicated}"} : (tensor<8x4xf32>) -> tensor<8x4xf32>
    %2 = chlo.erf %1 : tensor<8x4xf32> -> tensor<8x4xf32>
    %3:2 = stablehlo.optimization_barrier %2, %arg1 : tensor<8x4xf32>, tensor<8x4xf32>
    %4 = stablehlo.frobnicate %3#0 : tensor<8x4xf32>
    return %4 : tensor<8x4xf32>"""
    graph = import_hlo(module(body), {0: None})
    assert [(op.kind, dict(op.attributes)) for op in graph.ops] == [
        ("custom_call", {"target": "my_kernel"}),
        ("erf", {}),
        ("frobnicate", {}),
    ]


def test_generic_form_and_donated_arguments() -> None:
    body = """
    %0 = "stablehlo.dot_general"(%arg0, %arg1) <{dot_dimension_numbers =
      #stablehlo.dot<lhs_contracting_dimensions = [0], rhs_contracting_dimensions = [0]>}>
      : (tensor<8x4xf32>, tensor<8x6xf32>) -> tensor<4x6xf32>
    %1 = "stablehlo.transpose"(%0) <{permutation = array<i64: 1, 0>}> : (tensor<4x6xf32>) -> tensor<6x4xf32>
    %2 = "stablehlo.reduce"(%1, %cst) <{dimensions = array<i64: 1>}> ({
    ^bb0(%arg2: tensor<f32>, %arg3: tensor<f32>):
      %9 = stablehlo.maximum %arg2, %arg3 : tensor<f32>
      stablehlo.return %9 : tensor<f32>
    }) : (tensor<6x4xf32>, tensor<f32>) -> tensor<6xf32>
    return %2 : tensor<6xf32>""".replace("%2 = ", "%cst = stablehlo.constant dense<0.0> : tensor<f32>\n    %2 = ")
    arguments = "%arg0: tensor<8x4xf32>, %arg1: tensor<8x6xf32> {tf.aliasing_output = 0 : i32}"
    graph = import_hlo(module(body, arguments, "tensor<6xf32>"))
    assert [op.kind for op in graph.ops] == ["permute", "mm", "permute", "amax"]
    assert dict(graph.ops[-1].attributes) == {"dims": [1], "keepdim": False}
    assert [graph.tensors[p.tensor].shape for p in graph.parameters] == [(8, 6)]


def test_products_become_mm_and_bmm_only_where_they_are() -> None:
    body = """
    %0 = stablehlo.dot_general %arg0, %arg1, batching_dims = [0] x [0], contracting_dims = [1] x [2]
      : (tensor<3x4x5xf32>, tensor<3x6x4xf32>) -> tensor<3x5x6xf32>
    %1 = stablehlo.dot_general %0, %arg2, contracting_dims = [2] x [0]
      : (tensor<3x5x6xf32>, tensor<6x7xf32>) -> tensor<3x5x7xf32>
    return %1 : tensor<3x5x7xf32>"""
    arguments = "%arg0: tensor<3x4x5xf32>, %arg1: tensor<3x6x4xf32>, %arg2: tensor<6x7xf32>"
    graph = import_hlo(module(body, arguments, "tensor<3x5x7xf32>"), {2: None})
    assert [op.kind for op in graph.ops] == ["permute", "permute", "bmm", "dot_general"]
    x, y, z = torch.randn(3, 4, 5), torch.randn(3, 6, 4), torch.randn(6, 7)
    (found,) = run(graph, {"arg0": x, "arg1": y, "arg2": z})
    torch.testing.assert_close(found, torch.einsum("bks,btk->bst", x, y) @ z)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no ENTRY computation"),
        ("hello", "no ENTRY computation"),
        (module("return %arg7 : tensor<8x4xf32>"), "main reads %arg7"),
        (module("%0 = stablehlo.abs %arg0 : tensor<?x4xf32>\nreturn %0 : tensor<8x4xf32>"), "dynamic shapes"),
        (module("%0 = stablehlo.abs %arg0 : tensor<8x4xf9>\nreturn %0 : tensor<8x4xf32>"), "element type 'f9'"),
        (
            module("%0 = call @gone(%arg0) : (tensor<8x4xf32>) -> tensor<8x4xf32>\nreturn %0 : tensor<8x4xf32>"),
            "calls gone",
        ),
        (module("%0 = call @main(%arg0, %arg1) : () -> tensor<8x4xf32>\nreturn %0 : tensor<8x4xf32>"), "calls itself"),
        (
            module('%0 = "stablehlo.all_reduce"(%arg0) : (tensor<8x4xf32>) -> tensor<8x4xf32>\nreturn %0 : t'),
            "already part",
        ),
        (module("%0 = stablehlo.abs %arg0\nreturn %0 : tensor<8x4xf32>"), "no types"),
        (module("abs %arg0\nreturn %arg0 : tensor<8x4xf32>"), "not an instruction: abs"),
        (module("return %arg0 : tensor<8x4xf32>"), "no trainable arguments"),
        ("func.func public @main(%arg0: tensor<2xf32>) -> tensor<2xf32> {", "never closed"),
        (
            "HloModule m\nENTRY main {\n  a = f32[2] parameter(0)\n  b = frob\n}\n",
            "'frob' is not an array type, in: b = frob",
        ),
        ("HloModule m\nENTRY main {\n  a = f32[<=2] parameter(0)\n}\n", "dynamic shapes"),
        ("HloModule m\nENTRY main {\n  a = f32[2] parameter(0)\n  ROOT b = f32[2] abs(c)\n}\n", "main reads c"),
        ("HloModule m\nENTRY main {\n}\n", "main is empty"),
    ],
)
def test_what_is_no_program_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(HloError, match=complaint):
        import_hlo(text)


def test_brackets() -> None:
    assert matching('a("(", (b))c', 1) == 10
    assert split_top("a, (b, c), tensor<2x3, d>, (x) -> y, {e, f}") == [
        "a",
        "(b, c)",
        "tensor<2x3, d>",
        "(x) -> y",
        "{e, f}",
    ]


def test_a_graph_of_jax_has_the_digest_of_its_content(tmp_path: Path) -> None:
    graph = load_hlo(SAMPLES / "attention.mlir")
    graph.save(tmp_path / "g")
    assert Graph.load(tmp_path / "g").digest == graph.digest
