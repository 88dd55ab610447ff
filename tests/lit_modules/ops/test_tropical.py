"""The tropical operators: mathematics, parity of the three paths, both tie rules, and refusal of bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lit_modules.ops.tropical import tropical_conv2d, tropical_matmul

KINDS = [(inner, outer) for inner in ("min", "max") for outer in ("sum", "min", "max")]
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "uneven": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "grouped": {"groups": 2, "padding": 1},
    "neutral": {"padding": 1, "padding_value": "neutral"},
    "replicate": {"padding": 1, "padding_value": "replicate"},
}
INF = float("inf")


def _tensors(groups: int = 1, batch: int = 5, tied: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 7, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(6, 4 // groups, 3, 2, generator=generator, dtype=torch.float64)
    return (x.round(), w.round()) if tied else (x, w)


def _by_hand(
    x: Tensor, w: Tensor, inner: str, outer: str, stride: int = 1, padding: int = 0, value: float = 0.0
) -> Tensor:
    """The definition as scalar loops, for one group."""
    reduce = {"min": min, "max": max, "sum": sum}
    padded = torch.nn.functional.pad(x, (padding,) * 4, value=value)
    high = (padded.shape[2] - w.shape[2]) // stride + 1
    wide = (padded.shape[3] - w.shape[3]) // stride + 1
    y = torch.empty(x.shape[0], w.shape[0], high, wide, dtype=x.dtype)
    for b, f, p, q in torch.cartesian_prod(*(torch.arange(n) for n in y.shape)).tolist():
        channels = []
        for c in range(x.shape[1]):
            sums = [
                float(padded[b, c, p * stride + i, q * stride + j] + w[f, c, i, j])
                for i in range(w.shape[2])
                for j in range(w.shape[3])
            ]
            channels.append(reduce[inner](sums))
        y[b, f, p, q] = reduce[outer](channels)
    return y


@pytest.mark.parametrize(("inner", "outer"), KINDS)
@pytest.mark.parametrize("backend", ["compiled", "portable", "reference"])
def test_values_are_the_definition(inner: str, outer: str, backend: str) -> None:
    x, w = _tensors(batch=2)
    y = tropical_conv2d(x, w, inner=inner, outer=outer, stride=2, padding=1, backend=backend)
    assert torch.allclose(y, _by_hand(x, w, inner, outer, 2, 1), atol=1e-12)


@pytest.mark.parametrize(("inner", "outer"), KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("ties", ["first", "split"])
@pytest.mark.parametrize("tied", [False, True])
def test_all_paths_give_the_same_values_and_gradients(inner, outer, geometry, ties, tied) -> None:
    options = {"inner": inner, "outer": outer, "ties": ties, **GEOMETRIES[geometry]}
    groups = options.get("groups", 1)
    x, w = _tensors(groups, tied=tied)
    mixes = [None, torch.randn(6, 4 // groups, dtype=torch.float64)] if outer == "sum" else [None]
    bias = torch.randn(6, dtype=torch.float64)
    for mix in mixes:
        found = []
        for backend in ("reference", "compiled", "portable"):
            leaves = [t.clone().requires_grad_() for t in (x, w, bias, *([] if mix is None else [mix]))]
            extra = {"mix_FC": leaves[3]} if mix is not None else {}
            y = tropical_conv2d(leaves[0], leaves[1], bias_F=leaves[2], backend=backend, **extra, **options)
            cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
            found.append([y, *torch.autograd.grad(y, leaves, cotangent)])
        for other in found[1:]:
            for expected, got in zip(found[0], other, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 255, 256, 257, 513])
def test_the_compiled_tiles_meet_at_any_batch_size(batch: int) -> None:
    x, w = torch.randn(batch, 2, 5, 5), torch.randn(3, 2, 3, 3)
    leaves = [(x.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    outputs = [
        tropical_conv2d(*pair, inner="max", outer="sum", padding=1, backend=backend)
        for pair, backend in zip(leaves, ("compiled", "reference"), strict=True)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])
    cotangent = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, pair, cotangent) for y, pair in zip(outputs, leaves, strict=True)]
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inner", "outer"), KINDS)
@pytest.mark.parametrize("backend", ["compiled", "portable"])
def test_gradcheck_away_from_ties(inner: str, outer: str, backend: str) -> None:
    """Distinct spaced values keep finite differences off the kinks."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randperm(2 * 2 * 16, generator=generator, dtype=torch.float64) / 7).reshape(2, 2, 4, 4).requires_grad_()
    w = (
        (torch.randperm(2 * 2 * 4, generator=generator, dtype=torch.float64) * 0.0131)
        .reshape(2, 2, 2, 2)
        .requires_grad_()
    )

    def op(x: Tensor, w: Tensor) -> Tensor:
        return tropical_conv2d(x, w, inner=inner, outer=outer, backend=backend)

    assert torch.autograd.gradcheck(op, (x, w), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["compiled", "portable", "reference"])
def test_tie_rules_against_the_subgradient_formulas(backend: str) -> None:
    """x = (2, 1, 1), w = 0: the min is 1, attained by taps 1 and 2."""
    x = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64)
    expected = {"first": [0.0, 1.0, 0.0], "split": [0.0, 0.5, 0.5]}
    for ties, winners in expected.items():
        w = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        inputs = x.clone().requires_grad_()
        tropical_matmul(inputs, w, kind="min", ties=ties, backend=backend).sum().backward()
        assert w.grad.tolist() == [winners]
        assert inputs.grad.tolist() == [winners]


@pytest.mark.parametrize("backend", ["compiled", "portable", "reference"])
def test_channel_ties_go_to_the_first_channel_or_are_shared(backend: str) -> None:
    for ties, shares in {"first": [1.0, 0.0, 0.0], "split": [0.5, 0.5, 0.0]}.items():
        x = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).reshape(1, 3, 1, 1).requires_grad_()
        w = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
        tropical_conv2d(x, w, inner="min", outer="max", ties=ties, backend=backend).sum().backward()
        assert x.grad.flatten().tolist() == shares


@pytest.mark.parametrize("kind", ["min", "max"])
def test_semiring_laws(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-9, 9, shape, generator=generator).double() for shape in ((4, 5), (5, 6), (6, 3)))
    join = torch.minimum if kind == "min" else torch.maximum

    def product(p: Tensor, q: Tensor) -> Tensor:
        return tropical_matmul(p, q.T.contiguous(), kind=kind)

    assert torch.equal(product(product(a, b), c), product(a, product(b, c)))
    other = torch.randint(-9, 9, b.shape, generator=generator).double()
    assert torch.equal(product(a, join(b, other)), join(product(a, b), product(a, other)))
    zero = INF if kind == "min" else -INF
    identity = torch.full((5, 5), zero, dtype=torch.float64).fill_diagonal_(0.0)
    assert torch.equal(product(a, identity), a)
    assert torch.equal(product(a, torch.full_like(b, zero)), torch.full((4, 6), zero, dtype=torch.float64))


@pytest.mark.parametrize(("inner", "outer"), KINDS)
def test_duality_homogeneity_and_monotonicity(inner: str, outer: str) -> None:
    x, w = _tensors()
    y = tropical_conv2d(x, w, inner=inner, outer=outer)
    swap = {"min": "max", "max": "min", "sum": "sum"}
    torch.testing.assert_close(-tropical_conv2d(-x, -w, inner=swap[inner], outer=swap[outer]), y)
    shift = 0.75 * (4 if outer == "sum" else 1)
    torch.testing.assert_close(tropical_conv2d(x + 0.75, w, inner=inner, outer=outer), y + shift)
    above = tropical_conv2d(x + torch.rand_like(x), w, inner=inner, outer=outer)
    assert (above >= y).all()


def test_padding_values() -> None:
    x, w = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 3, 3)
    corner = {0.0: 0.0, 5.0: 1.0, "neutral": 1.0, "replicate": 1.0, -3.0: -3.0}
    for value, expected in corner.items():
        y = tropical_conv2d(x, w, inner="min", outer="sum", padding=1, padding_value=value)
        assert y[0, 0, 0, 0] == expected


@pytest.mark.parametrize("inner", ["min", "max"])
@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_nan_comes_out_where_it_goes_in(inner: str, backend: str) -> None:
    x, w = torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 2, 2)
    x[0, 0, 1, 1] = float("nan")
    y = tropical_conv2d(x, w, inner=inner, outer="sum", backend=backend)
    assert torch.isnan(y[0]).sum() == 4
    assert not torch.isnan(y[1]).any()


@pytest.mark.parametrize("backend", ["compiled", "portable", "reference"])
def test_infinity_never_wins_and_takes_no_gradient(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[INF, 0.0]], dtype=torch.float64, requires_grad=True)
    y = tropical_matmul(x, w, kind="min", backend=backend)
    assert y.item() == 2.0
    y.sum().backward()
    assert w.grad.tolist() == [[0.0, 1.0]]


def test_matmul_keeps_leading_sizes_and_takes_an_empty_batch() -> None:
    x, w = torch.randn(2, 3, 5), torch.randn(4, 5)
    y = tropical_matmul(x, w, kind="max")
    torch.testing.assert_close(y, (x[..., None, :] + w).amax(-1))
    assert tropical_matmul(torch.empty(0, 5), w, kind="max").shape == (0, 4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
def test_an_empty_batch_gives_an_empty_output_and_gradients_of_zero(geometry: str, backend: str) -> None:
    x, w = _tensors(GEOMETRIES[geometry].get("groups", 1))
    mix, bias = torch.ones(w.shape[:2], dtype=w.dtype), torch.ones(6, dtype=w.dtype)
    full = tropical_conv2d(x, w, inner="min", outer="sum", **GEOMETRIES[geometry])
    w[0, 0, 0, 0] = INF
    leaves = [t.clone().requires_grad_() for t in (x[:0], w, mix, bias)]
    y = tropical_conv2d(
        leaves[0],
        leaves[1],
        inner="min",
        outer="sum",
        mix_FC=leaves[2],
        bias_F=leaves[3],
        backend=backend,
        **GEOMETRIES[geometry],
    )
    assert y.shape == (0, *full.shape[1:])
    y.sum().backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_half_precision_takes_the_portable_path() -> None:
    x, w = torch.randn(2, 2, 5, 5).bfloat16(), torch.randn(3, 2, 3, 3).bfloat16()
    y = tropical_conv2d(x, w, inner="min", outer="max")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, tropical_conv2d(x, w, inner="min", outer="max", backend="reference"))


def test_the_same_input_gives_the_same_bits() -> None:
    x, w = torch.randn(300, 2, 9, 9), torch.randn(4, 2, 3, 3)
    runs = []
    for _ in range(2):
        leaf = w.clone().requires_grad_()
        tropical_conv2d(x, leaf, inner="min", outer="sum").square().sum().backward()
        runs.append(leaf.grad)
    assert torch.equal(*runs)


def test_second_derivatives_are_refused_not_wrong() -> None:
    w = torch.randn(1, 3, requires_grad=True)
    y = tropical_matmul(torch.randn(2, 3), w, kind="min").square().sum()
    (first,) = torch.autograd.grad(y, w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


MEMORY = """
import resource, torch
from lit_modules.ops.tropical import tropical_conv2d
torch.set_num_threads(1)
small = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(32, 16, 5, 5, requires_grad=True)
tropical_conv2d(*small, inner="min", outer="sum").sum().backward()
x, w = torch.randn(64, 16, 32, 32, requires_grad=True), torch.randn(32, 16, 5, 5, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = tropical_conv2d(x, w, inner="min", outer="sum")
y.backward(torch.ones_like(y))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
operands = 4 * (x.numel() + w.numel() + y.numel())
print(grown / operands, 4 * y.numel() * 16 * 25 / operands)
"""


def test_memory_is_that_of_the_operands_not_of_the_patches() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    grown, patches = map(float, done.stdout.split())
    assert patches > 200  # what a broadcast would take, in the same unit
    assert grown < 8


X, W = torch.zeros(1, 2, 4, 4), torch.zeros(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tropical_conv2d(X[0], W, inner="min", outer="sum"), ValueError, r"\(B, C, H, W\)"),
        (lambda: tropical_conv2d(X, W[:, :1], inner="min", outer="sum"), ValueError, "groups"),
        (lambda: tropical_conv2d(X, W[:3, :1], inner="min", outer="sum", groups=2), ValueError, "groups must divide"),
        (lambda: tropical_conv2d(X, W[:, :, :0], inner="min", outer="sum"), ValueError, "nothing to reduce"),
        (lambda: tropical_conv2d(X, W, inner="min", outer="sum", dilation=3), ValueError, "does not fit"),
        (lambda: tropical_conv2d(X, W, inner="mean", outer="sum"), ValueError, "'mean'"),
        (lambda: tropical_conv2d(X, W, inner="min", outer="prod"), ValueError, "'prod'"),
        (lambda: tropical_conv2d(X, W, inner="min", outer="sum", ties="all"), ValueError, "'all'"),
        (lambda: tropical_conv2d(X, W, inner="min", outer="sum", stride=0), ValueError, "stride"),
        (lambda: tropical_conv2d(X, W, inner="min", outer="sum", padding=-1), ValueError, "padding"),
        (
            lambda: tropical_conv2d(X, W, inner="min", outer="sum", padding=1, padding_value="zero"),
            ValueError,
            "'zero'",
        ),
        (lambda: tropical_conv2d(X, W, inner="min", outer="max", mix_FC=torch.zeros(4, 2)), ValueError, "no meaning"),
        (
            lambda: tropical_conv2d(X, W, inner="min", outer="sum", mix_FC=torch.zeros(2, 4)),
            ValueError,
            "mix must have",
        ),
        (lambda: tropical_conv2d(X, W, inner="min", outer="sum", bias_F=torch.zeros(3)), ValueError, "bias must have"),
        (lambda: tropical_conv2d(X, W.double(), inner="min", outer="sum"), TypeError, "float64"),
        (lambda: tropical_conv2d(X.long(), W.long(), inner="min", outer="sum"), TypeError, "floating"),
        (
            lambda: tropical_conv2d(X.half(), W.half(), inner="min", outer="sum", backend="compiled"),
            ValueError,
            "compiled",
        ),
        (lambda: tropical_matmul(torch.zeros(2, 3), torch.zeros(4, 5), kind="min"), ValueError, "share K"),
        (lambda: tropical_matmul(torch.zeros(2, 0), torch.zeros(4, 0), kind="min"), ValueError, "zero inputs"),
    ],
)
def test_bad_input_is_named(call, error, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
