"""The order of token windows: a pure function of (seed, stream, position), the same on one device and on many.

Legend: N windows, B batch (over all ranks), S context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.shards import TokenShards


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of S + 1 tokens, the i-th from token i * S on, so that each token but the first is predicted once.

    Args:
        shards: of one split.
        context: S.
    """

    def __init__(self, shards: TokenShards, context: int) -> None:
        self.shards, self.context = shards, context

    def __len__(self) -> int:
        return max(0, (len(self.shards) - 1) // self.context)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return the whole batch of these windows: inputs and targets, int64 (B, S) each, one token apart."""
        tokens_BT = np.empty((len(indices), self.context + 1), np.int64)
        for row_T, index in zip(tokens_BT, indices, strict=True):
            row_T[:] = self.shards.window(index * self.context, self.context + 1)
        both_BT = torch.from_numpy(tokens_BT)
        return both_BT[:, :-1].contiguous(), both_BT[:, 1:].contiguous()


class RankedOrder(DistributedSampler):
    """Batches of window indices for one rank. Being a DistributedSampler keeps Lightning from wrapping it in another."""

    def __init__(self, rank: int, world: int) -> None:
        # Not the base class's __init__: it deals samples out one by one, and these are dealt out within each batch.
        self.rank, self.num_replicas, self.shuffle, self.epoch = rank, world, False, 0


class TrainOrder(RankedOrder):
    """An endless row of windows, cut into epochs: pass p over the windows is a permutation keyed by (seed, stream, p), and
    each epoch goes on where the one before it ended, on into the next pass.

    A batch is the same whatever the number of ranks; rank r of W takes its sequences r, r + W, …

    Args:
        n: windows.
        batch_size: B, over all ranks; the last batch of an epoch may be shorter.
        size: windows per epoch.
        seed, stream: the key.
        rank, world: r and W.
    Raises:
        ValueError: a batch would not go evenly to W ranks.
    """

    def __init__(
        self, n: int, batch_size: int, size: int, seed: int, stream: str, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(rank, world)
        for what, value in (("batch_size", batch_size), ("train_samples", size)):
            if value % world:
                raise ValueError(
                    f"{what} is that of all ranks together: {value} sequences cannot be dealt evenly to {world} ranks"
                )
        self.n, self.batch_size, self.size, self.seed, self.stream = n, batch_size, size, seed, stream
        self.skip = 0  # batches of this epoch that were handed out before the run was stopped
        self._pass, self._order = -1, np.empty(0, np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next. Lightning says so before each epoch, resumed or not."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        first, self.skip = self.skip, 0
        for number in range(first, len(self)):
            yield self.batch(self.epoch, number)[self.rank :: self.num_replicas].tolist()

    def batch(self, epoch: int, number: int) -> np.ndarray:
        """Return the windows of an epoch's batch, for all ranks together: int64 (B,)."""
        low, high = number * self.batch_size, min(self.size, (number + 1) * self.batch_size)
        places = range(epoch * self.size + low, epoch * self.size + high)
        return np.array([self._permutation(place // self.n)[place % self.n] for place in places])

    def _permutation(self, number: int) -> np.ndarray:
        if number != self._pass:
            key = int.from_bytes(hashlib.sha256(f"{self.seed}|{self.stream}|{number}".encode()).digest(), "little")
            self._pass, self._order = number, np.random.default_rng(key).permutation(self.n)
        return self._order


class EvalOrder(RankedOrder):
    """`count` of n windows, evenly spaced, the same for every seed; rank r of W takes each W-th.

    Every rank has as many batches, as even as they come and none beyond `batch_size`, so that no rank waits for another.

    Raises:
        ValueError: too few windows to give each rank some in each batch.
    """

    def __init__(self, n: int, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(rank, world)
        chosen = np.arange(count) * n // count
        most = -(-count // world)  # on the first ranks; the others have as many or one less
        self.batches = -(-most // batch_size)
        if count // world < self.batches:
            raise ValueError(
                f"{count} windows for evaluation do not go into {self.batches} batches on each of {world} ranks; "
                f"choose a multiple of {world}"
            )
        self.mine = chosen[rank::world]

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for indices in np.array_split(self.mine, self.batches):
            yield indices.tolist()


class TokenLoader(DataLoader):
    """Loads whole batches in a TrainOrder, and says in its state how many of the epoch's it has handed out.

    Lightning keeps that state in checkpoints and gives it back, so that a stopped run goes on with the next batch.

    Args:
        windows, order: what, and in which order.
        num_workers: loading processes. Indices are dealt out by the main process, so workers never overlap.
        about: says what the order is of; the state of another order is refused.
    """

    def __init__(self, windows: Windows, order: TrainOrder, num_workers: int, about: dict[str, Any]) -> None:
        super().__init__(windows, sampler=order, batch_size=None, num_workers=num_workers)
        self.order, self.about, self.handed = order, about, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Yield batches. Nothing happens before the first is asked for: Lightning sets the epoch only after calling this."""
        self.handed = self.order.skip
        for batch in super().__iter__():
            self.handed += 1  # before the batch is used: when it has been, a checkpoint counts it
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order, the same on every rank."""
        return {"epoch": self.order.epoch, "batches": self.handed, "about": self.about}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that place.

        Raises:
            ValueError: the state is of another order; what differs is said.
        """
        if state["about"] != self.about:
            names = sorted(self.about.keys() | state["about"].keys())
            pairs = [(name, state["about"].get(name), self.about.get(name)) for name in names]
            differs = "; ".join(f"{name} was {was}, is {now}" for name, was, now in pairs if was != now)
            raise ValueError(f"the checkpoint cannot be continued inside its epoch with other data or order: {differs}")
        self.order.epoch, self.order.skip, self.handed = state["epoch"], state["batches"], state["batches"]
