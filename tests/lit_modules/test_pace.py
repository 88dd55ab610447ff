"""What is logged at a step is logged exactly when a logger takes it."""

from __future__ import annotations

import csv
from functools import partial

import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_modules.min_max_plus import MinMaxPlus


def test_the_training_loss_reaches_the_logger_every_so_many_steps(tmp_path) -> None:
    data = DataLoader(TensorDataset(torch.rand(40, 2), torch.rand(40)), batch_size=4)
    module = MinMaxPlus(nn.Linear(2, 1), partial(torch.optim.SGD, lr=0.1), 10, task="regression")
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=logger, log_every_n_steps=3, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    calls = []
    log = module.log
    module.log = lambda name, *a, **k: (calls.append(name), log(name, *a, **k))  # type: ignore[method-assign,assignment]
    trainer.fit(module, train_dataloaders=data)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert logged == [2, 5, 8, 11, 14, 17]
    assert calls.count("train/loss") == len(logged)
