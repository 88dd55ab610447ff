"""Backpropagation as the paper derives it, against the formulas written out as loops.

For a min-plus layer g_i = min over j of (W_ij + f_j), let J(i) be the set of j that attain it and G_i = dL/dg_i:

    first:  dL/dW_ij = G_i if j is the first of J(i), else 0
    split:  dL/dW_ij = G_i / |J(i)| if j is in J(i), else 0
    dL/df_j = sum over i of the same terms

and the same with max for a max-plus layer. Several samples add up in dL/dW.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lit_modules.nets.layers import TropicalLinear
from lit_modules.nets.mmp import TYPES, MMPNet, type_spec
from lit_modules.ops.tropical import tropical_matmul

BACKENDS = ("compiled", "portable", "reference")


def _explicit(f_NJ: Tensor, w_IJ: Tensor, g_NI: Tensor, kind: str, ties: str) -> tuple[Tensor, Tensor, int]:
    """dL/df, dL/dW and the number of (sample, output) pairs with more than one winner."""
    df, dw, tied = torch.zeros_like(f_NJ), torch.zeros_like(w_IJ), 0
    best = {"min": min, "max": max}[kind]
    for n, f in enumerate(f_NJ.tolist()):
        for i, w in enumerate(w_IJ.tolist()):
            sums = [a + b for a, b in zip(w, f, strict=True)]
            winners = [j for j, value in enumerate(sums) if value == best(sums)]
            tied += len(winners) > 1
            for j in winners if ties == "split" else winners[:1]:
                share = g_NI[n, i] / (len(winners) if ties == "split" else 1)
                dw[i, j] += share
                df[n, j] += share
    return df, dw, tied


def _operands(tied: bool, seed: int, n: int = 9, i: int = 4, j: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    f, w, g = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((n, j), (i, j), (n, i)))
    return (f.round(), w.round(), g) if tied else (f, w, g)


@pytest.mark.parametrize("kind", ["min", "max"])
@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_the_explicit_subgradients(kind: str, ties: str, backend: str, tied: bool) -> None:
    for seed in range(3):
        f, w, g = _operands(tied, seed)
        leaves = f.clone().requires_grad_(), w.clone().requires_grad_()
        out = tropical_matmul(*leaves, kind=kind, ties=ties, backend=backend)
        df, dw = torch.autograd.grad(out, leaves, g)
        expected_df, expected_dw, ties_met = _explicit(f, w, g, kind, ties)
        assert (ties_met >= 5) if tied else (ties_met == 0)
        torch.testing.assert_close(df, expected_df, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dw, expected_dw, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_rules_differ_where_there_are_ties_and_only_there(backend: str) -> None:
    for tied in (False, True):
        f, w, g = _operands(tied, 0)
        w.requires_grad_()
        first, split = (
            torch.autograd.grad(tropical_matmul(f, w, kind="min", ties=ties, backend=backend), w, g)[0]
            for ties in ("first", "split")
        )
        assert torch.allclose(first, split, rtol=1e-12, atol=1e-12) != tied
        torch.testing.assert_close(first.sum(1), split.sum(1))  # what an output hands out does not depend on the rule


@pytest.mark.parametrize("kind", ["min", "max"])
@pytest.mark.parametrize("ties", ["first", "split"])
def test_the_layer_itself_follows_the_rule(kind: str, ties: str) -> None:
    f, w, g = _operands(True, 5)
    layer = TropicalLinear(7, 4, kind=kind, ties=ties, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(w)
    x = f.clone().requires_grad_()
    layer(x).backward(g)
    df, dw, _ = _explicit(f, w, g, kind, ties)
    torch.testing.assert_close(x.grad, df, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, dw, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tied_is_the_extreme_case(ties: str, backend: str) -> None:
    """Zero weights and equal inputs: J(i) is everything. The sum over all weights of a row is G_i, whatever the rule."""
    w = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    f = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.float64)
    df, dw = torch.autograd.grad(tropical_matmul(f, w, kind="max", ties=ties, backend=backend), (f, w), g)
    row = {"first": [1.0, 0.0, 0.0, 0.0, 0.0], "split": [0.2] * 5}[ties]
    torch.testing.assert_close(dw, g.sum(0)[:, None] * torch.tensor(row, dtype=torch.float64))
    torch.testing.assert_close(df, g.sum(1)[:, None] * torch.tensor(row, dtype=torch.float64))


@pytest.mark.parametrize("ties", ["first", "split"])
def test_through_two_layers_the_chain_of_formulas_holds(ties: str) -> None:
    """L m M: the formulas applied one after the other, with ties in both tropical layers."""
    net = MMPNet("L6 m5 M3", 4, ties=ties).double()
    x, _, _ = _operands(True, 1, n=8, j=4)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((2 * torch.randn(parameter.shape, generator=generator)).round())
    linear, lower, upper = net[1], net[2], net[3]
    f = linear(x)
    h = lower(f)
    g = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net(x).backward(g)
    dh, d_upper, ties_above = _explicit(h.detach(), upper.weight.detach(), g, "max", ties)
    df, d_lower, ties_below = _explicit(f.detach(), lower.weight.detach(), dh, "min", ties)
    assert min(ties_above, ties_below) > 0
    expected = {"upper": d_upper, "lower": d_lower, "linear": df.T @ x, "bias": df.sum(0)}
    found = {"upper": upper.weight, "lower": lower.weight, "linear": linear.weight, "bias": linear.bias}
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("ties", ["first", "split"])
def test_gradcheck_through_whole_nets_at_generic_points(name: str, ties: str) -> None:
    torch.manual_seed(3)
    net = MMPNet(type_spec(name, outputs=2, width=4, pairs=2), 3, ties=ties).double()
    names, values = zip(*net.named_parameters(), strict=True)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    assert _margin(net, x.detach()) > 1e-4  # no kink within the finite differences' reach
    assert torch.autograd.gradcheck(run, (x, *values), eps=1e-6, atol=1e-7, rtol=1e-6)


def _margin(net: MMPNet, x: Tensor) -> float:
    """The least distance between the first and the second of a tropical layer, over all of them."""
    least = float("inf")
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, TropicalLinear):
                sums = (x[:, None, :] + layer.weight).sort(-1, descending=layer.kind == "max").values
                least = min(least, (sums[..., 1] - sums[..., 0]).abs().min().item())
            x = layer(x)
    return least
