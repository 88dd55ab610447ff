"""Exact counts of scalar operations per image, by formula.

Legend: C input channels per group, F output channels, P = F * H' * W' outputs, K kernel positions, n inputs, m outputs of a
linear layer. A padded position counts like any other, as in the dense formula. Sums of n terms are n - 1 additions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpCount:
    """Scalar multiplications, additions (subtractions too) and comparisons (one per min or max of two)."""

    multiplications: int = 0
    additions: int = 0
    comparisons: int = 0

    def __add__(self, other: OpCount) -> OpCount:
        return OpCount(
            self.multiplications + other.multiplications,
            self.additions + other.additions,
            self.comparisons + other.comparisons,
        )

    @property
    def total(self) -> int:
        """All three together."""
        return self.multiplications + self.additions + self.comparisons


def conv2d_ops(outputs: int, channels: int, kernel: int, bias: bool) -> OpCount:
    """Return the count of an ordinary convolution: P outputs, C channels per group, K kernel positions."""
    terms = channels * kernel
    return OpCount(outputs * terms, outputs * (terms - 1 + bias), 0)


def linear_ops(inputs: int, outputs: int, bias: bool) -> OpCount:
    """Return the count of an n-to-m linear layer."""
    return OpCount(outputs * inputs, outputs * (inputs - 1 + bias), 0)


def tropical_linear_ops(inputs: int, outputs: int, bias: bool = False) -> OpCount:
    """Return the count of an n-to-m min-plus or max-plus layer: no multiplication at all."""
    return OpCount(0, outputs * (inputs + bias), outputs * (inputs - 1))


def tropical_conv2d_ops(outputs: int, channels: int, kernel: int, outer: str, bias: bool = False) -> OpCount:
    """Return the count of one of the six tropical convolutions; `outer` is "sum", "min" or "max"."""
    joins = outputs * (channels - 1)
    within = outputs * channels * (kernel - 1)
    sums = outputs * (channels * kernel + bias)
    return OpCount(0, sums + joins, within) if outer == "sum" else OpCount(0, sums, within + joins)


def mixed_conv2d_ops(outputs: int, channels: int, kernel: int, mode: str, kernels: int, bias: bool = False) -> OpCount:
    """Return the count of a compound (kernels=1) or parallel (kernels=2) convolution in mode "1p", "2p" or "constant".

    "2p" is a * max + b * min; "1p" is counted as min + a * (max - min), one multiplication; "constant" is max + min.
    """
    pairs = outputs * channels
    multiplications = {"2p": 2 * pairs, "1p": pairs, "constant": 0}[mode]
    mixing = {"2p": pairs, "1p": 2 * pairs, "constant": pairs}[mode]
    additions = kernels * pairs * kernel + mixing + outputs * (channels - 1 + bias)
    return OpCount(multiplications, additions, 2 * pairs * (kernel - 1))
