"""Paper 5's data: a model's training step on a machine, as the problem that a plan solves.

What is trained on are the decisions that an agent takes in environments made here; a loader hands out how many to take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.planning.environment import Observer, PlanEnvironment, Reward
from datamodules.planning.names import is_workload, workload_card
from datamodules.planning.partition_env import Objective, Pruning
from datamodules.planning.pipeline_env import Window
from datamodules.planning.problem import Optimum, Problem, take
from datamodules.planning.problems import (
    Case,
    InputSplitting,
    Partitioning,
    Staging,
    Task,
    drawer,
    drawn_staging,
    graph_staging,
    profile_staging,
)
from datamodules.planning.topology import Topology, load_topology
from datamodules.sources import DataCard

VAL, TEST = 1, 2  # keys of held-out made-up models


class PlanData(LightningDataModule):
    """Environments, held-out problems and proven optima of one task on one workload and machine.

    Args:
        name: of a workload in `datamodules.planning.workloads`, "bert-48-profile", or "made-up-models".
        task: "partition" (operator partitioning), "data" (batch dims of inputs), "pipeline" (stages of one model), "general"
            (stages of made-up models, tested on real ones), "none" (the module brings its own).
        seed: of the made-up models that are trained on.
        topology: a machine, see conf/topology; `devices` keeps its servers' size where that divides, else one server.
        arguments: of the workload, such as its batch.
        objective: of "partition": "count" or "time".
        reward: see `PlanEnvironment`.
        pruning, window: of partitioning, of pipelines.
        data: rows of the mesh over which the batch is split before variables are, of "partition".
        stages, micro_batches, granularity: of pipelines; granularity None is one bucket for each operation or layer.
        observation, actions: room for observations and actions, the same for every ablation of a net.
        train_steps, collect, updates: decisions in an epoch, how many are taken at once, and gradient steps after those.
        val_models, test_models: held-out made-up models of "general".
        tests: workloads that the general agent is tested on.
        prove: whether the optimum is worked out, which costs of plans are held against; tuning needs none.
    Raises:
        ValueError: sizes that do not fit each other, unknown names.
    """

    def __init__(
        self,
        name: str,
        task: Task = "partition",
        seed: int = 0,
        topology: str = "v100_1x8",
        devices: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        objective: Objective = "count",
        reward: Reward = "structural",
        pruning: Pruning | None = None,
        window: Window | None = None,
        data: int = 1,
        stages: int = 2,
        micro_batches: int = 16,
        granularity: int | None = 128,
        observation: int | None = None,
        actions: int | None = None,
        train_steps: int = 1024,
        collect: int = 8,
        updates: int = 1,
        val_models: int = 1,
        test_models: int | None = None,
        tests: tuple[str, ...] | list[str] = (),
        prove: bool = True,
    ) -> None:
        super().__init__()
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
        if not is_workload(name):
            raise ValueError(f"{name!r} names no workload")
        if min(collect, updates) < 1 or train_steps < collect:
            raise ValueError(
                f"{train_steps} decisions must hold one collection of {collect}, with {updates} or more updates"
            )
        self.workload, self.task, self.seed, self.reward = name, task, seed, reward
        self.topology = sized(load_topology(topology), devices)
        self.arguments, self.objective = dict(arguments or {}), objective
        self.pruning, self.window = pruning or Pruning(), window or Window()
        self.data, self.stages, self.micro_batches, self.granularity = data, stages, micro_batches, granularity
        self.observation, self.actions = observation, actions
        self.train_steps, self.collect, self.updates = train_steps, collect, updates
        self.val_models, self.test_models, self.tests = val_models, test_models or val_models, tuple(tests)
        self.prove = prove
        self.input_shape = (observation or 1,)

    @property
    def card(self) -> DataCard:
        """What the workload is."""
        return workload_card(self.workload)

    @property
    def train_size(self) -> int:
        """Decisions in an epoch."""
        return self.train_steps

    def setup(self, stage: str | None = None) -> None:
        """Trace the model, unless it was before, and work out what decisions bring with them."""
        if self.task not in ("general", "none"):
            assert self.source is not None

    @cached_property
    def source(self) -> Any:
        """What makes problems of the task's one model."""
        return self._source(self.workload)

    def _source(self, name: str) -> Any:
        if self.task in ("pipeline", "general"):
            return self._staging(name)
        from datamodules.planning.workloads import load_graph

        graph = load_graph(name, **self.arguments)
        if self.task == "data":
            return InputSplitting(graph, self.topology, self.pruning)
        return Partitioning(graph, self.topology, self.objective, self.pruning, self.data)

    @property
    def _options(self) -> dict[str, Any]:
        return {"window": self.window, "micro_batches": self.micro_batches}

    def _staging(self, name: str) -> Staging:
        shown = {**self._options, "arrays": self.task == "general"}
        if name == "bert-48-profile":
            batch = int(self.arguments.get("batch", 64))
            return profile_staging(self.topology, self.stages, batch, self.granularity, **shown)
        from datamodules.planning.workloads import load_graph

        graph = load_graph(name, **self.arguments)
        return graph_staging(graph, self.topology, self.stages, self.granularity or 128, **shown)

    def environments(self, count: int, observer: Observer | None = None) -> list[PlanEnvironment]:
        """Return environments, each with a problem of its own, which tell an observer of decisions and plans."""
        made = []
        for number in range(count):
            problem: Any = self.source.problem() if self.task != "general" else self._draw
            made.append(
                PlanEnvironment(
                    problem, self.reward, self.observation, self.actions, observer, seed=self.seed * 1000 + number
                )
            )
        return made

    @cached_property
    def _draw(self) -> Callable[..., Problem]:
        return drawer(self.topology, self.stages, self.granularity or 128, self._options)

    def case(self, split: Literal["val", "test"], number: int) -> Case:
        """Return a held-out problem; the task's own where there is one model."""
        return self.cases[split][number]

    @cached_property
    def cases(self) -> dict[str, list[Case]]:
        """Held-out problems by split."""
        if self.task != "general":
            own = [Case(self.source.problem(), self.optimum if self.prove else None, "", self.source.say)]
            return {"val": own, "test": own}
        real = []
        for name in self.tests:
            staging = self._staging(name)
            real.append(Case(staging.problem(), staging.optimum(), name.replace("-", "_"), staging.say))
        return {"val": self._made_up(VAL, self.val_models), "test": real + self._made_up(TEST, self.test_models)}

    def _made_up(self, key: int, count: int) -> list[Case]:
        found = []
        for number in range(count):
            rng = np.random.default_rng([key, number])
            staging = drawn_staging(rng, self.topology, self.stages, self.granularity or 128, **self._options)
            label = "made_up" if key == TEST else ""
            found.append(Case(staging.problem(), staging.optimum() if key == TEST else None, label))
        return found

    @cached_property
    def optimum(self) -> Optimum:
        """The least cost of the task's one model, in the space that pruning leaves, proven."""
        return self.source.optimum()

    @property
    def least(self) -> float | None:
        """The optimum's cost, None where it is not worked out."""
        return self.optimum.cost if self.prove else None

    def judged(self, record: Any, budget: int) -> dict[str, float]:
        """Return what a search logs of its best plan: `search/*`, `gap_at/*` and `plan/*`; nothing for made-up models."""
        if self.task == "general":
            return {}
        problem = self.source.problem()
        found = record.metrics(problem, self.least, budget)
        if record.decisions and take(problem, record.decisions):
            found |= self.source.say(problem)
        return found | self.proof()

    def save_plan(self, decisions: tuple[int, ...], file: Path) -> None:
        """Write the plan that these decisions make as JSON, where it is one that others can price, draw and run."""
        if isinstance(self.source, Partitioning) and take(problem := self.source.problem(), decisions):
            self.source.plan(problem).save(file)

    def proof(self) -> dict[str, float]:
        """Return how the optimum was found."""
        if not self.prove:
            return {}
        best = self.optimum
        return {"optimum/proven": 100.0 * best.proven, "optimum/seconds": best.seconds, "optimum/cost": best.cost}

    def train_dataloader(self) -> DataLoader[int]:
        """How many decisions to take before each gradient step, 0 for none."""
        once = [self.collect] + [0] * (self.updates - 1)
        return DataLoader(once * (self.train_steps // self.collect), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[int]:
        """Numbers of held-out problems."""
        return DataLoader(range(self.val_models if self.task == "general" else 1), batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[int]:
        """Numbers of test problems."""
        count = len(self.tests) + self.test_models if self.task == "general" else 1
        return DataLoader(range(count), batch_size=None)  # type: ignore[arg-type]

    def describe(self) -> str:
        """Return the plan problem as JSON, for people."""
        return json.dumps({"name": self.workload, "task": self.task, "topology": self.topology.name}, sort_keys=True)


def sized(topology: Topology, devices: int | None) -> Topology:
    """Return the machine with that many devices: whole servers where they divide, else one server of that size.

    Raises:
        ValueError: fewer than one.
    """
    if devices is None or devices == topology.devices:
        return topology
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices!r}")
    each = topology.devices_per_node
    return topology.meshed(devices // each, each) if devices % each == 0 else topology.meshed(1, devices)
