"""Which experts a token goes to: orders, ties, capacity and the balancing losses.

Legend: S tokens, N experts, K chosen.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_modules.ops.routing import (
    Order,
    capacity_of,
    drop_over_capacity,
    expert_counts,
    jitter,
    load_balancing_loss,
    route,
    top_indices,
    z_loss,
)


def _logits(S: int = 64, N: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(S, N, generator=torch.Generator().manual_seed(seed))


def test_softmax_topk_keeps_probabilities_as_they_are() -> None:
    logits_SN = _logits()
    routing = route(logits_SN, 2, "softmax_topk")
    probs_SN = logits_SN.softmax(-1)
    torch.testing.assert_close(routing.weights_SK, probs_SN.topk(2).values)
    torch.testing.assert_close(routing.experts_SK, probs_SN.topk(2).indices)
    assert (routing.weights_SK.sum(-1) < 1).all()
    assert routing.kept_SK is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 1000))
def test_topk_softmax_is_softmax_topk_renormalised(top_k: int, seed: int) -> None:
    logits_SN = _logits(seed=seed)
    before, after = route(logits_SN, top_k, "softmax_topk"), route(logits_SN, top_k, "topk_softmax")
    torch.testing.assert_close(after.weights_SK.sum(-1), torch.ones(64))
    torch.testing.assert_close(after.weights_SK, before.weights_SK / before.weights_SK.sum(-1, keepdim=True))
    assert torch.equal(after.experts_SK, before.experts_SK)
    assert torch.equal(after.probs_SN, before.probs_SN)  # over all experts for both orders


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
def test_all_is_float32_whatever_comes_in(order: Order) -> None:
    routing = route(_logits().bfloat16(), 2, order)
    exact = route(_logits().bfloat16().float(), 2, order)
    for mine, reference in zip(routing[:4], exact[:4], strict=True):
        assert torch.equal(mine, reference)
    assert routing.weights_SK.dtype == routing.probs_SN.dtype == routing.logits_SN.dtype == torch.float32
    assert routing.experts_SK.dtype == torch.int64
    assert route(_logits().double(), 2, order).weights_SK.dtype == torch.float64


finite = st.sampled_from([-math.inf, -2.5, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 2.5, 3e38])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(finite, min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_ties_go_to_the_lowest_index(rows: list[list[float]], top_k: int) -> None:
    for dtype in (torch.float32, torch.float64):
        x_SN = torch.tensor(rows, dtype=dtype)
        by_hand = [sorted(range(6), key=lambda i: (-row[i], i))[:top_k] for row in x_SN.tolist()]
        assert top_indices(x_SN, top_k).tolist() == by_hand


@pytest.mark.parametrize("router_std", [0.0, 1e-4, 0.02])
@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_tied_router_rows_pick_every_shard_equally_often(router_std: float, width: int, groups: int) -> None:
    """E = 8 rows, each 8 times in a row: with K = kG every token gets each shard k times, even if all rows are 0."""
    generator = torch.Generator().manual_seed(1)
    rows_ND = (router_std * torch.randn(8, width, generator=generator)).repeat_interleave(8, 0)
    routing = route(torch.randn(4096, width, generator=generator) @ rows_ND.T, 8 * groups, "softmax_topk")
    shards_SG = torch.zeros(4096, 8).scatter_add_(1, routing.experts_SK % 8, torch.ones(4096, 8 * groups))
    assert (shards_SG == groups).all()


def test_a_bfloat16_softmax_breaks_the_groups_unless_ties_go_to_the_lowest_index() -> None:
    """Why all of it is float32: two replicas whose probabilities round to the same number are mixed up by torch.topk."""
    generator = torch.Generator().manual_seed(1)
    rows_ND = (0.02 * torch.randn(8, 64, generator=generator)).repeat_interleave(8, 0)
    logits_SN = torch.randn(4096, 64, generator=generator) @ rows_ND.T
    for chosen_SK in (logits_SN.bfloat16().softmax(-1).topk(8).indices, logits_SN.bfloat16().topk(8).indices):
        whole = ((chosen_SK % 8).sort(-1).values == torch.arange(8)).all(-1)
        assert 0.3 < whole.float().mean() < 0.999
    lowest_SK = top_indices(logits_SN.bfloat16().softmax(-1), 8)
    assert torch.equal((lowest_SK % 8).sort(-1).values, torch.arange(8).expand(4096, 8))
    assert not torch.equal(lowest_SK, top_indices(logits_SN, 8))  # whole, but not always the better replica


def test_what_cannot_route_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="softmax of one number is always 1"):
        route(_logits(), 1, "topk_softmax")
    for top_k in (0, 9):
        with pytest.raises(ValueError, match="between 1 and the number of experts, 8"):
            route(_logits(), top_k, "softmax_topk")
    with pytest.raises(ValueError, match="unknown order 'topk'; known: softmax_topk, topk_softmax"):
        route(_logits(), 2, "topk")  # type: ignore[arg-type]


def test_the_router_gets_a_gradient_from_one_choice_only_before_top_k() -> None:
    logits_SN = _logits().requires_grad_()
    (gradient,) = torch.autograd.grad(route(logits_SN, 1, "softmax_topk").weights_SK.sum(), logits_SN)
    assert (gradient.abs().amax(-1) > 0).all()
    after = logits_SN.gather(-1, top_indices(logits_SN.detach(), 1)).softmax(-1)  # what is refused
    (gradient,) = torch.autograd.grad(after.sum(), logits_SN)
    assert (gradient == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(2, 5), st.integers(0, 12), st.integers(0, 1000))
def test_capacity_drops_second_choices_and_later_tokens_first(S: int, N: int, capacity: int, seed: int) -> None:
    routing = route(_logits(S, N, seed), 2, "softmax_topk")
    dropped = drop_over_capacity(routing, capacity)
    taken, kept = [0] * N, torch.zeros(S, 2, dtype=torch.bool)
    for k in range(2):
        for s in range(S):
            expert = int(routing.experts_SK[s, k])
            kept[s, k] = taken[expert] < capacity
            taken[expert] += 1
    assert dropped.kept_SK is not None
    assert torch.equal(dropped.kept_SK, kept)
    assert torch.equal(dropped.weights_SK, routing.weights_SK * kept)
    assert torch.equal(dropped.experts_SK, routing.experts_SK)
    assert expert_counts(routing.experts_SK[kept], N).tolist() == [min(count, capacity) for count in taken]


def test_capacity_is_a_share_rounded_up() -> None:
    assert capacity_of(1024, 8, 2, 1.0) == 256
    assert capacity_of(1025, 8, 1, 1.25) == math.ceil(1.25 * 1025 / 8)
    assert capacity_of(1, 64, 1, 1.0) == 1
    with pytest.raises(ValueError, match="above 0"):
        capacity_of(8, 8, 1, 0.0)
    with pytest.raises(ValueError, match="at least 0"):
        drop_over_capacity(route(_logits(), 1, "softmax_topk"), -1)


@pytest.mark.parametrize(("order", "top_k"), [("softmax_topk", 1), ("softmax_topk", 4), ("topk_softmax", 4)])
def test_balancing_loss_is_1_when_balanced_and_n_over_k_when_collapsed(order: Order, top_k: int) -> None:
    uniform = route(torch.zeros(16, 8), top_k, order)
    balanced = uniform._replace(experts_SK=(torch.arange(16)[:, None] * top_k + torch.arange(top_k)) % 8)
    assert load_balancing_loss(balanced).item() == pytest.approx(1.0)
    collapsed_SN = torch.zeros(16, 8)
    collapsed_SN[:, 3] = 50.0
    assert load_balancing_loss(route(collapsed_SN, top_k, order)).item() == pytest.approx(8 / top_k)


def test_balancing_loss_by_hand_and_its_gradient() -> None:
    """P carries the gradient, f none: d/dP_i = N * f_i / S."""
    probs_SN = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]], requires_grad=True)
    routing = route(probs_SN.log(), 1, "softmax_topk")._replace(probs_SN=probs_SN)
    loss = load_balancing_loss(routing)
    assert loss.item() == pytest.approx(3 * 1.0 * 0.6)
    (gradient,) = torch.autograd.grad(loss, probs_SN)
    torch.testing.assert_close(gradient, torch.tensor([[1.5, 0.0, 0.0], [1.5, 0.0, 0.0]]))


@pytest.mark.parametrize(("order", "top_k"), [("softmax_topk", 1), ("topk_softmax", 4)])
def test_with_the_counts_of_all_parts_the_mean_over_them_is_the_loss_of_the_whole(order: Order, top_k: int) -> None:
    """As of processes that share a batch; with each part's own counts it is not."""
    logits_SN = _logits(64, 8).requires_grad_()
    parts = [route(half, top_k, order) for half in logits_SN.chunk(2)]
    counts_N = sum(expert_counts(part.experts_SK, 8) for part in parts)
    shared = sum(load_balancing_loss(part, counts_N) for part in parts) / 2
    whole = load_balancing_loss(route(logits_SN, top_k, order))
    torch.testing.assert_close(shared, whole)
    gradients = [torch.autograd.grad(loss, logits_SN, retain_graph=True)[0] for loss in (shared, whole)]
    torch.testing.assert_close(*gradients)
    assert abs(sum(load_balancing_loss(part) for part in parts) / 2 - whole) > 1e-3


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_huggingface_value_is_k_times_ours(top_k: int) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits_SN = _logits(128, 16)
    theirs = mixtral.load_balancing_loss_func((logits_SN,), 16, top_k)
    ours = load_balancing_loss(route(logits_SN, top_k, "softmax_topk"))
    torch.testing.assert_close(theirs, top_k * ours)


def test_losses_of_no_tokens_are_0() -> None:
    empty = route(torch.zeros(0, 4), 2, "softmax_topk")
    assert load_balancing_loss(empty).item() == z_loss(empty.logits_SN).item() == 0.0


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    assert z_loss(torch.zeros(5, 8)).item() == pytest.approx(math.log(8) ** 2)
    logits_SN = _logits().requires_grad_()
    torch.testing.assert_close(z_loss(logits_SN), logits_SN.exp().sum(-1).log().square().mean())
    (gradient,) = torch.autograd.grad(z_loss(logits_SN), logits_SN)
    expected = 2 * logits_SN.logsumexp(-1, keepdim=True) * logits_SN.softmax(-1) / 64
    torch.testing.assert_close(gradient, expected)
    assert z_loss(_logits().bfloat16()).dtype == torch.float32


def test_jitter_is_uniform_noise_from_its_own_generator() -> None:
    x = torch.ones(40_000)
    noisy = jitter(x, 0.1, torch.Generator().manual_seed(3))
    assert 0.9 <= noisy.min() < 0.901
    assert 1.099 < noisy.max() <= 1.1
    assert noisy.var().item() == pytest.approx(0.2**2 / 12, rel=0.03)
    assert torch.equal(noisy, jitter(x, 0.1, torch.Generator().manual_seed(3)))
    assert jitter(x, 0.0) is x
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        jitter(x, 1.0)
