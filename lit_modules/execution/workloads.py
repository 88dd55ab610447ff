"""Nets that plans are run on for real, described by numbers alone so that each process builds the same one.

Legend: B rows of a batch, S tokens, D width, C channels, V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.planning.graph import Graph
from datamodules.planning.trace import Step, trace
from lit_modules.nets.stacks import conv_stack, encoder_stack, initialise_, mlp_stack

Kind = Literal["mlp", "encoder", "conv"]


@dataclass(frozen=True)
class Workload:
    """A net and the batch that it takes a step on.

    Attributes:
        name: for people and metrics: letters, digits, underscores.
        kind: "mlp" (regression, mean squared error), "encoder" (a class for each token) or "conv" (a class for each image).
        batch: B, rows, sequences or images.
        sizes: what the builder in `lit_modules.nets.stacks` takes, and `tokens` (S) for an encoder.
    """

    name: str
    kind: Kind
    batch: int
    sizes: tuple[tuple[str, Any], ...]

    @property
    def numbers(self) -> Mapping[str, Any]:
        """The sizes by name."""
        return dict(self.sizes)

    def with_batch(self, batch: int) -> Workload:
        """The same net on another batch."""
        return replace(self, batch=batch)

    def net(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """Build the net, its weights drawn from `seed`."""
        net = self._raw()
        initialise_(net, seed)
        return net.to(dtype)

    def _raw(self) -> nn.Sequential:
        n = dict(self.sizes)
        n.pop("tokens", None)
        if self.kind == "mlp":
            return mlp_stack(**n)
        return encoder_stack(**n) if self.kind == "encoder" else conv_stack(**n)

    def data(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Draw a batch: inputs (B, D), (B, S) or (B, C, H, W) and targets (B, D), (B, S) or (B,)."""
        generator, n = torch.Generator().manual_seed(seed), self.numbers
        if self.kind == "encoder":
            shape = (self.batch, n["tokens"])
            x, y = (torch.randint(n["vocab"], shape, generator=generator) for _ in range(2))
            return x, y
        if self.kind == "mlp":
            x, y = (torch.randn(self.batch, n["width"], generator=generator, dtype=torch.float64) for _ in range(2))
            return x.to(dtype), y.to(dtype)
        shape_NCHW = (self.batch, n["channels"][0][0], n["image"], n["image"])
        x = torch.randn(shape_NCHW, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(n["classes"], (self.batch,), generator=generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over all rows (and tokens): of rows dealt evenly, the mean of means is the mean of all."""
        if self.kind == "mlp":
            return (output - target).square().mean()
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def graph(self) -> Graph:
        """Trace one training step; kept for the process."""
        return _graph(self)

    def _step(self) -> Step:
        x, y = self.data()
        return Step(self._raw(), {"x": x, "y": y}, lambda model, x, y: self.loss(model(x), y))


@lru_cache(maxsize=32)
def _graph(workload: Workload) -> Graph:
    return trace(workload._step, workload.name)


def mlp(name: str, rows: int, width: int, hidden: int, blocks: int) -> Workload:
    """Residual blocks D -> F -> D."""
    return Workload(name, "mlp", rows, (("blocks", blocks), ("width", width), ("hidden", hidden)))


def encoder(name: str, batch: int, **sizes: int) -> Workload:
    """BERT layers between an embedding and a head; sizes as `encoder_stack` has them, and `tokens`."""
    return Workload(name, "encoder", batch, tuple(sizes.items()))


def conv(name: str, batch: int, channels: tuple[tuple[int, ...], ...], **sizes: int) -> Workload:
    """A small VGG whose fully connected layers hold nearly all weights; sizes as `conv_stack` has them."""
    return Workload(name, "conv", batch, (("channels", channels), *sizes.items()))


_ALL = (
    # The dossier's three shapes with half the blocks: many weights on few rows, the same on many rows, and wide.
    mlp("mlp_64", 64, 512, 2048, 2),
    mlp("mlp_1024", 1024, 512, 2048, 2),
    mlp("mlp_wide", 256, 1024, 2048, 1),
    encoder("bert_8x16", 8, tokens=16, width=256, hidden=1024, heads=4, blocks=2, vocab=512),
    encoder("bert_8x128", 8, tokens=128, width=256, hidden=1024, heads=4, blocks=2, vocab=512),
    conv("vgg_8", 8, ((3, 8, 8), (8, 16, 16)), image=32, hidden=1024, classes=10),
    # For tests: every rule once, in a blink.
    mlp("mlp_tiny", 8, 8, 16, 2),
    encoder("bert_tiny", 8, tokens=3, width=8, hidden=16, heads=4, blocks=2, vocab=12),
    conv("vgg_tiny", 8, ((3, 4), (4, 6)), image=8, hidden=16, classes=4),
)
WORKLOADS: Mapping[str, Workload] = {workload.name: workload for workload in _ALL}


def workload_of(name: str) -> Workload:
    """Return a workload by name; ValueError with the names that there are."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
