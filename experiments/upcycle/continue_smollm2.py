"""SmolLM2 continued on English novels, dense against upcycled, at equal tokens in the same order: a demonstration.

Both arms start from the same weights, see the same windows, and are trained by AdamW with the same constant learning rate;
they are trained one after the other. A few dozen steps show that the start is the parent and that training runs, and decide
nothing about which is better. Memory: float32 weights, gradients and AdamW's moments are 16 bytes per parameter, 2.2 GB dense
and 6 GB for E=4 (373 million parameters); with 2 sequences of 128 tokens the whole command peaked at 8.7 GB.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.text import load_documents
from experiments.errors import UserError
from experiments.store import write_atomically
from experiments.upcycle.measure import require_transformers
from experiments.upcycle.smollm2 import smollm2_net, smollm2_source
from lit_modules.moe_upcycling import parameter_groups
from lit_modules.nets.moe import Experts
from lit_modules.nets.pricing import SIZES
from lit_modules.nets.transformer import Transformer
from lit_modules.nets.upcycled import Upcycle
from lit_modules.ops.routing import load_balancing_loss

CORPUS = "eltec_eng"


@dataclass(frozen=True)
class Setting:
    """A continuation; E, G, T, order and scale are of the mixture, everything else of both arms.

    Attributes:
        steps, batch, context: batch sequences of context tokens per step.
        every: steps between evaluations.
        val_windows: sequences of the evaluation set, the same for both.
        seed: of the order of windows and of the router.
    """

    steps: int = 30
    context: int = 128
    batch: int = 2
    every: int = 5
    val_windows: int = 8
    lr: float = 2e-5
    weight_decay: float = 0.1
    balance: float = 1e-2
    expansion: int = 4
    granularity: int = 1
    top_k: int = 2
    order: str = "softmax_topk"
    scale: str = "exact"
    sigma: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One evaluation: nats per token on the last `every` batches and on the fixed validation windows."""

    arm: str
    step: int
    tokens: int
    train: float | None
    val: float
    seconds: float


def run(setting: Setting, file: Path | None = None, say: Callable[[Row], None] = print) -> list[Row]:
    """Train both arms and return their rows, which are also written as CSV.

    Raises:
        UserError: SmolLM2 cannot be had here, or the corpus is too small.
    """
    net, tokenizer = parent()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    train_WS = windows(tokenizer, "train", setting.steps * setting.batch, setting)
    val_WS = windows(tokenizer, "val", setting.val_windows, setting)
    rows: list[Row] = []
    for arm in ("dense", "moe"):
        if arm == "moe":
            del net  # never both in memory
            net = upcycled(setting, state)
        for row in train(arm, net, train_WS, val_WS, setting):
            say(row)
            rows.append(row)
            if file is not None:
                write_csv(file, rows)  # after every row: a run of hours leaves what it has if it is stopped
    return rows


def train(arm: str, net: Transformer, train_WS: Tensor, val_WS: Tensor, setting: Setting) -> Iterator[Row]:
    """Train a net on windows (W, S + 1) in their order, and yield its loss before, now and then, and after."""
    optimizer = torch.optim.AdamW(
        parameter_groups(net), lr=setting.lr, weight_decay=setting.weight_decay, betas=(0.9, 0.95)
    )
    started, losses = time.monotonic(), []
    yield Row(arm, 0, 0, None, evaluate(net, val_WS), 0.0)
    for step in range(1, setting.steps + 1):
        batch_BS = train_WS[(step - 1) * setting.batch : step * setting.batch]
        loss = F.cross_entropy(net(batch_BS[:, :-1]).flatten(0, 1), batch_BS[:, 1:].flatten())
        losses.append(loss.item())
        for layer in net.moe_layers().values():
            if layer.routed is not None:
                loss = loss + setting.balance * load_balancing_loss(layer.routed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % setting.every == 0 or step == setting.steps:
            tokens = step * setting.batch * setting.context
            recent, losses = sum(losses) / len(losses), []
            yield Row(arm, step, tokens, recent, evaluate(net, val_WS), time.monotonic() - started)


@torch.no_grad()
def evaluate(net: Transformer, windows_WS: Tensor) -> float:
    """Return nats per token over windows (W, S + 1), one at a time."""
    losses = [F.cross_entropy(net(w[None, :-1])[0], w[1:]).item() for w in windows_WS]
    return sum(losses) / len(losses)


def write_csv(file: Path, rows: list[Row]) -> None:
    """Write rows under the names of their fields."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(file, out.getvalue())


def parent() -> tuple[Transformer, Any]:
    """Return SmolLM2 as our transformer, and its tokeniser."""
    with smollm2_source() as source:
        tokenizer = require_transformers().AutoTokenizer.from_pretrained(source.tokenizer)
        return smollm2_net(source), tokenizer


def upcycled(setting: Setting, state: dict[str, Tensor]) -> Transformer:
    """Return the mixture of a setting, made of a dense state dict."""
    shape = vars(SIZES["smollm2_135m"])
    std = setting.sigma / shape["width"] ** 0.5
    order, scale = setting.order, setting.scale
    experts = Experts(setting.expansion, setting.granularity, setting.top_k, order, router_std=std)  # type: ignore[arg-type]
    net = Transformer(**shape | {"experts": experts})
    Upcycle(scale=scale, router_std=std)(net, state, torch.Generator().manual_seed(setting.seed))
    return net


def windows(tokenizer: Any, split: str, count: int, setting: Setting) -> Tensor:
    """Return windows (count, S + 1) of a split, drawn without overlap from its first documents, in a seeded order."""
    length = setting.context + 1
    found: list[Tensor] = []
    for document in load_documents(CORPUS).split(split):
        text = document.decode("utf-8")[: 12 * length * count]  # a token is about four characters: enough and to spare
        tokens = torch.tensor(tokenizer(text, truncation=False).input_ids)
        found.extend(tokens[: len(tokens) // length * length].view(-1, length))
        if len(found) >= 2 * count:
            break
    if len(found) < count:
        raise UserError(f"{CORPUS} gives {len(found)} windows of {length} tokens, {count} are needed")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(setting.seed))
    return torch.stack([found[i] for i in islice(order.tolist(), count)])
