"""run_cell(cell) -> Record: the only place that builds a Trainer.

A cell may be stopped at any moment and run again: it goes on from the last whole epoch, and since initialisation, data
order and every other draw are keyed by (seed, purpose, epoch), it ends with the same weights as an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import yaml
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from experiments import provenance, tracking
from experiments.cell import Cell, flatten
from experiments.ranks import leads, run_ranks
from experiments.records import Record
from experiments.store import CellBusy, cell_lock, read_json, read_run, sync_folder, write_atomically, write_json
from experiments.strategies import compile_blocks, gathered, processes, trainer_arguments

PaperData: TypeAlias = Any  # a LightningDataModule with card, train_size and input_shape


def run_cell(
    cell: Cell, runs: Path, store: tracking.Store | None = None, parent: tuple[str, str] | None = None
) -> Record:
    """Train and test one cell, or answer it from disk if it is done.

    Args:
        cell: what to run.
        runs: the folder that holds one folder per signature.
        store: the MLflow store, or None to go untracked.
        parent: (experiment id, parent run id) in that store.
    Raises:
        CellBusy: another process is running this cell.
        Exception: whatever stopped the cell; its traceback is kept in failed.json.
    """
    folder = runs / cell.signature
    with cell_lock(folder):
        if (folder / "done.json").exists():
            return read_run(folder)
        (folder / "failed.json").unlink(missing_ok=True)
        try:
            if cell.parent is not None:  # where it is done already, and a `reproduce` sees to that, this only looks
                _run_parent(cell.parent, runs)
            if (count := processes(cell.config["trainer"])) > 1:
                run_ranks(_execute, cell, folder, store, parent, count)
            else:
                _execute(cell, folder, store, parent)
        except CellBusy:
            raise
        except Exception as error:
            write_failure(folder, cell, "".join(traceback.format_exception(error)), f"{type(error).__name__}: {error}")
            raise
    return read_run(folder)


class ParentFailed(RuntimeError):
    """The cell whose weights this one starts from could not be trained."""


def _run_parent(parent: Cell, runs: Path) -> None:
    try:
        run_cell(parent, runs)
    except CellBusy:
        raise
    except Exception as error:
        raise ParentFailed(f"its parent {parent.key} failed: {type(error).__name__}: {error}") from error


def write_failure(folder: Path, cell: Cell, trace: str, error: str) -> None:
    """Keep why a cell failed, with a manifest to say which it was."""
    if not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", _identity(cell))
    write_json(folder / "failed.json", {"error": error.splitlines()[0][:500], "traceback": trace})


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that is a pure function of `parts`: separate generators never share a stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def weights_sha256(state_dict: dict[str, torch.Tensor]) -> str:
    """Return the sha256 over the names, shapes, types and bytes of all tensors, in name order."""
    whole = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        whole.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return whole.hexdigest()


def build_net(config: dict[str, Any], seed: int | None = None) -> torch.nn.Module:
    """Build the cell's net, its initial weights drawn from a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("init", config["seed"] if seed is None else seed))
        return instantiate(config["net"])


def inherit(net: torch.nn.Module, cell: Cell, runs: Path) -> dict[str, torch.Tensor] | None:
    """Give a net the trained weights of its cell's parent, every draw from a generator of its own.

    Returns:
        the parent's weights, or None where there is no parent.
    Raises:
        FileNotFoundError: the parent has not been trained.
    """
    if cell.parent is None:
        return None
    weights = runs / cell.parent.signature / "best.ckpt"
    if not weights.exists():
        raise FileNotFoundError(
            f"{cell.parent.key} has no trained weights at {weights}: run `{cell.parent.command}` first"
        )
    state = torch.load(weights, map_location="cpu", weights_only=False)["state_dict"]
    state = {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}
    generator = torch.Generator().manual_seed(derive_seed("inherit", cell.config["seed"]))
    instantiate(cell.config["parent"]["inherit"])(net, state, generator)
    return state


def _identity(cell: Cell) -> dict[str, Any]:
    return {**vars(cell.key), "signature": cell.signature, "command": cell.command}


def _execute(cell: Cell, folder: Path, store: tracking.Store | None, parent: tuple[str, str] | None) -> None:
    """Train and test a cell in this process, alone or as one of several; the first of several writes down what comes of it."""
    _quiet()
    started = time.monotonic()
    config = cell.config
    data: PaperData = instantiate(config["datamodule"])
    data.setup("fit")
    made: dict[str, Any] = {"data_cards": [data.card.to_dict()], "trainer": config["trainer"]}
    if cell.parent is not None:
        made["parent"] = {"ablation": cell.parent.key.ablation, "signature": cell.parent.signature}
    manifest = provenance.manifest() | _identity(cell) | made
    earlier = read_json(folder / "manifest.json")
    experiment_id, parent_id = parent or ("", "")
    if leads():
        write_atomically(folder / "config.yaml", yaml.safe_dump(cell.hashed, sort_keys=False))
    with tracking.open_child(
        store if config["tracking"]["enabled"] else None,
        experiment_id,
        parent_id,
        cell.key,
        cell.signature,
        params=flatten(cell.hashed),
        config_yaml=yaml.safe_dump(cell.hashed, sort_keys=False),
        manifest=manifest,
        resume_run_id=earlier.get("mlflow_run_id"),
        log_system_metrics=config["tracking"]["system_metrics"],
        log_every=config["tracking"]["log_every"],
    ) as child:
        manifest |= {"mlflow_run_id": child.run_id, "mlflow_experiment_id": experiment_id or None}
        if leads():
            write_json(folder / "manifest.json", manifest)
        _fit_and_test(cell, folder, data, child.logger, started)
        if store is not None and child.run_id and (folder / "best.ckpt").exists():
            tracking.log_artifacts(store, child.run_id, [folder / "best.ckpt"], "checkpoints")


def _fit_and_test(cell: Cell, folder: Path, data: PaperData, logger: Any, started: float) -> None:
    config = cell.config
    net = build_net(config)
    inherited = inherit(net, cell, folder.parent)
    cost = _cost(net, data)
    if config["trainer"].get("compile"):
        compile_blocks(net)
    steps = len(data.train_dataloader())
    module: LightningModule = instantiate(
        config["module"],
        net=net,
        optimizer=instantiate(config["optim"]["optimizer"], _partial_=True),
        schedule=instantiate(config["optim"]["schedule"]) if config["optim"]["schedule"] else None,
        steps_per_epoch=steps,
    )
    if inherited is not None and (take := getattr(module, "on_inherit", None)) is not None:
        take(inherited)
    history, (best, latest) = History(started), _checkpoints(folder, config["selection"])
    callbacks = [EpochRandomness(config["seed"]), history, Progress(folder / "progress.json"), best, latest]
    trainer = _trainer(config, folder, callbacks, logger)
    last, chosen = folder / "last.ckpt", None
    if config["budget"]["max_epochs"]:  # with none, the net is a construction: it is tested as it was built
        trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=False)
        if trainer.interrupted:
            raise KeyboardInterrupt("the run was interrupted; the same command goes on from the last whole epoch")
        chosen = folder / "best.ckpt"
        history.metrics[config["selection"]["monitor"]] = float(best.best_model_score)  # type: ignore[arg-type]
    trained, seconds, tests_start = dict(history.metrics), history.seconds(), time.monotonic()
    # Loading the chosen weights puts every callback back to that epoch too, so what is kept was read before.
    tested = trainer.test(module, datamodule=data, ckpt_path=chosen, verbose=False, weights_only=False)
    built = gathered(module.state_dict(), keep=leads()) if chosen is None else {}  # all processes take part
    if not leads():
        return
    metrics = trained | {"train/samples": float(data.train_size * config["budget"]["max_epochs"])}
    seconds = round(seconds + time.monotonic() - tests_start, 3)
    metrics |= dict(tested[0]) | cost | {"train/seconds": seconds}
    if logger is not None:
        logger.log_metrics({name: metrics[name] for name in metrics if name not in tested[0]})
    write_json(folder / "metrics.json", metrics)
    weights = torch.load(last, map_location="cpu", weights_only=False)["state_dict"] if chosen else built
    write_json(
        folder / "done.json",
        {
            "weights_sha256": weights_sha256(weights),
            "seconds": seconds,
            "finished": provenance.now(),
        },
    )


def _cost(net: torch.nn.Module, data: PaperData) -> dict[str, float]:
    from lit_modules.nets.counting import count_ops, count_params

    ops = count_ops(net, data.input_shape)
    return {
        "cost/params": float(count_params(net)),
        "cost/multiplications": float(ops.multiplications),
        "cost/additions": float(ops.additions),
        "cost/comparisons": float(ops.comparisons),
        "cost/flops": float(ops.total),
    }


def _checkpoints(folder: Path, selection: dict[str, Any]) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """The best epoch by a validation metric, and the last one. Two, because one callback that keeps the best writes its `last`
    only when the best improves; and in this order, so that the last holds what the best has come to.
    """
    same: dict[str, Any] = {"dirpath": folder, "save_on_train_epoch_end": True, "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", auto_insert_metric_name=False, **selection, **same)
    return best, ModelCheckpoint(filename="last", every_n_epochs=1, **same)


def _trainer(config: dict[str, Any], folder: Path, callbacks: list[Callback], logger: Any) -> Trainer:
    return Trainer(
        **trainer_arguments(config["trainer"]),
        max_epochs=config["budget"]["max_epochs"],
        precision=config["precision"],
        callbacks=callbacks,
        logger=logger if logger is not None else False,
        log_every_n_steps=config["tracking"]["log_every"],
        default_root_dir=folder,
        deterministic=True,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )


def _quiet() -> None:
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*(does not have many workers|exists and is not empty|LeafSpec).*")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final name, flush it, then rename: never half a file under a final name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        final = Path(path)
        temporary = final.with_name(f".{final.name}.tmp")
        super().save_checkpoint(checkpoint, temporary, storage_options)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
        sync_folder(final.parent)


class EpochRandomness(Callback):
    """Seed the global generators from (seed, epoch), so that dropout and the like survive a restart exactly."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed = derive_seed("epoch", self.seed, trainer.current_epoch)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


class History(Checkpoint):
    """Keep the last epoch's metrics inside the checkpoint, so that a run killed after its last epoch still has them; and the
    seconds that the epochs kept so far have taken, over all attempts.

    A `Checkpoint` by type only: Lightning calls those after the module's own hooks, which log the epoch's scores.
    """

    def __init__(self, started: float) -> None:
        self.metrics: dict[str, float] = {}
        self.started = started  # of this attempt, on the monotonic clock
        self.earlier = 0.0  # seconds of earlier attempts, up to the checkpoint that this one goes on from

    def seconds(self) -> float:
        """Return the seconds spent on what this run now holds, over all attempts."""
        return self.earlier + time.monotonic() - self.started

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.metrics, self.earlier = state_dict["metrics"], state_dict["seconds"]


class Progress(Callback):
    """Write how far a run is (0 to 1) where the command that watches it can read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        now = time.monotonic()
        if now - self._written < 0.5:
            return
        self._written = now
        if not trainer.is_global_zero:
            return
        epochs = trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_progress.current.completed / max(
            1, int(trainer.num_training_batches)
        )
        self.path.write_text(f"{epochs / (trainer.max_epochs or 1):.4f}")
