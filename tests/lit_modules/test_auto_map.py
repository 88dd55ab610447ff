"""The agent of paper 5: it learns, it never counts on what is masked, and a cut run goes on to the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from datamodules.planning.environment import PlanEnvironment
from datamodules.planning.partition_env import PartitionProblem, Pruning
from datamodules.planning.problem import Optimum, cost_of
from datamodules.planning.problems import Case
from datamodules.planning.searchers import Budget, search
from datamodules.planning.toys import blocks_table, chained_table
from lit_modules.auto_map import AutoMap, Exploration, Record
from lit_modules.auto_map_search import PlanSearch
from lit_modules.nets.q_network import QNetwork
from lit_modules.plan_agent import PlanAgent, Recipe

ADAM = partial(torch.optim.Adam, lr=2e-3)
WIDTH = 40


class _Source:
    """A toy in the place of a model."""

    def __init__(self, table: Any, pruning: Pruning) -> None:
        self.table, self.pruning = table, pruning

    def problem(self) -> PartitionProblem:
        return PartitionProblem("toy", self.table, pruning=self.pruning)

    def say(self, problem: PartitionProblem) -> dict[str, float]:
        return {"plan/partitioned": float(sum(problem.values()))}


class _Toy(LightningDataModule):
    task = "partition"

    def __init__(self, table: Any = None, pruning: Pruning | None = None, steps: int = 256, collect: int = 8) -> None:
        super().__init__()
        self.source = _Source(chained_table(7) if table is None else table, pruning or Pruning())
        self.steps, self.collect = steps, collect
        found = search(self.source.problem(), "exhaustive", Budget(steps=10**5))
        self.optimum = Optimum(found.cost, "exhaustive", True)
        self.least: float | None = found.cost
        self.saved: list[tuple[int, ...]] = []

    @property
    def train_size(self) -> int:
        return self.steps

    def environments(self, count: int, observer: Any = None) -> list[PlanEnvironment]:
        return [PlanEnvironment(self.source.problem(), width=WIDTH, observer=observer) for _ in range(count)]

    def case(self, split: str, number: int) -> Case:
        return Case(self.source.problem(), self.optimum, "", self.source.say)

    def judged(self, record: Record, budget: int) -> dict[str, float]:
        return record.metrics(self.source.problem(), self.optimum.cost, budget)

    def proof(self) -> dict[str, float]:
        return {"optimum/proven": 100.0}

    def save_plan(self, decisions: tuple[int, ...], file: Any) -> None:
        self.saved.append(decisions)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.collect] * (self.steps // self.collect), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([0], batch_size=None)

    test_dataloader = val_dataloader


def _trainer(folder: Any, epochs: int, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, **options,
    )  # fmt: skip


def _module(seed: int = 0, epochs: int = 4, recipe: Recipe | None = None, atoms: int = 1, **options: Any) -> AutoMap:
    torch.manual_seed(seed)
    np.random.seed(seed)
    net = QNetwork(WIDTH, 2, (32,), dueling=True, atoms=atoms)
    given = {"steps_per_epoch": 32, "epochs": epochs, "warmup": 64, "batch_size": 32, "seed": seed, **options}
    return AutoMap(net, ADAM, recipe=recipe or Recipe(target_every=20, buffer=512, environments=4), **given)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(target_every=20, buffer=512, environments=4),
        Recipe(double=False, n_step=1, prioritised=False, target_every=20, buffer=512, environments=4),
        Recipe(kind="c51", n_step=1, target_every=20, buffer=512, environments=4, low=0.0, high=1.0),
    ],
    ids=["rainbow", "vanilla", "c51"],
)
def test_the_agent_learns_to_plan_greedily_at_the_optimum(recipe: Recipe, tmp_path: Any) -> None:
    module, data = _module(epochs=4, recipe=recipe, atoms=21 if recipe.kind == "c51" else 1), _Toy()
    trainer = _trainer(tmp_path, 4)
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["search/gap"] == 0
    assert logged["search/reached"] == 100
    assert 0 < logged["search/steps"] <= logged["search/spent_steps"] == 4 * 256
    assert logged["search/mean_gap"] >= 0
    assert cost_of(data.source.problem(), module.record.decisions) == data.optimum.cost
    assert data.saved == [module.record.decisions]
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/gap"] == pytest.approx(0, abs=1e-6)
    assert tested["greedy_plan/partitioned"] == 4  # every second of seven


def test_it_learns_rules_from_penalties(tmp_path: Any) -> None:
    """Without a mask most plans break a rule at first; greedily none does in the end."""
    data = _Toy(blocks_table(1, useless=0), Pruning(mask=False, linkage=False), steps=512)
    module = _module(epochs=6, steps_per_epoch=64)
    trainer = _trainer(tmp_path, 6)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/throughput"] > 1  # better than nothing split, and no rule broken


class _Stop(Exception):
    pass


class _Cut(AutoMap):
    at: int | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.at:
            raise _Stop


@pytest.mark.parametrize("prioritised", [True, False])
def test_a_cut_run_goes_on_to_the_same_weights(prioritised: bool, tmp_path: Any) -> None:
    recipe = Recipe(target_every=20, buffer=300, environments=4, prioritised=prioritised)  # the buffer wraps round

    def make() -> _Cut:
        whole = _module(seed=3, epochs=3, recipe=recipe)
        whole.__class__ = _Cut
        return whole  # type: ignore[return-value]

    straight, data = make(), _Toy()
    _trainer(tmp_path, 3).fit(straight, datamodule=data)
    first = make()
    before = _trainer(tmp_path, 2)
    before.fit(first, datamodule=_Toy())
    before.save_checkpoint(tmp_path / "cut.ckpt")
    again = make()
    torch.manual_seed(99)  # whatever happened in between
    np.random.seed(99)
    _trainer(tmp_path, 3).fit(again, datamodule=_Toy(), ckpt_path=tmp_path / "cut.ckpt", weights_only=False)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert [(p.steps, p.cost) for p in straight.record.trace] == [(p.steps, p.cost) for p in again.record.trace]
    assert straight.record.steps == again.record.steps == 3 * 256


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Any) -> None:
    states = []
    for seed in (1, 1, 2):
        module = _module(seed=seed, epochs=1)
        _trainer(tmp_path, 1).fit(module, datamodule=_Toy())
        states.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("double", [True, False])
def test_no_masked_action_leaks_into_a_target(double: bool) -> None:
    """Values of forbidden actions are made huge; targets stay those of allowed ones."""

    class Tempting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x_BF: torch.Tensor) -> torch.Tensor:
            allowed_B = x_BF[:, 2 * 7 + 5] > 0.5  # whether the second action is allowed
            tempting = torch.where(allowed_B, 0.25, 1000.0)
            return torch.stack([torch.zeros_like(tempting), tempting], dim=1) + 0 * self.weight

    data = _Toy(pruning=Pruning(linkage=False))
    agent = PlanAgent(Tempting(), data.environments(2), Recipe(double=double, n_step=1, buffer=256, environments=2))
    agent.collect(200, epsilon=1.0)
    whole = agent.buffer.sample_indices(0)
    kept = agent.buffer[whole]
    assert kept.obs.mask[np.arange(len(whole)), kept.act].all()  # none is ever taken, however random
    going_on = whole[~kept.terminated]  # of what follows the end tianshou takes no value
    assert (~agent.buffer[going_on].obs_next.mask).any()
    assert agent.algorithm._target_q(agent.buffer, going_on).max() <= 0.25


def test_exploration_falls_and_stays() -> None:
    law = Exploration(start=1.0, end=0.1, share=0.5)
    assert [law(done) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    with pytest.raises(ValueError, match="exploration"):
        Exploration(share=0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "sarsa"}, "kind"),
        ({"n_step": 0}, "n_step"),
        ({"gamma": 0.0}, "gamma"),
        ({"kind": "c51", "n_step": 3}, "c51 takes n_step 1"),
        ({"kind": "c51", "n_step": 1, "low": 1.0, "high": 0.0}, "low below high"),
    ],
)
def test_impossible_recipes_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe(**options)


def test_a_dueling_net_is_its_two_heads() -> None:
    torch.manual_seed(0)
    net, x_BF = QNetwork(6, 3, (8,), dueling=True), torch.randn(5, 6)
    h = net.body(x_BF)
    advantage = net.advantage(h)
    assert net.value is not None
    wanted = net.value(h) + advantage - advantage.mean(1, keepdim=True)
    assert torch.allclose(net(x_BF), wanted, atol=1e-6)
    assert torch.allclose(net(x_BF).mean(1, keepdim=True), net.value(h), atol=1e-6)
    shares = QNetwork(6, 3, (8,), atoms=11)(x_BF)
    assert shares.shape == (5, 3, 11)
    assert torch.allclose(shares.sum(2), torch.ones(5, 3))
    with pytest.raises(ValueError, match="actions"):
        QNetwork(6, 0)


@pytest.mark.parametrize("method", ["random", "greedy", "beam", "annealing", "mcmc", "exhaustive"])
def test_searchers_log_what_the_agent_logs(method: str, tmp_path: Any) -> None:
    module = PlanSearch(torch.nn.Identity(), ADAM, 1, method=method, steps=600, seed=4)
    data = _Toy()
    (tested,) = _trainer(tmp_path, 0).test(module, datamodule=data, verbose=False)
    assert tested["search/gap"] >= 0
    assert tested["search/spent_steps"] <= 600
    assert tested["search/proven"] == (100 if method == "exhaustive" else 0)
    assert tested["search/optimum"] == pytest.approx(data.optimum.cost)
    assert {"search/steps", "search/seconds", "search/mean_gap", "gap_at/steps_10", "plan/partitioned"} <= tested.keys()
    with pytest.raises(ValueError, match="steps"):
        PlanSearch(torch.nn.Identity(), ADAM, 1, steps=0)


def test_without_an_optimum_nothing_is_said_against_one(tmp_path: Any) -> None:
    data = _Toy()
    data.least = None
    module = PlanSearch(torch.nn.Identity(), ADAM, 1, method="random", steps=200, seed=4)
    (tested,) = _trainer(tmp_path, 0).test(module, datamodule=data, verbose=False)
    assert {"search/cost", "search/speedup", "search/spent_steps"} <= tested.keys()
    assert not [
        name for name in tested if "gap" in name or name in ("search/optimum", "search/reached", "search/steps")
    ]


def test_a_bigger_table_is_learnt_too(tmp_path: Any) -> None:
    data = _Toy(blocks_table(3, useless=1), steps=256)
    module = _module(epochs=2)
    trainer = _trainer(tmp_path, 2)
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["search/gap"]) == 0
