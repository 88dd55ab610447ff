"""Dispatch: both backends against a dense reference, in the forward pass and all gradients.

Legend: S tokens, N experts, K chosen, D width, F hidden width of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_modules.ops import experts as ops
from lit_modules.ops.experts import ACTIVATIONS, Backend, expert_mlp, grouped_refusal
from lit_modules.ops.routing import Routing, drop_over_capacity, route

BACKENDS: list[Backend] = ["grouped", "loop"]


class Case(NamedTuple):
    """Leaves of the graph: tokens, router logits and weights."""

    x_SD: Tensor
    logits_SN: Tensor
    up_NFD: Tensor
    down_NDF: Tensor
    gate_NFD: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in self if leaf is not None]


def _case(
    activation: str = "squared_relu", S: int = 40, N: int = 8, D: int = 16, width: int = 8, dead: int = 0
) -> Case:
    """Weights of order 1 and router logits; the first `dead` experts are never chosen."""
    generator = torch.Generator().manual_seed(S + N + D + width)
    x_SD, logits_SN = (torch.randn(S, n, generator=generator) for n in (D, N))
    logits_SN[:, :dead] -= 100.0
    up_NFD, gate_NFD = (torch.randn(N, width, D, generator=generator) / D**0.5 for _ in range(2))
    down_NDF = torch.randn(N, D, width, generator=generator) / width**0.5
    gated = ACTIVATIONS[activation].gated
    case = Case(x_SD, logits_SN, up_NFD, down_NDF, gate_NFD if gated else None)
    for leaf in case.leaves():
        leaf.requires_grad_()
    return case


def _double(case: Case) -> Case:
    return Case(*(None if leaf is None else leaf.detach().double().requires_grad_() for leaf in case))


FUNCTIONS = {
    "squared_relu": lambda x: x.clamp_min(0) ** 2,
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x * torch.sigmoid(x),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def _dense(case: Case, routing: Routing, activation: str) -> Tensor:
    """Every expert on every token, with the weights of those not chosen 0."""
    weights_SN = torch.zeros_like(routing.probs_SN).scatter(1, routing.experts_SK, routing.weights_SK)
    up_SNF = torch.einsum("sd,nfd->snf", case.x_SD, case.up_NFD)
    if case.gate_NFD is None:
        hidden_SNF = FUNCTIONS[activation](up_SNF)
    else:
        hidden_SNF = FUNCTIONS[GATES[activation]](torch.einsum("sd,nfd->snf", case.x_SD, case.gate_NFD)) * up_SNF
    return torch.einsum("snf,ndf,sn->sd", hidden_SNF, case.down_NDF, weights_SN)


def _gradients(y_SD: Tensor, case: Case) -> list[Tensor]:
    seed_SD = torch.randn(y_SD.shape, generator=torch.Generator().manual_seed(0)).to(y_SD.dtype)
    return list(torch.autograd.grad(y_SD, case.leaves(), seed_SD))


def _compare(case: Case, top_k: int, activation: str, backend: Backend, capacity: int | None = None) -> list[Tensor]:
    """Check one backend in float32 against the dense reference in float64; return its gradients."""
    results = []
    for leaves, own in ((case, True), (_double(case), False)):
        routing = route(leaves.logits_SN, top_k, "softmax_topk")
        if capacity is not None:
            routing = drop_over_capacity(routing, capacity)
        weights = (leaves.up_NFD, leaves.down_NDF, leaves.gate_NFD, activation)
        y_SD = expert_mlp(leaves.x_SD, routing, *weights, backend) if own else _dense(leaves, routing, activation)
        results.append((y_SD, _gradients(y_SD, leaves)))
    (y, gradients), (reference, expected) = results
    torch.testing.assert_close(y, reference.float(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=2e-5)
    return gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_dispatch_equals_the_dense_reference(activation: str, top_k: int, backend: Backend) -> None:
    _compare(_case(activation), top_k, activation, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [8, 16, 32])  # narrower than D, as wide, wider: where the weight is applied
def test_dispatch_with_capacity_equals_the_dense_reference(width: int, backend: Backend) -> None:
    _compare(_case(width=width), 2, "squared_relu", backend, capacity=6)
    _compare(_case(width=width), 2, "squared_relu", backend, capacity=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_tokens_get_zero_gradients(backend: Backend) -> None:
    _, _, up, down, gate = _compare(_case("swiglu", dead=5), 2, "swiglu", backend)
    for gradient in (up, down, gate):
        assert (gradient[:5] == 0).all()
        assert (gradient[5:].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens_at_all(top_k: int, backend: Backend) -> None:
    case = _case(S=0)
    routing = route(case.logits_SN, top_k, "softmax_topk")
    y_SD = expert_mlp(case.x_SD, routing, case.up_NFD, case.down_NDF, backend=backend)
    assert y_SD.shape == (0, 16)
    for leaf, gradient in zip(case.leaves(), torch.autograd.grad(y_SD.sum(), case.leaves()), strict=True):
        assert gradient.shape == leaf.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("top_k", [1, 4])
def test_gradients_that_are_expanded_scalars(width: int, top_k: int) -> None:
    """y.sum() hands back a gradient with stride 0, which torch's grouped product refuses."""
    gradients = []
    for backend in BACKENDS:
        case = _case(width=width)
        routing = route(case.logits_SN, top_k, "softmax_topk")
        y_SD = expert_mlp(case.x_SD, routing, case.up_NFD, case.down_NDF, backend=backend)
        gradients.append(torch.autograd.grad(y_SD.sum(), case.leaves()))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradcheck_in_float64() -> None:
    case = _double(_case("swiglu", S=5, N=3, D=4, width=2))

    def layer(x_SD: Tensor, logits_SN: Tensor, up: Tensor, down: Tensor, gate: Tensor) -> Tensor:
        return expert_mlp(x_SD, route(logits_SN, 2, "topk_softmax"), up, down, gate, "swiglu")

    assert torch.autograd.gradcheck(layer, case.leaves())


def test_dispatch_and_combine_are_each_others_transpose() -> None:
    order_R = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    token_R, rows_SK = order_R // 3, order_R.argsort().view(4, 3)
    x_SD, y_RD = torch.randn(4, 5).double().requires_grad_(), torch.randn(12, 5).double().requires_grad_()
    dispatched, combined = ops._Dispatch.apply(x_SD, token_R, rows_SK), ops._Combine.apply(y_RD, token_R, rows_SK)
    torch.testing.assert_close((dispatched * y_RD).sum(), (x_SD * combined).sum())
    for function, leaf in ((ops._Dispatch.apply, x_SD), (ops._Combine.apply, y_RD)):
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t, token_R, rows_SK) ** 2, leaf)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 1000))
def test_the_order_of_tokens_and_of_experts_does_not_matter(S: int, top_k: int, seed: int) -> None:
    case, generator = _case(S=S), torch.Generator().manual_seed(seed)
    y_SD = expert_mlp(case.x_SD, route(case.logits_SN, top_k, "softmax_topk"), case.up_NFD, case.down_NDF)
    s, n = torch.randperm(S, generator=generator), torch.randperm(8, generator=generator)
    routing = route(case.logits_SN[s][:, n], top_k, "softmax_topk")
    permuted = expert_mlp(case.x_SD[s], routing, case.up_NFD[n], case.down_NDF[n])
    torch.testing.assert_close(permuted, y_SD[s], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("activation", "degree"), [("relu", 2), ("squared_relu", 3), ("reglu", 3)])
def test_scaling_every_matrix_scales_the_output_by_a_power(activation: str, degree: int) -> None:
    case = _case(activation)
    routing = route(case.logits_SN, 2, "softmax_topk")
    weights = (case.up_NFD, case.down_NDF, case.gate_NFD)
    scaled = (None if weight is None else 4.0 * weight for weight in weights)
    y_SD = expert_mlp(case.x_SD, routing, *weights, activation)
    torch.testing.assert_close(expert_mlp(case.x_SD, routing, *scaled, activation), 4.0**degree * y_SD)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend: Backend) -> None:
    case = _case("swiglu")
    routing = route(case.logits_SN, 2, "softmax_topk")
    weights = (case.up_NFD, case.down_NDF, case.gate_NFD, "swiglu", backend)
    exact = expert_mlp(case.x_SD, routing, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        y_SD = expert_mlp(case.x_SD, routing, *weights)
    assert y_SD.dtype == F.linear(case.x_SD.bfloat16(), case.up_NFD[0].bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(y_SD.float(), exact, rtol=0.03, atol=0.03)
    gradients = torch.autograd.grad(y_SD.float().sum(), case.leaves())
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_auto_takes_the_grouped_product_where_it_can_be_had() -> None:
    fits, odd = _case(), _case(D=10, width=6)
    assert grouped_refusal(fits.x_SD, fits.up_NFD) is None
    assert "divisible by 4, got (6, 10)" in str(grouped_refusal(odd.x_SD, odd.up_NFD))
    assert "divisible by 8, got (6, 10)" in str(grouped_refusal(odd.x_SD.bfloat16(), odd.up_NFD))
    assert "float64" in str(grouped_refusal(fits.x_SD.double(), fits.up_NFD))
    for case in (odd, _double(fits)):
        routing = route(case.logits_SN, 2, "softmax_topk")
        weights = (case.up_NFD, case.down_NDF)
        assert torch.equal(
            expert_mlp(case.x_SD, routing, *weights), expert_mlp(case.x_SD, routing, *weights, backend="loop")
        )
        with pytest.raises(ValueError, match="grouped matrix product"):
            expert_mlp(case.x_SD, routing, *weights, backend="grouped")


def test_bad_input_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case()
    routing = route(case.logits_SN, 2, "softmax_topk")
    x, up, down = case.x_SD, case.up_NFD, case.down_NDF
    with pytest.raises(ValueError, match="unknown activation 'tanh'; known: squared_relu, relu"):
        expert_mlp(x, routing, up, down, activation="tanh")
    with pytest.raises(ValueError, match="unknown backend 'fast'; known: auto, grouped, loop"):
        expert_mlp(x, routing, up, down, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="swiglu needs a gate"):
        expert_mlp(x, routing, up, down, activation="swiglu")
    with pytest.raises(ValueError, match="relu takes no gate"):
        expert_mlp(x, routing, up, down, up, "relu")
    with pytest.raises(ValueError, match=r"does not fit down \(8, 8, 16\)"):
        expert_mlp(x, routing, up, up)
    with pytest.raises(ValueError, match=r"got \(40, 15\) and \(8, 8, 16\)"):
        expert_mlp(x[:, 1:], routing, up, down)
    with pytest.raises(ValueError, match="40 tokens to 8 experts, but there are 39 tokens and 8 experts"):
        expert_mlp(x[1:], routing, up, down)
    monkeypatch.setattr(ops, "_GROUPED_MM", None)
    with pytest.raises(ValueError, match="no grouped matrix product"):
        expert_mlp(x, routing, up, down, backend="grouped")
