"""Paper 5: an agent that decides a distributed execution plan one step at a time, by deep Q-learning.

tianshou collects, keeps and weighs transitions and forms targets; Lightning runs the loop, steps the optimiser, logs and saves.
Legend: F features, K actions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn

from datamodules.planning.anytime import anytime
from datamodules.planning.problem import Problem, gap_percent
from datamodules.planning.searchers import Point
from lit_modules.pace import logs_now
from lit_modules.plan_agent import PlanAgent, Recipe
from lit_modules.schedules import Schedule


@dataclass(frozen=True)
class Exploration:
    """The share of random decisions: from `start` to `end`, linearly over the first `share` of all decisions.

    Raises:
        ValueError: a number outside [0, 1], or no share at all.
    """

    start: float = 1.0
    end: float = 0.05
    share: float = 0.4

    def __post_init__(self) -> None:
        if not (0 <= self.start <= 1 and 0 <= self.end <= 1 and 0 < self.share <= 1):
            raise ValueError(f"exploration must lie in [0, 1] and its share above 0, got {self}")

    def __call__(self, done: float) -> float:
        """Return epsilon once `done` of all decisions, from 0 to 1, are taken."""
        return self.start + (self.end - self.start) * min(1.0, done / self.share)


class AutoMap(LightningModule):
    """Learn to plan by planning, keep the best plan met on the way, and test the greedy plan of the chosen epoch.

    Args:
        net: values of actions, (B, F) to (B, K); with "c51" (B, K, atoms).
        optimizer: takes parameters, returns the optimiser.
        steps_per_epoch: gradient steps in an epoch, each after as many decisions as its batch says, once there are `warmup`.
        schedule: learning-rate factor of the epoch, or None for constant.
        recipe: which DQN.
        exploration: epsilon over the training.
        warmup: decisions before the first gradient step, all random.
        batch_size: transitions of a gradient step.
        epochs: of the whole training, which exploration is a share of.
        seed: of what is drawn from the buffer.
        clip: largest norm of a gradient.
    Logs: `search/*` and `gap_at/*` of `datamodules.planning.anytime`, of the best plan met in training, and `plan/*`, what the
        data says of it; `val/throughput` and `test/throughput`, reference over cost of the greedy plan, 0 where it is no plan;
        `test/gap` in percent of the optimum; `test/infer_seconds`, per plan.
    Source: dossier 1.5 to 1.9; deviations in experiments/papers/auto_map/README.md.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        steps_per_epoch: int,
        schedule: Schedule | None = None,
        recipe: Recipe | None = None,
        exploration: Exploration | None = None,
        warmup: int = 128,
        batch_size: int = 64,
        epochs: int = 1,
        seed: int = 0,
        clip: float = 10.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("steps_per_epoch", "warmup", "batch_size", "epochs", "seed", "clip")
        if warmup < 1 or batch_size < 1:
            raise ValueError(f"warmup and batch_size must be at least 1, got {warmup} and {batch_size}")
        self.net, self.optimizer, self.schedule = net, optimizer, schedule
        self.recipe, self.exploration = recipe or Recipe(), exploration or Exploration()
        self.record = Record()
        self._agent: list[PlanAgent] = []  # in a list, so that its copies of the net are no part of the module
        self._waiting: dict[str, Any] | None = None  # of a checkpoint, until there is an agent to take it

    @property
    def agent(self) -> PlanAgent:
        """The agent, made when the data are there."""
        if not self._agent:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            environments = data.environments(self.recipe.environments, self.record)
            if data.collect % self.recipe.environments:
                raise ValueError(
                    f"{data.collect} decisions cannot be dealt evenly to {self.recipe.environments} environments"
                )
            self._agent.append(PlanAgent(self.net, environments, self.recipe, self.hparams["seed"]))
        return self._agent[0]

    def forward(self, x_BF: Tensor) -> Tensor:
        """Map observations (B, F) to values (B, K)."""
        return self.net(x_BF)

    def on_train_start(self) -> None:
        agent = self.agent
        if self._waiting is not None:
            agent.restore(self._waiting)
            self._waiting = None
        self.record.start()

    def training_step(self, batch: int, batch_idx: int) -> Tensor | None:
        done = self.record.steps / (self.trainer.datamodule.train_size * self.hparams["epochs"])  # type: ignore[attr-defined]
        warm = self.record.steps >= self.hparams["warmup"]
        if batch:
            self.agent.collect(batch, self.exploration(done) if warm else 1.0)
        if self.record.steps < self.hparams["warmup"]:
            return None
        beta = self.recipe.beta + (1.0 - self.recipe.beta) * done
        loss = self.agent.loss(self.hparams["batch_size"], beta)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} in epoch {self.current_epoch}")
        if logs_now(self.trainer):
            self.log("train/loss", loss, on_step=True, on_epoch=False)
            self.log("train/epsilon", self.exploration(done), on_step=True, on_epoch=False)
        return loss

    def on_train_epoch_end(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.record.pause()
        for name, value in data.judged(self.record, budget=self.record.steps).items():
            self.log(name, float(value))
        self.record.start()

    def on_train_end(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.record.decisions and data.task != "general":
            data.save_plan(self.record.decisions, Path(self.trainer.default_root_dir) / "plan.json")

    def validation_step(self, batch: int, batch_idx: int) -> None:
        case = self.trainer.datamodule.case("val", batch)  # type: ignore[attr-defined]
        cost = self.plan(case.problem)
        self.log("val/throughput", case.problem.reference / cost, batch_size=1, on_epoch=True)

    def test_step(self, batch: int, batch_idx: int) -> None:
        case = self.trainer.datamodule.case("test", batch)  # type: ignore[attr-defined]
        begun = time.perf_counter()
        cost = self.plan(case.problem)
        taken = time.perf_counter() - begun
        found = {"throughput": case.problem.reference / cost, "infer_seconds": taken}
        if math.isfinite(cost) and case.optimum is not None:
            found["gap"] = gap_percent(case.problem, cost, case.optimum.cost)
        every = {f"test/{name}": value for name, value in found.items()}
        if case.label:
            every |= {f"{name}/{case.label}": value for name, value in every.items()}
        every |= {f"greedy_{name}" + (f"/{case.label}" if case.label else ""): v for name, v in case.facts().items()}
        for name, value in every.items():
            self.log(name, float(value), batch_size=1, on_epoch=True)

    @torch.no_grad()
    def plan(self, problem: Problem) -> float:
        """Decide greedily and return the plan's cost; infinite where it breaks a rule. The problem keeps the plan."""
        problem.reset()
        features = self.net.features if isinstance(getattr(self.net, "features", None), int) else problem.width
        while not problem.done:
            x_BF = torch.zeros(1, features, device=self.device)  # type: ignore[arg-type]
            x_BF[0, : problem.width] = torch.from_numpy(problem.features())
            q_K = self._values(self.net(x_BF))[0, : problem.actions]
            q_K[~torch.from_numpy(np.asarray(problem.allowed())).to(q_K.device)] = -torch.inf
            if not problem.step(int(q_K.argmax())):
                return math.inf
        return problem.cost()

    def _values(self, out: Tensor) -> Tensor:
        if self.recipe.kind == "dqn":
            return out
        return out @ torch.linspace(self.recipe.low, self.recipe.high, out.shape[-1], device=out.device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are numbers."""
        return batch

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.hparams["clip"])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.net.parameters())
        if self.schedule is None:
            return optimizer
        schedule, steps = self.schedule, self.hparams["steps_per_epoch"]
        law = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": law, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["record"] = self.record.snapshot()
        if self._agent:
            checkpoint["agent"] = self.agent.snapshot()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.record.restore(checkpoint["record"])
        self._waiting = checkpoint.get("agent")


class Record:
    """The best plan met so far and when, in decisions and seconds of training, over all attempts."""

    def __init__(self) -> None:
        self.steps, self.plans, self.cost = 0, 0, math.inf
        self.decisions: tuple[int, ...] = ()
        self.trace: list[Point] = []
        self._earlier, self._since = 0.0, math.nan

    @property
    def seconds(self) -> float:
        """Spent in training so far."""
        running = 0.0 if math.isnan(self._since) else time.perf_counter() - self._since
        return self._earlier + running

    def start(self) -> None:
        """Let the clock run."""
        if math.isnan(self._since):
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock."""
        self._earlier, self._since = self.seconds, math.nan

    def on_step(self) -> None:
        """Count a decision."""
        self.steps += 1

    def on_plan(self, cost: float, decisions: tuple[int, ...]) -> None:
        """Take in a finished plan."""
        self.plans += 1
        if cost < self.cost:
            self.cost, self.decisions = cost, decisions
            self.trace.append(Point(self.seconds, self.steps, self.plans, cost))

    def metrics(self, problem: Problem, optimum: float | None, budget: int) -> dict[str, float]:
        """Return `search/*` and `gap_at/*`."""
        return anytime(problem, self.trace, optimum, self.steps, self.seconds, budget)

    def snapshot(self) -> dict[str, Any]:
        """Return what a cut run goes on from."""
        kept = {name: deepcopy(getattr(self, name)) for name in ("steps", "plans", "cost", "decisions", "trace")}
        return kept | {"seconds": self.seconds}

    def restore(self, kept: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        for name in ("steps", "plans", "cost", "decisions", "trace"):
            setattr(self, name, deepcopy(kept[name]))
        self._earlier, self._since = kept["seconds"], math.nan
