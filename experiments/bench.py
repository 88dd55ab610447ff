"""Speed and memory of the tropical operators as ratios to named peers, measured side by side in one run.

Peers: the published code's way (unfold, broadcast, reduce), torch's ordinary convolution of the same shape, and for
the matrix product torch.cdist with p=inf, which is another operation of the same cost and only a yardstick. A call that
computes nothing stands beside the convolutions: no operator written in Python can be faster.

Peers take turns, so that whatever else the machine does meets all alike; within its turn each is warm.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROUNDS = 5  # turns of each peer
REPEATS = 4  # timed calls in each turn, at least,
TURN_S = 0.02  # and as many as fit in this time


@dataclass(frozen=True)
class Shape:
    """A layer of the papers: batch, channels, side, filters, kernel, stride, padding; `image`: no gradient of the input."""

    name: str
    batch: int
    channels: int
    side: int
    filters: int
    kernel: int
    stride: int
    padding: int
    image: bool = False


SHAPES = (
    Shape("net1 layer 1, MNIST", 64, 1, 28, 4, 3, 2, 1, image=True),
    Shape("net1 layer 2, MNIST", 64, 4, 14, 4, 3, 2, 1),
    Shape("net1 layer 1, CIFAR-10", 64, 3, 32, 4, 3, 2, 1, image=True),
    Shape("LeNet-5 layer 1, MNIST", 64, 1, 28, 6, 5, 1, 2, image=True),
    Shape("LeNet-5 layer 2, MNIST", 64, 6, 14, 16, 5, 1, 0),
    Shape("net1 layer 1, batch 256", 256, 1, 28, 4, 3, 2, 1, image=True),
    Shape("net1 layer 2, batch 256", 256, 4, 14, 4, 3, 2, 1),
    Shape("LeNet-5 layer 1, batch 256", 256, 1, 28, 6, 5, 1, 2, image=True),
    Shape("LeNet-5 layer 2, batch 256", 256, 6, 14, 16, 5, 1, 0),
)


@dataclass(frozen=True)
class Row:
    """One peer on one shape: milliseconds of both passes, extra memory, and ratios of the peer to the compiled path."""

    shape: str
    peer: str
    forward_ms: float
    backward_ms: float
    memory_mib: float
    forward_ratio: float = 1.0
    backward_ratio: float = 1.0
    step_ratio: float = 1.0  # forward and backward together
    memory_ratio: float = 1.0


def _operands(shape: Shape) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape.batch, shape.channels, shape.side, shape.side, generator=generator)
    w = torch.rand(shape.filters, shape.channels, shape.kernel, shape.kernel, generator=generator)
    return x.requires_grad_(not shape.image), w.requires_grad_()


def published(x: Any, w: Any, shape: Shape) -> Any:
    """Min-plus-sum the way the published code computes it: unfold to patches, broadcast, min over the kernel."""
    from torch.nn import functional as F

    patches = F.unfold(x, shape.kernel, padding=shape.padding, stride=shape.stride)
    patches = patches.view(x.shape[0], 1, shape.channels, shape.kernel**2, -1)
    return (patches + w.view(1, shape.filters, shape.channels, -1, 1)).min(3).values.sum(2)


def _peers(shape: Shape) -> dict[str, Callable[[Any, Any], Any]]:
    from torch.nn import functional as F

    from lit_modules.ops.tropical import tropical_conv2d

    geometry: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding}
    return {
        "compiled (ours)": lambda x, w: tropical_conv2d(x, w, inner="min", outer="sum", backend="compiled", **geometry),
        "portable (ours)": lambda x, w: tropical_conv2d(x, w, inner="min", outer="sum", backend="portable", **geometry),
        "broadcast, as published": lambda x, w: published(x, w, shape),
        "torch conv2d": lambda x, w: F.conv2d(x, w, **geometry),
        "a call of nothing (floor)": _nothing(shape),
    }


def _nothing(shape: Shape) -> Callable[[Any, Any], Any]:
    """An autograd function that allocates its output and gradients and leaves them as they are."""
    import torch

    side = (shape.side + 2 * shape.padding - shape.kernel) // shape.stride + 1

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, w: Any) -> Any:
            ctx.save_for_backward(x, w)
            return torch.empty(shape.batch, shape.filters, side, side)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            x, w = ctx.saved_tensors
            return torch.empty(x.shape) if ctx.needs_input_grad[0] else None, torch.empty(w.shape)

    return Nothing.apply


def _median_ms(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of each call in milliseconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            turn: list[float] = []
            while len(turn) < REPEATS or sum(turn) < TURN_S:
                start = time.perf_counter()
                call()
                turn.append(time.perf_counter() - start)
            times[name] += turn
    return {name: 1000 * statistics.median(taken) for name, taken in times.items()}


def _forward(op: Callable[[Any, Any], Any], x: Any, w: Any) -> Callable[[], object]:
    return lambda: op(x, w)


def _backward(op: Callable[[Any, Any], Any], x: Any, w: Any) -> Callable[[], object]:
    import torch

    leaves, y = [leaf for leaf in (x, w) if leaf.requires_grad], op(x, w)
    cotangent = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, leaves, cotangent, retain_graph=True)


def _grow(op: Callable[[Any, Any], Any], x: Any, w: Any, backward: bool, outcome: Any) -> None:
    import torch

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = op(x, w)
    if backward:
        y.backward(torch.ones_like(y))
    outcome.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def _memory_mib(op: Callable[[Any, Any], Any], x: Any, w: Any, backward: bool = True) -> float:
    """Peak growth of a process of its own over one forward and, where there is one, backward pass."""
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    process = context.Process(target=_grow, args=(op, x, w, backward, outcome))
    process.start()
    grown = outcome.get(timeout=120)
    process.join()
    return grown


def _row(shape: str, peer: str, forward: float, backward: float, memory: float, before: list[Row]) -> Row:
    base = before[0] if before else Row(shape, peer, forward, backward, memory)
    step = (forward + backward) / (base.forward_ms + base.backward_ms)
    back = backward / base.backward_ms if base.backward_ms else 1.0
    ratios = forward / base.forward_ms, back, step, memory / max(base.memory_mib, 0.1)
    return Row(shape, peer, forward, backward, memory, *ratios)


def compared(name: str, peers: dict[str, Callable[[Any, Any], Any]], x: Any, w: Any) -> list[Row]:
    """A row per peer, the compiled path first, ratios to it. Without operands that take a gradient, no backward."""
    forward = _median_ms({peer: _forward(op, x, w) for peer, op in peers.items()})
    trained = x.requires_grad or w.requires_grad
    backward = _median_ms({peer: _backward(op, x, w) for peer, op in peers.items()}) if trained else {}
    rows: list[Row] = []
    for peer, op in peers.items():
        memory = _memory_mib(op, x, w, backward=trained)
        rows.append(_row(name, peer, forward[peer], backward.get(peer, 0.0), memory, rows))
    return rows


def measure(shape: Shape) -> list[Row]:
    """Return a row per peer, the compiled path first, ratios to it (above 1: the compiled path is better)."""
    return compared(shape.name, _peers(shape), *_operands(shape))


def measure_matmul(rows: int, inner: int, columns: int) -> list[Row]:
    """Return the min-plus matrix product against broadcasting, cdist and torch's own product."""
    import torch

    from lit_modules.ops.tropical import tropical_matmul

    name = f"matrix product {rows} x {inner} x {columns}"
    x, w = torch.rand(rows, inner, requires_grad=True), torch.rand(columns, inner, requires_grad=True)
    peers: dict[str, Callable[[Any, Any], Any]] = {
        "compiled (ours)": lambda x, w: tropical_matmul(x, w, kind="min", backend="compiled"),
        "broadcast": lambda x, w: (x[:, None] + w).min(-1).values,
        "torch cdist p=inf (yardstick)": lambda x, w: torch.cdist(x, w, p=float("inf")),
        "torch matmul": lambda x, w: x @ w.T,
    }
    return compared(name, peers, x, w)


def measure_normal_form(samples: int, inputs: int, outputs: int) -> list[Row]:
    """Return the restricted normalisation, a tropical product over the samples, against broadcasting all sums. No backward."""
    import torch

    from lit_modules.ops.restricted import restricted_weight

    name = f"normal form {samples} samples, {inputs} to {outputs}"
    f, g = torch.rand(samples, inputs), torch.rand(samples, outputs)
    peers: dict[str, Callable[[Any, Any], Any]] = {
        "compiled (ours)": lambda f, g: restricted_weight(f, g, "min"),
        "broadcast": lambda f, g: (g[:, :, None] - f[:, None, :]).amax(0),
    }
    return compared(name, peers, f, g)


def run_bench(out: Path) -> list[Row]:
    """Measure everything on one thread, print it, and write tropical_ops.csv with the hardware named."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for row in measure(shape)]
    rows += measure_matmul(256, 784, 64) + measure_matmul(512, 512, 512) + measure_normal_form(2000, 64, 64)
    save(rows, out / "tropical_ops.csv")
    return rows


def save(rows: list[Row], file: Path) -> None:
    """Print rows and write them as CSV, with the hardware named."""
    from experiments.provenance import hardware, versions
    from experiments.store import write_atomically

    console = Console(width=max(124, Console().width))
    text = io.StringIO()
    machine = hardware()
    text.write(f"# {machine['cpu']}, one thread, torch {versions()['torch']}, numba {versions()['numba']}\n")
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    write_atomically(file, text.getvalue())
    console.print(_table(rows, machine["cpu"]))
    console.print(f"written: {file}", soft_wrap=True)


def _table(rows: list[Row], cpu: str) -> Table:
    table = Table(title=f"{cpu}, one thread; x: the peer's time or memory over ours", box=None)
    for name in ("shape", "peer"):
        table.add_column(name, no_wrap=True)
    for name in ("forward ms", "x", "backward ms", "x", "both x", "peak MiB", "x"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.shape if row.forward_ratio == 1.0 and "(ours)" in row.peer else "",
            row.peer,
            *(f"{row.forward_ms:.2f}", f"{row.forward_ratio:.1f}"),
            *(f"{row.backward_ms:.2f}", f"{row.backward_ratio:.1f}"),
            f"{row.step_ratio:.1f}",
            *(f"{row.memory_mib:.1f}", f"{row.memory_ratio:.1f}"),
        )
    return table
