"""The DQN agent of paper 5 as tianshou builds it: policy, targets, buffer and collector; the loss is handed to Lightning.

Legend: B batch, F features, K actions.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """What kind of DQN.

    Attributes:
        kind: "dqn", or "c51" for distributions over values (the net then has atoms, and `n_step` is 1).
        double: the net chooses the action whose value the target network gives; else the target network chooses both.
        n_step: rewards summed before the target takes over.
        prioritised: transitions are drawn by their last error (exponent `alpha`, correction from `beta` to 1), else evenly.
        gamma: discount; 1, since an episode is one plan.
        target_every: updates between copies of the net to the target network.
        buffer: transitions kept.
        environments: that are collected from side by side.
        low, high: of the values that atoms cover.
    Raises:
        ValueError: an impossible number, or several steps with "c51", whose targets in tianshou look one step ahead.
    The paper: a Rainbow agent without noisy layers; its numbers are not known, these are ours.
    """

    kind: Literal["dqn", "c51"] = "dqn"
    double: bool = True
    n_step: int = 3
    prioritised: bool = True
    alpha: float = 0.6
    beta: float = 0.4
    gamma: float = 1.0
    target_every: int = 100
    buffer: int = 8192
    environments: int = 8
    low: float = -1.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("dqn", "c51"):
            raise ValueError(f"kind must be dqn or c51, got {self.kind!r}")
        for name in ("n_step", "target_every", "buffer", "environments"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie above 0 and at most at 1, got {self.gamma!r}")
        if self.kind == "c51" and (self.n_step != 1 or not self.low < self.high):
            raise ValueError(f"c51 takes n_step 1 and low below high, got {self.n_step}, {self.low}, {self.high}")


@contextmanager
def interpreted() -> Iterator[None]:
    """Import tianshou without compiling its helpers: that takes tens of seconds, and they are few numpy calls."""
    import numba

    config: Any = numba.config
    kept = config.DISABLE_JIT
    config.DISABLE_JIT = True
    try:
        yield
    finally:
        config.DISABLE_JIT = kept


def preload() -> None:
    """Import what an agent needs, so that processes forked later have it."""
    with interpreted():
        import tianshou.algorithm.modelfree.c51
        import tianshou.algorithm.modelfree.dqn
        import tianshou.algorithm.optim
        import tianshou.data
        import tianshou.env  # noqa: F401


class HandOver:
    """Stands where tianshou has its optimiser: keeps the loss, so that Lightning can take the step."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None

    def step(self, loss: Tensor, *_: Any, **__: Any) -> None:
        """Keep the loss."""
        self.loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the optimiser is Lightning's."""
        return {}


class Values(nn.Module):
    """The net as tianshou calls it: arrays in, (values, hidden state) out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        """Return ((B, K) or (B, K, A), state)."""
        weight = next(self.net.parameters())
        return self.net(torch.as_tensor(np.asarray(obs), dtype=weight.dtype, device=weight.device)), state


class PlanAgent:
    """Collects decisions into a buffer, and turns a sample of it into a loss.

    Args:
        net: from (B, F) to (B, K), or (B, K, A) for "c51".
        environments: as many as the recipe says, with equal spaces.
        recipe: of the agent.
        seed: of what is drawn from the buffer.
    """

    def __init__(self, net: nn.Module, environments: Sequence[Any], recipe: Recipe, seed: int = 0) -> None:
        with interpreted():
            from tianshou.data import Collector, PrioritizedVectorReplayBuffer, VectorReplayBuffer
            from tianshou.env import DummyVectorEnv
        self.recipe, self.environments, self.values = recipe, list(environments), Values(net)
        self.algorithm = _algorithm(self.values, environments[0], recipe)
        self.algorithm.optim = self.hand_over = HandOver()
        size = max(recipe.buffer, recipe.environments)
        self.buffer: Any = (
            PrioritizedVectorReplayBuffer(size, recipe.environments, alpha=recipe.alpha, beta=recipe.beta)
            if recipe.prioritised
            else VectorReplayBuffer(size, recipe.environments)
        )
        for number, part in enumerate([self.buffer, *self.buffer.buffers]):  # tianshou seeds them all with 42
            part._random_state = np.random.RandomState((seed + 7919 * number) % 2**32)
        vector = DummyVectorEnv([_giver(environment) for environment in self.environments])
        self.collector: Any = Collector(self.algorithm, vector, self.buffer, exploration_noise=True)
        self.collector.reset()

    @property
    def policy(self) -> Any:
        """tianshou's policy."""
        return self.algorithm.policy

    def collect(self, steps: int, epsilon: float) -> None:
        """Take that many decisions, a random allowed one with probability `epsilon`."""
        from tianshou.utils.torch_utils import policy_within_training_step

        self.policy.set_eps_training(epsilon)
        with policy_within_training_step(self.policy):
            self.collector.collect(n_step=steps)

    def loss(self, batch_size: int, beta: float | None = None) -> Tensor:
        """Return tianshou's loss of a sample of the buffer; priorities and the target network follow by themselves."""
        from tianshou.utils.torch_utils import policy_within_training_step

        if beta is not None and self.recipe.prioritised:
            self.buffer.set_beta(beta)
        with policy_within_training_step(self.policy):
            self.algorithm.update(self.buffer, batch_size)
        assert self.hand_over.loss is not None
        return self.hand_over.loss

    def snapshot(self) -> dict[str, Any]:
        """Return all that a cut run needs beside the net's weights: buffer, environments, target network, generators."""
        collector = self.collector
        kept = {
            "buffer": self.buffer,
            "observed": (collector._pre_collect_obs_RO, collector._pre_collect_info_R),
            "environments": [environment.snapshot() for environment in self.environments],
            "updates": self.algorithm._iter,
            "numpy": np.random.get_state(),
        }
        packed = zlib.compress(pickle.dumps(kept), 1)  # mostly zeros
        return {"packed": packed, "target": self.algorithm.model_old.state_dict(), "torch": torch.get_rng_state()}

    def restore(self, kept: dict[str, Any]) -> None:
        """Go on from a snapshot."""
        found = pickle.loads(zlib.decompress(kept["packed"]))
        self.buffer = found["buffer"]
        if len(self.buffer):
            self.buffer._set_batch_for_children()  # they share the memory of the whole, which a pickle forgets
        self.collector.buffer = self.buffer
        self.collector._pre_collect_obs_RO, self.collector._pre_collect_info_R = found["observed"]
        for environment, standing in zip(self.environments, found["environments"], strict=True):
            environment.restore(standing)
        self.algorithm._iter = found["updates"]
        self.algorithm.model_old.load_state_dict(kept["target"])
        np.random.set_state(found["numpy"])
        torch.set_rng_state(kept["torch"])


def _giver(environment: Any) -> Any:
    return lambda: environment


def _algorithm(values: Values, environment: Any, recipe: Recipe) -> Any:
    with interpreted():
        from tianshou.algorithm.modelfree.c51 import C51, C51Policy
        from tianshou.algorithm.modelfree.dqn import DQN, DiscreteQLearningPolicy
        from tianshou.algorithm.optim import AdamOptimizerFactory
        from tianshou.data import Batch

    spaces = {"action_space": environment.action_space, "observation_space": environment.observation_space}
    same: dict[str, Any] = {
        "optim": AdamOptimizerFactory(lr=1e-3),  # never used: see HandOver
        "gamma": recipe.gamma,
        "n_step_return_horizon": recipe.n_step,
        "target_update_freq": recipe.target_every,
    }
    if recipe.kind == "c51":
        net: Any = values.net
        categorical = C51Policy(model=values, num_atoms=net.atoms, v_min=recipe.low, v_max=recipe.high, **spaces)
        return C51(policy=categorical, **same)

    class MaskedDQN(DQN):
        """Without the double estimate, tianshou's target takes its maximum over masked actions too; here it does not."""

        def _target_q(self, buffer: Any, indices: np.ndarray) -> Tensor:
            if self.is_double:
                return super()._target_q(buffer, indices)
            ahead = Batch(obs=buffer[indices].obs_next, info=[None] * len(indices))
            q_BK = self.policy(ahead, model=self.model_old).logits
            mask_BK = torch.as_tensor(np.asarray(ahead.obs.mask), device=q_BK.device)
            return q_BK.masked_fill(~mask_BK, -torch.inf).max(1).values

    return MaskedDQN(policy=DiscreteQLearningPolicy(model=values, **spaces), is_double=recipe.double, **same)
