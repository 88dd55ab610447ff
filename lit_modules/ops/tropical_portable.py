"""The tropical convolution in plain torch for any device and type, one kernel offset at a time: memory O(output).

Legend: B batch, G groups, C channels per group, F filters per group, O P output positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_modules.ops.geometry import Geometry


def conv2d(
    x_BCHW: Tensor, w_FCKL: Tensor, mix_FC: Tensor | None, inner: str, outer: str, geometry: Geometry, ties: str
) -> Tensor:
    """Return the tropical convolution of an already padded input; NaN goes through.

    Args as `lit_modules.ops.tropical.tropical_conv2d`.
    """
    mix = mix_FC if mix_FC is not None else x_BCHW.new_empty(0, 0)
    return _Conv2d.apply(x_BCHW, w_FCKL, mix, inner, outer, geometry, ties)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, mix: Tensor, inner: str, outer: str, geometry: Geometry, ties: str
    ) -> Tensor:
        ctx.save_for_backward(x, w, mix)
        ctx.rule = (inner, outer, geometry, ties)
        window = _Window(x, w, mix, inner, geometry)
        y_BGFOP = window.value(0)
        for c in range(1, w.shape[1]):
            y_BGFOP = _join(outer, y_BGFOP, window.value(c))
        return y_BGFOP.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, mix = ctx.saved_tensors
        inner, outer, geometry, ties = ctx.rule
        window = _Window(x, w, mix, inner, geometry)
        g_BGFOP = g.unflatten(1, (geometry.groups, -1))
        shares = _channel_shares(window, outer, ties)
        for c in range(w.shape[1]):
            window.scatter(c, shares(c, g_BGFOP), ties)
        dmix = window.dmix.flatten(0, 1) if mix.numel() else None
        return window.dx.flatten(1, 2), window.dw.flatten(0, 1), dmix, None, None, None, None


class _Window:
    """One channel's window values and gradients, walked offset by offset."""

    def __init__(self, x: Tensor, w: Tensor, mix: Tensor, inner: str, geometry: Geometry) -> None:
        groups = geometry.groups
        self.inner, self.geometry = inner, geometry
        self.x_BGCHW = x.unflatten(1, (groups, -1))
        self.w_GFCKL = w.unflatten(0, (groups, -1))
        self.mix_GFC = mix.unflatten(0, (groups, -1)) if mix.numel() else None
        self.dx, self.dw = torch.zeros_like(self.x_BGCHW), torch.zeros_like(self.w_GFCKL)
        self.dmix = torch.zeros_like(self.mix_GFC) if self.mix_GFC is not None else x.new_empty(0)

    def sums(self, c: int, k: int, q: int) -> Tensor:
        """x + w at one kernel offset of channel c: (B, G, F, O, P)."""
        return self.geometry.view(self.x_BGCHW[:, :, c], k, q)[:, :, None] + self.w_GFCKL[:, :, c, k, q, None, None]

    def reduced(self, c: int) -> Tensor:
        """The inner min or max of channel c: (B, G, F, O, P)."""
        best = self.sums(c, 0, 0)
        for k, q in self.geometry.offsets[1:]:
            best = _join(self.inner, best, self.sums(c, k, q))
        return best

    def value(self, c: int) -> Tensor:
        """The same, weighted if there are channel weights."""
        reduced = self.reduced(c)
        return reduced if self.mix_GFC is None else reduced * self.mix_GFC[:, :, c, None, None]

    def scatter(self, c: int, g_BGFOP: Tensor, ties: str) -> None:
        """Add the gradients of sum(g * value(c)) to dx, dw and dmix."""
        best = self.reduced(c)
        if self.mix_GFC is not None:
            self.dmix[:, :, c] = (g_BGFOP * best).sum((0, 3, 4))
            g_BGFOP = g_BGFOP * self.mix_GFC[:, :, c, None, None]
        if ties == "split":
            g_BGFOP = g_BGFOP / sum((self.sums(c, k, q) == best).to(g_BGFOP.dtype) for k, q in self.geometry.offsets)
        taken = torch.zeros_like(best, dtype=torch.bool)
        for k, q in self.geometry.offsets:
            wins = (self.sums(c, k, q) == best) & ~taken
            if ties == "first":
                taken |= wins
            part = torch.where(wins, g_BGFOP, torch.zeros_like(g_BGFOP))
            self.geometry.view(self.dx[:, :, c], k, q).add_(part.sum(2))
            self.dw[:, :, c, k, q] = part.sum((0, 3, 4))


def _join(kind: str, a: Tensor, b: Tensor) -> Tensor:
    if kind == "sum":
        return a + b
    return torch.minimum(a, b) if kind == "min" else torch.maximum(a, b)


def _channel_shares(window: _Window, outer: str, ties: str) -> Any:
    """Return share(c, g): the part of the output's gradient that goes to channel c."""
    if outer == "sum":
        return lambda c, g: g
    channels = range(window.w_GFCKL.shape[2])
    best = window.value(0)
    for c in channels[1:]:
        best = _join(outer, best, window.value(c))
    if ties == "split":
        tied = sum((window.value(c) == best).to(best.dtype) for c in channels)
        return lambda c, g: torch.where(window.value(c) == best, g / tied, torch.zeros_like(g))
    first = torch.full_like(best, len(channels), dtype=torch.long)
    for c in reversed(channels):
        first = torch.where(window.value(c) == best, torch.full_like(first, c), first)
    return lambda c, g: torch.where(first == c, g, torch.zeros_like(g))
