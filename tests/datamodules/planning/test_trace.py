"""A traced graph computes what the model computes: it is run, operation by operation, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from datamodules.planning.graph import Graph
from datamodules.planning.recorder import TraceError
from datamodules.planning.trace import Step, trace

aten = torch.ops.aten


def _layer_norm(x: Tensor, w: Tensor, b: Tensor, normalized: int, affine: list[bool]) -> Any:
    return aten.native_layer_norm(x, x.shape[-normalized:], w, b, 1e-5)


def _layer_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, b: Tensor, normalized: int, affine: Any, wanted: Any
) -> Any:
    return aten.native_layer_norm_backward(g, x, x.shape[-normalized:], mean, rstd, w, b, wanted)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor, causal: bool, scale: float, **_: Any) -> Any:
    scores = q @ k.mT * scale + (mask[0] if mask else 0.0)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, l: Tensor, *mask: Tensor, **how: Any
) -> Any:
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *mask)]
    with torch.enable_grad():
        out = _sdpa(*leaves, **how)[0]
        wanted = [t for t, w in zip(leaves, how["wanted"], strict=False) if w]
        return torch.autograd.grad(out, wanted, grad)


def _rms_norm(x: Tensor, w: Tensor, normalized: int, affine: Any) -> Any:
    rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return x * rstd * w, rstd


def _rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, w: Tensor, normalized: int, affine: Any, wanted: Any
) -> Any:
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    with torch.enable_grad():
        return torch.autograd.grad(_rms_norm(*leaves, normalized, affine)[0], leaves, grad)


def _field(grad: Tensor, whole: Tensor, dim: int, where: slice | int) -> Tensor:
    out = grad.new_zeros(whole.shape)
    out.movedim(dim, 0)[where] = grad if isinstance(where, int) else grad.movedim(dim, 0)
    return out


def _scatter(base: Tensor, part: Tensor, dim: int, where: slice | int) -> Tensor:
    out = base.clone()
    out.movedim(dim, 0)[where] = part if isinstance(where, int) else part.movedim(dim, 0)
    return out


def _span(a: Any) -> slice:
    return slice(a["start"], a["end"], a["step"])


def _scaled(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *ts, **a: f(ts[0], ts[1] if len(ts) > 1 else a["other"])


# what each kind means; `meta` is an empty tensor of the output's shape and dtype
KINDS: dict[str, Callable[..., Any]] = {
    "mm": lambda x, y: x @ y,
    "bmm": lambda x, y: x @ y,
    "add": lambda x, *y, alpha=1, other=None: x + alpha * (y[0] if y else other),
    "sub": lambda x, *y, alpha=1, other=None: x - alpha * (y[0] if y else other),
    "mul": _scaled(torch.mul),
    "div": _scaled(torch.div),
    "relu": F.relu,
    "gelu": lambda x, approximate: F.gelu(x),
    "tanh": torch.tanh,
    "exp": torch.exp,
    "clone": torch.clone,
    "split": lambda x, dim, parts: x.split(x.shape[dim] // parts, dim),
    "permute": lambda x, dims: x.permute(dims),
    "sum": lambda x, dims, keepdim: x.sum(dims, keepdim),
    "log_softmax": lambda x, dim, half_to_float: x.log_softmax(dim),
    "log_softmax_backward": lambda g, out, dim: aten._log_softmax_backward_data(g, out, dim, g.dtype),
    "nll_loss": lambda x, t, reduction, ignore_index: aten.nll_loss_forward(x, t, None, reduction, ignore_index),
    "nll_loss_backward": lambda g, x, t, w, reduction, ignore_index: aten.nll_loss_backward(
        g, x, t, None, reduction, ignore_index, w
    ),
    "threshold_backward": lambda g, x, threshold: g * (x > threshold),
    "gelu_backward": lambda g, x, approximate: aten.gelu_backward(g, x),
    "tanh_backward": lambda g, out: g * (1 - out * out),
    "embedding": lambda t, i, padding_idx, scale_grad_by_freq: t[i],
    "embedding_backward": lambda g, i, num_weights, padding_idx, scale_grad_by_freq: aten.embedding_dense_backward(
        g, i, num_weights, padding_idx, False
    ),
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "sdpa": _sdpa,
    "sdpa_backward": _sdpa_backward,
    "select": lambda x, dim, index: x.select(dim, index),
    "select_scatter": lambda x, y, dim, index: _scatter(x, y, dim, index),
    "slice": lambda x, **a: x.movedim(a["dim"], 0)[_span(a)].movedim(0, a["dim"]),
    "slice_scatter": lambda x, y, **a: _scatter(x, y, a["dim"], _span(a)),
    "cat": lambda *xs, dim: torch.cat(xs, dim),
}
BY_SHAPE: dict[str, Callable[..., Tensor]] = {
    "view": lambda meta, x: x.reshape(meta.shape),
    "expand": lambda meta, x, dims: x.expand(meta.shape),
    "full": lambda meta, value=float("nan"): torch.full_like(meta, value),
    "iota": lambda meta: torch.arange(len(meta), dtype=meta.dtype),
    "slice_backward": lambda meta, g, **a: _field(g, meta, a["dim"], _span(a)),
    "select_backward": lambda meta, g, dim, index: _field(g, meta, dim, index),
}


def run(graph: Graph, values: dict[int, Tensor]) -> dict[int, Tensor]:
    """Compute every tensor of a graph."""
    for op in graph.ops:
        tensors = [values[t] for t in op.inputs]
        first = graph.tensors[op.outputs[0]]
        if op.kind in BY_SHAPE:
            result = BY_SHAPE[op.kind](
                torch.empty(first.shape, dtype=getattr(torch, first.dtype)), *tensors, **op.attributes
            )
        else:
            how = {**op.attributes, "parts": len(op.outputs)} if op.kind == "split" else op.attributes
            result = KINDS[op.kind](*tensors, **how)
        made = result if isinstance(result, (tuple, list)) else [result]
        made = [m for m in made if m is not None]
        assert len(made) == len(op.outputs), op
        for number, tensor in zip(op.outputs, made, strict=True):
            info = graph.tensors[number]
            assert (tuple(tensor.shape), str(tensor.dtype)) == (info.shape, f"torch.{info.dtype}"), op
            values[number] = tensor
    return values


def assert_same_step(build: Callable[[], Step]) -> Graph:
    """The graph, run on the model's weights, gives autograd's loss and gradients."""
    graph = trace(build, "step")
    torch.manual_seed(0)
    step = build()
    loss = step.loss(step.model, **step.inputs)
    named = {n: p for n, p in step.model.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    given = {**dict(step.model.named_parameters()), **dict(step.model.named_buffers()), **step.inputs}
    values = {t: given[graph.tensors[t].name].detach() for t in (*graph.inputs, *graph.buffers)}
    values |= {p.tensor: given[p.name].detach() for p in graph.parameters}
    values = run(graph, values)
    torch.testing.assert_close(values[graph.outputs[0]], loss.detach())
    assert [p.name for p in graph.parameters] == list(named)
    for parameter, gradient in zip(graph.parameters, wanted, strict=True):
        if gradient is None:
            assert parameter.gradient is None
        else:
            torch.testing.assert_close(
                values[parameter.gradient], gradient, msg=lambda m, n=parameter.name: f"{n}: {m}"
            )
    return graph


def words_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), labels.flatten())


def of(model: Callable[[], nn.Module], shape: tuple[int, ...] = (4, 6), dtype: Any = None) -> Callable[[], Step]:
    def build() -> Step:
        module = model()
        x = torch.randint(0, 8, shape) if dtype == torch.int64 else torch.randn(shape)
        labels = torch.randint(0, 8, shape if dtype == torch.int64 else shape[:-1])
        return Step(module, {"x": x, "labels": labels}, words_loss)

    return build


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, activation="gelu")
        self.norm = nn.RMSNorm(12, eps=1e-6)
        self.head = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.words(x))))


class Biased(nn.Module):
    """Attention with a trained bias in its mask, and causal attention, whose operands come from one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 36), nn.Linear(12, 8)
        self.bias = nn.Parameter(torch.randn(1, 3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        y = F.scaled_dot_product_attention(y, k, v, is_causal=True)
        return self.head(y.transpose(1, 2).flatten(2))


class InPlace(nn.Module):
    """Writes into tensors, into views of them, and reads views taken before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        flat = h.view(-1)
        early = h[1]
        h.mul_(3.0)
        h[0] = early * 2
        h[:, 2:6:2].mul_(0.5)
        later, rest = h.split(4, -1)
        h = torch.cat([rest, later, flat.view(4, 8)[:, :0]], -1)
        h.t()[3].add_(1.0)
        return self.second(h + flat.view(4, 8))


class Recomputed(nn.Module):
    """Activation checkpointing: part of the forward pass again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda y: self.a(y).relu(), x, use_reentrant=False, preserve_rng_state=False))


MODELS = {
    "mlp": of(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))),
    "transformer": of(Layer, (2, 4), torch.int64),
    "biased attention": of(Biased, (2, 4, 6)),
    "in place": of(InPlace),
    "recomputed": of(Recomputed),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_computes_what_the_model_computes(name: str) -> None:
    assert_same_step(MODELS[name])


def test_products_with_a_bias_come_apart_and_attention_stays_whole() -> None:
    kinds = {op.kind for op in trace(MODELS["transformer"], "t").ops}
    assert {"mm", "add", "sdpa", "sdpa_backward", "layer_norm", "layer_norm_backward", "rms_norm"} <= kinds
    assert not kinds & {"addmm", "bmm", "_softmax", "native_layer_norm"}


def test_the_mask_of_attention_gets_its_gradient() -> None:
    graph = trace(MODELS["biased attention"], "t")
    first = [op for op in graph.ops if op.kind == "sdpa_backward" and op.attributes["mask"]]
    assert len(first) == 1
    assert len(first[0].outputs) == 4
    assert {p.name: p.gradient for p in graph.parameters}["bias"] == first[0].outputs[3]


def test_backward_operations_know_their_layer_and_phase() -> None:
    graph = trace(MODELS["mlp"], "t")
    phases = [op.phase for op in graph.ops]
    assert phases == sorted(phases, reverse=True)  # all forward, then all backward
    layers = {op.layer for op in graph.ops if op.kind == "mm" and op.phase == "backward"}
    assert layers == {"0", "2"}
    relu_gradient = next(op for op in graph.ops if op.kind == "threshold_backward")
    assert relu_gradient.layer == "1"


def test_what_is_recomputed_belongs_to_the_backward_pass() -> None:
    graph = trace(MODELS["recomputed"], "t")
    again = [op for op in graph.ops if op.kind == "relu"]
    assert [op.phase for op in again] == ["forward", "backward"]


def test_convolutions_and_their_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Step:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8)
        )
        images = {"x": torch.randn(2, 3, 4, 4), "labels": torch.randint(0, 8, (2,))}
        return Step(net, images, lambda m, x, labels: F.cross_entropy(m(x), labels))

    graph = trace(build, "conv")
    by_kind = {op.kind: op for op in graph.ops}
    assert len(by_kind["convolution"].inputs) == 2  # its bias is added apart
    assert by_kind["convolution_backward"].attributes["wanted"] == [False, True, False]
    assert len(by_kind["batch_norm"].inputs) == 3  # training: running statistics are not read
    assert len(by_kind["batch_norm_backward"].inputs) == 5
    assert graph.buffers == ()
    assert all(p.gradient is not None for p in graph.parameters)
    assert all(graph.tensors[p.tensor].shape == graph.tensors[p.gradient or 0].shape for p in graph.parameters)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_flops_of_products_are_those_torch_counts(name: str) -> None:
    graph = trace(MODELS[name], "t")
    counted = sum(op.flops for op in graph.ops if op.kind in ("mm", "bmm"))
    step = MODELS[name]()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        step.loss(step.model, **step.inputs).backward()
    by_op = counter.get_flop_counts()["Global"]
    assert counted == sum(n for op, n in by_op.items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = sum(op.flops for op in graph.ops if op.kind == "sdpa")
    # torch's plain kernel: two products forward, four backward
    assert 3 * attention == sum(n for op, n in by_op.items() if str(op) in ("aten.bmm", "aten.baddbmm"))


def test_frozen_and_unused_parameters() -> None:
    def build() -> Step:
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8))
        net[0].weight.requires_grad_(False)
        net.register_parameter("spare", nn.Parameter(torch.zeros(3)))
        return Step(net, {"x": torch.randn(4, 6), "labels": torch.zeros(4, dtype=torch.int64)}, words_loss)

    graph = assert_same_step(build)
    assert [graph.tensors[t].name for t in graph.buffers] == ["0.weight"]
    assert {p.name: p.gradient is None for p in graph.parameters}["spare"]


def test_batch_dims_are_those_given() -> None:
    def build() -> Step:
        step = MODELS["mlp"]()
        return Step(step.model, step.inputs, step.loss, {"x": 0, "labels": None})

    graph = trace(build, "t")
    assert graph.batch_dims == ((graph.inputs[0], 0),)


def _values(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return model(x).sum() if x.sum() > 0 else model(x).mean()


def _count(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return model(x)[labels.nonzero()].sum()


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (_values, "looks at a tensor's values"),
        (_count, "looks at a tensor's values"),
        (lambda m, x, labels: m(x), r"scalar tensor, and is of shape \(4, 8\)"),
        (lambda m, x, labels: 1.0, "scalar tensor, and is a float"),
        (lambda m, x, labels: x.sum(), "does not depend on any parameter"),
        (lambda m, x, labels: m(x[:, :5]).sum(), "module 0: RuntimeError"),
        (lambda m, x, labels: F.scaled_dot_product_attention(m(x), x, x).sum(), "shapes that do not fit"),
    ],
)
def test_models_that_cannot_be_planned(loss: Callable[..., Tensor], complaint: str) -> None:
    def build() -> Step:
        return Step(MODELS["mlp"]().model, MODELS["mlp"]().inputs, loss)

    with pytest.raises(TraceError, match=complaint):
        trace(build, "t")


def test_torch_is_left_as_it_was() -> None:
    before = F.scaled_dot_product_attention
    module = MODELS["mlp"]().model
    with pytest.raises(TraceError):
        trace(lambda: Step(module, {"x": torch.randn(4, 5)}, lambda m, x: m(x).sum()), "t")
    assert F.scaled_dot_product_attention is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module(torch.randn(4, 6)).shape == (4, 8)
