"""The two layouts of the compiled tropical convolution, each forced, against the float64 definition over many shapes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_modules.ops import tropical, tropical_compiled, tropical_direct
from lit_modules.ops.geometry import Geometry
from lit_modules.ops.tropical import tropical_conv2d
from lit_modules.ops.tropical_reference import conv2d_reference

INF, NAN = float("inf"), float("nan")
KINDS = [(inner, outer) for inner in ("min", "max") for outer in ("sum", "min", "max")]


class Case:
    """A random small problem; every seed another mixture of sizes, odd and even, wider and narrower than a block."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.inner, self.outer = KINDS[seed % len(KINDS)]
        kernel = draw.randint(1, 4), draw.randint(1, 6)
        stride, dilation = (draw.randint(1, 3), draw.randint(1, 2)), (draw.randint(1, 2), draw.randint(1, 3))
        self.padding = draw.randint(0, 2), draw.randint(0, 3)
        self.output = draw.randint(1, 7), draw.choice([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
        self.groups, channels, filters = draw.choice([1, 1, 2, 3]), draw.randint(1, 5), draw.randint(1, 5)
        self.geometry = Geometry(kernel, stride, dilation, self.groups, self.output)
        reach = [dilation[i] * (kernel[i] - 1) + 1 + (self.output[i] - 1) * stride[i] for i in (0, 1)]
        size = [max(reach[i] + draw.randint(0, stride[i] - 1) - 2 * self.padding[i], 1) for i in (0, 1)]
        self.output = tuple(
            (size[i] + 2 * self.padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
        )
        self.geometry = Geometry(kernel, stride, dilation, self.groups, self.output)
        self.value = draw.choice([0.0, -1.5, INF if self.inner == "min" else -INF])
        generator = torch.Generator().manual_seed(seed)
        batch = draw.choice([1, 2, 5, 33])
        self.x = torch.randn(batch, self.groups * channels, *size, generator=generator, dtype=torch.float64)
        self.w = torch.randn(self.groups * filters, channels, *kernel, generator=generator, dtype=torch.float64)
        if seed % 3 == 0:  # ties in plenty
            self.x, self.w = self.x.round(), self.w.round()
        shape = (batch, self.groups * filters, *self.output)
        self.cotangent = torch.randn(shape, generator=generator, dtype=torch.float64)

    def direct(self, x: Tensor, w: Tensor) -> Tensor:
        plan = tropical_direct.make_plan(x.shape, self.geometry, len(w), w.shape[1], self.padding)
        y = tropical_direct.conv2d(x, w, self.inner, self.outer, plan, self.value, self.output)
        assert y is not None
        return y

    def batch_last(self, x: Tensor, w: Tensor) -> Tensor:
        return tropical_compiled.conv2d(self._padded(x), w, None, self.inner, self.outer, self.geometry, "first")

    def reference(self, x: Tensor, w: Tensor) -> Tensor:
        return conv2d_reference(self._padded(x), w, None, self.inner, self.outer, self.geometry, "first")

    def _padded(self, x: Tensor) -> Tensor:
        (high, wide), value = self.padding, self.value
        return F.pad(x, (wide, wide, high, high), value=value)

    def results(self, op: Any, dtype: torch.dtype, of_input: bool = True) -> list[Tensor]:
        leaves = [self.x.to(dtype).requires_grad_(of_input), self.w.to(dtype).requires_grad_()]
        y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves[0 if of_input else 1 :], self.cotangent.to(dtype))]


@pytest.mark.parametrize("seed", range(90))
def test_both_layouts_give_the_values_and_gradients_of_the_definition(seed: int) -> None:
    case = Case(seed)
    expected = case.results(case.reference, torch.float64)
    layouts = [case.batch_last]
    if case.geometry.stride[1] <= 2:  # the direct kernels are for no wider strides
        layouts.append(case.direct)
    for layout in layouts:
        for got, wanted in zip(case.results(layout, torch.float64), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        values_only = case.results(layout, torch.float64, of_input=False)
        torch.testing.assert_close(values_only[1], expected[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(0, 24, 3))  # whole numbers, so that float32 has the same winners
def test_float32_is_as_near_as_float32_can_be(seed: int) -> None:
    case = Case(seed)
    expected = case.results(case.reference, torch.float64)
    for layout in [case.batch_last, *([case.direct] if case.geometry.stride[1] <= 2 else [])]:
        for got, wanted in zip(case.results(layout, torch.float32), expected, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 64, 257])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("of_input", [True, False])
def test_groups_of_images_meet_at_any_batch_size(batch: int, stride: int, of_input: bool) -> None:
    """The last images cut together are fewer; nothing of those before may stay."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 2, 16, 15, generator=generator).requires_grad_(of_input)
    w = torch.randn(3, 2, 3, 3, generator=generator, requires_grad=True)
    leaves, found = ([x, w] if of_input else [w]), []
    for backend in ("compiled", "reference"):
        y = tropical_conv2d(x, w, inner="max", outer="sum", padding=1, stride=stride, backend=backend)
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [50, 61])
def test_an_image_longer_than_a_tile(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(2, 1, side, side, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 1, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert side * side > tropical_direct.kernels.TILE
    found = []
    for backend in ("compiled", "reference"):
        y = tropical_conv2d(x, w, inner="min", outer="sum", padding=2, backend=backend)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        found.append([y, *torch.autograd.grad(y, (x, w), cotangent)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("the other layout was to be taken")


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options", "direct"),
    [
        ((64, 1, 28, 28), (4, 1, 3, 3), {"stride": 2, "padding": 1}, True),
        ((64, 4, 14, 14), (4, 4, 3, 3), {"stride": 2, "padding": 1}, True),
        ((64, 3, 32, 32), (4, 3, 3, 3), {"stride": 2, "padding": 1}, True),
        ((8, 1, 28, 28), (6, 1, 5, 5), {"padding": 2, "padding_value": "replicate"}, True),
        ((8, 6, 14, 14), (16, 6, 5, 5), {}, False),  # too many channels
        ((8, 1, 28, 28), (6, 1, 5, 5), {"padding": 2, "ties": "split"}, False),
        ((8, 1, 30, 30), (6, 1, 5, 5), {"stride": 3}, False),
        ((8, 1, 1, 40), (6, 1, 1, 40), {}, False),  # a matrix product
        ((8, 1, 40, 40), (6, 1, 16, 16), {}, False),  # more taps than a byte can name
    ],
)
def test_the_rule_that_chooses_the_layout(x_shape, w_shape, options, direct: bool, monkeypatch) -> None:
    monkeypatch.setattr(tropical_compiled if direct else tropical_direct, "conv2d", _refuse)
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(x_shape, generator=generator), torch.randn(w_shape, generator=generator)
    y = tropical_conv2d(x, w, inner="min", outer="sum", **options)
    torch.testing.assert_close(y, tropical_conv2d(x, w, inner="min", outer="sum", backend="reference", **options))


@pytest.mark.parametrize("inner", ["min", "max"])
@pytest.mark.parametrize("place", ["input", "weight", "padding"])
def test_nan_is_seen_and_the_portable_path_takes_over(inner: str, place: str) -> None:
    x, w = torch.zeros(2, 1, 9, 9, requires_grad=True), torch.zeros(2, 1, 3, 3, requires_grad=True)
    with torch.no_grad():
        if place == "input":
            x[1, 0, 8, 8] = NAN
        if place == "weight":
            w[1, 0, 2, 2] = NAN
    value = NAN if place == "padding" else 0.0
    ys = [
        tropical_conv2d(x, w, inner=inner, outer="sum", padding=1, padding_value=value, backend=backend)
        for backend in ("auto", "portable")
    ]
    assert torch.isnan(ys[0]).any()
    assert torch.equal(torch.isnan(ys[0]), torch.isnan(ys[1]))
    ys[0].nansum().backward()  # the portable path's gradients


def test_infinities_that_meet_give_nan_as_in_the_definition() -> None:
    x, w = torch.full((1, 1, 6, 6), INF), torch.full((1, 1, 3, 3), -INF)
    assert torch.isnan(tropical_conv2d(x, w, inner="min", outer="sum")).all()


def test_infinite_pixels_take_no_gradient() -> None:
    x, w = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 3, 3, requires_grad=True)
    x[:, :, 3] = INF
    x.requires_grad_()
    y = tropical_conv2d(x, w, inner="min", outer="sum", padding=1, padding_value="neutral")
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert (x.grad[:, :, 3] == 0).all()
    assert x.grad.sum() == y.numel()


@pytest.mark.parametrize("stride", [1, 2])
def test_operands_and_gradients_may_lie_in_memory_in_any_way(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 13, 12, generator=generator, dtype=torch.float64)
    w = torch.randn(3, 3, 4, 3, generator=generator, dtype=torch.float64)
    plain, turned = (x.clone(), w.clone()), (x.to(memory_format=torch.channels_last), w.mT.contiguous().mT)
    assert not turned[0].is_contiguous()
    assert not turned[1].is_contiguous()
    found = []
    for operands in (plain, turned):
        leaves = [t.requires_grad_() for t in operands]
        y = tropical_conv2d(*leaves, inner="min", outer="max", stride=stride, padding=1, backend="compiled")
        cotangent = torch.ones((), dtype=y.dtype).expand(y.shape)
        found.append([y, *torch.autograd.grad(y, leaves, cotangent)])
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    x, w = torch.randn(7, 2, 10, 10), torch.randn(3, 2, 3, 3, requires_grad=True)
    y = tropical_conv2d(x, w, inner="min", outer="min", stride=2)
    with torch.no_grad():
        free = tropical_conv2d(x, w, inner="min", outer="min", stride=2)
    assert torch.equal(free, y)
    assert free.grad_fn is None
    assert not free.requires_grad


def test_the_winners_are_freed_by_the_first_backward_and_second_derivatives_refused() -> None:
    x, w = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 3, 3, requires_grad=True)
    y = tropical_conv2d(x, w, inner="min", outer="sum")
    (first,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    y = tropical_conv2d(x, w, inner="min", outer="sum").sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_the_same_input_gives_the_same_bits() -> None:
    x, w = torch.randn(70, 3, 17, 17, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    runs = []
    for _ in range(2):
        y = tropical_conv2d(x, w, inner="max", outer="sum", stride=2, padding=1)
        runs.append([y, *torch.autograd.grad(y.square().sum(), (x, w))])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_what_has_been_checked_is_kept_but_bad_calls_are_refused_again() -> None:
    x, w = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 3, 3)
    tropical._settle.cache_clear()
    for _ in range(3):
        tropical_conv2d(x, w, inner="min", outer="sum")
    assert tropical._settle.cache_info().hits == 2
    for _ in range(2):
        with pytest.raises(ValueError, match="stride"):
            tropical_conv2d(x, w, inner="min", outer="sum", stride=0)
    both = (tropical_conv2d(x, w, inner="min", outer="sum", stride=stride) for stride in (2, [2, 2]))
    assert torch.equal(*both)


def test_the_kernel_file_leans_on_no_other_kernels() -> None:
    """numba's cache would not notice a change there; the copies of blocks say so themselves."""
    text = Path(tropical_direct.kernels.__file__).read_text()
    imported = [line for line in text.splitlines() if line.startswith(("from lit_modules", "import lit_modules"))]
    assert imported == ["from lit_modules.ops._tropical_blocks import block_copy"]
