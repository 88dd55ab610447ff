"""A tiny transformer and made-up text for tests of paper 1. Nothing here is read from disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lit_modules.nets.moe import Experts
from lit_modules.nets.transformer import Transformer

VOCAB, CONTEXT, WIDTH, HIDDEN, LAYERS = 16, 8, 16, 32, 2
STILL = partial(torch.optim.SGD, lr=0.0)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def transformer(experts: Experts | None = None, seed: int = 0, **options: Any) -> Transformer:
    """A net of two blocks, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    sizes = {"vocab": VOCAB, "width": WIDTH, "layers": LAYERS, "heads": 2, "hidden": HIDDEN, "init_std": 0.2}
    return Transformer(**{**sizes, "experts": experts, **options})


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens that mostly count upwards, and those that follow each: int64 (count, CONTEXT) twice."""
    generator = torch.Generator().manual_seed(seed)
    steps = (torch.rand(count, CONTEXT + 1, generator=generator) < 0.8).long() * 2 - 1
    tokens = (torch.randint(VOCAB, (count, 1), generator=generator) + steps.cumsum(1)) % VOCAB
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Text(LightningDataModule):
    """Three splits of made-up sequences; training batches come in one order in every epoch."""

    bytes_per_token = 2.0
    input_shape = (CONTEXT,)

    def __init__(
        self, batch_size: int = 4, train: int = 32, val: int = 10, test: int = 16, eval_batch: int = 8
    ) -> None:
        super().__init__()
        sizes = {"train": train, "val": val, "test": test}
        self.sets = {name: TensorDataset(*sequences(n, seed)) for seed, (name, n) in enumerate(sizes.items())}
        self.sizes = {"train": batch_size, "val": eval_batch, "test": eval_batch}

    def _loader(self, split: str) -> DataLoader:
        return DataLoader(self.sets[split], batch_size=self.sizes[split])

    def whole(self, split: str) -> tuple[Tensor, Tensor]:
        """All sequences of a split."""
        x, y = self.sets[split].tensors
        return x, y

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")


def trainer(folder: Path, epochs: int = 1, **options: Any) -> Trainer:
    """A quiet trainer on the CPU that writes into `folder` only."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **{**quiet, "num_sanity_val_steps": 0, **options}
    )
