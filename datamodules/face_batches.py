"""The order of face pairs, and the crops they are made of: pure functions of (seed, place), the same on one device and many.

Legend: n faces, B batch (over all ranks), S side of a crop with its margins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.counter_random import Stream, key_of, words

Asked = list[tuple[int, int]]  # of each pair its face, and how often that one was handed out before


class Crops(NamedTuple):
    """What a loader hands out: crops uint8 (B, 3, S, S), which faces (B,), the pairs' keys (B,), and the motion's name."""

    crops_BCSS: Tensor
    index_B: Tensor
    key_B: Tensor
    motion: str


class CropSet(Dataset[Crops]):
    """Crops of one split, handed out a batch at a time with the keys of what is to be drawn for them.

    Args:
        crops_NSS3: uint8.
        seed, split: the key, with a face's index and how often it came before.
        motion: the name of what will blur them.
        photo: whether Albumentations tilts each by up to 5 degrees, scales it by up to 5 percent and changes its light and
            colours a little, as other photographs of the person might look.
    """

    def __init__(self, crops_NSS3: np.ndarray, seed: int, split: str, motion: str, photo: bool = False) -> None:
        self.crops_NSS3, self.seed, self.split, self.motion, self.photo = crops_NSS3, seed, split, motion, photo

    def __len__(self) -> int:
        return len(self.crops_NSS3)

    def keys_of(self, asked: Asked) -> Tensor:
        """Return the keys of these pairs, int64 (B,)."""
        index_B, turn_B = torch.tensor(asked, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return key_of(self.seed, self.split, index_B | turn_B << 32)  # no face has an index beyond 32 bits

    def __getitem__(self, asked: Asked) -> Crops:
        """Return the whole batch of these faces at once."""
        index_B, key_B = torch.tensor([face for face, _ in asked], dtype=torch.int64), self.keys_of(asked)
        crops_BSS3 = self.crops_NSS3[index_B.numpy()]
        if self.photo:
            seeds_B3 = words(key_B, 3, Stream.GENERAL).tolist()
            crops_BSS3 = np.stack([_other_photo(crop, three) for crop, three in zip(crops_BSS3, seeds_B3, strict=True)])
        return Crops(torch.from_numpy(crops_BSS3).permute(0, 3, 1, 2).contiguous(), index_B, key_B, self.motion)


def _other_photo(crop_SS3: np.ndarray, seeds: list[int]) -> np.ndarray:
    """Albumentations keeps generators of its own, which repeat in every worker and epoch: they are seeded for each crop, and
    each transform's apart, since from one seed all would decide alike.
    """
    pipeline = _photo()
    for transform, seed in zip(pipeline.transforms, seeds, strict=True):
        transform.set_random_seed(seed)
    return pipeline(image=crop_SS3)["image"]


@cache
def _photo() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it would ask the network for newer versions
    import albumentations

    return albumentations.Compose(
        [
            albumentations.Affine(scale=(0.95, 1.05), rotate=(-5, 5), border_mode=4, p=0.5),  # 4: reflection
            albumentations.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.5),
            albumentations.HueSaturationValue(hue_shift_limit=5, sat_shift_limit=20, val_shift_limit=0, p=0.5),
        ]
    )


class RankedBatches(DistributedSampler):
    """Batches for one rank. Being a DistributedSampler keeps Lightning from wrapping it in another."""

    def __init__(self, rank: int, world: int) -> None:
        # Not the base class's __init__: it deals samples out one by one, and these are dealt out within each batch.
        self.rank, self.num_replicas, self.shuffle, self.epoch = rank, world, False, 0


class PairOrder(RankedBatches):
    """An endless row of faces, cut into epochs: pass p over the faces is a permutation keyed by (seed, p), and each epoch
    goes on where the one before it ended, on into the next pass.

    A batch is the same whatever the number of ranks; rank r of W takes its pairs r, r + W, …

    Args:
        n: faces.
        batch_size: B, over all ranks; the last batch of an epoch may be shorter.
        size: pairs per epoch.
        seed: the key.
        rank, world: r and W.
    Raises:
        ValueError: a batch would not go evenly to W ranks.
    """

    def __init__(self, n: int, batch_size: int, size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(rank, world)
        for what, value in (("batch_size", batch_size), ("train_samples", size)):
            if value % world:
                raise ValueError(
                    f"{what} is that of all ranks together: {value} pairs cannot be dealt evenly to {world} ranks"
                )
        self.n, self.batch_size, self.size, self.seed = n, batch_size, size, seed
        self.skip = 0  # batches of this epoch that were handed out before the run was stopped

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next. Lightning says so before each epoch, resumed or not."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Asked]:
        first, self.skip = self.skip, 0
        for number in range(first, len(self)):
            yield self.own(self.epoch, number)

    def own(self, epoch: int, number: int) -> Asked:
        """Return this rank's share of an epoch's batch."""
        return self.batch(epoch, number)[self.rank :: self.num_replicas]

    def batch(self, epoch: int, number: int) -> Asked:
        """Return an epoch's batch, for all ranks together."""
        low, high = number * self.batch_size, min(self.size, (number + 1) * self.batch_size)
        places = range(epoch * self.size + low, epoch * self.size + high)
        return [(int(_permutation(self.n, self.seed, p // self.n)[p % self.n]), p // self.n) for p in places]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(n)


class EvalOrder(RankedBatches):
    """The first `count` faces in order; rank r of W takes each W-th. Every rank has as many batches.

    Raises:
        ValueError: too few faces to give each rank some in each batch.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(rank, world)
        most = -(-count // world)  # on the first ranks; the others have as many or one less
        self.batches = -(-most // batch_size)
        if count // world < self.batches:
            raise ValueError(f"{count} faces do not go into {self.batches} batches on each of {world} ranks")
        self.mine = np.arange(count)[rank::world]

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Asked]:
        for indices in np.array_split(self.mine, self.batches):
            yield [(int(index), 0) for index in indices]


class PairLoader(DataLoader):
    """Loads whole batches in a PairOrder, and says in its state how many of the epoch's it has handed out.

    Lightning keeps that state in checkpoints and gives it back, so that a stopped run goes on with the next batch.

    Args:
        crops, order: what, and in which order.
        num_workers: loading processes. Faces are dealt out by the main process, so workers never overlap.
        about: says what the order is of; the state of another order is refused.
    """

    def __init__(self, crops: CropSet, order: PairOrder, num_workers: int, about: dict[str, Any]) -> None:
        super().__init__(crops, sampler=order, batch_size=None, num_workers=num_workers)
        self.crops, self.order, self.about, self.handed = crops, order, about, 0

    def __iter__(self) -> Iterator[Crops]:  # type: ignore[override]
        """Yield batches. Nothing happens before the first is asked for: Lightning sets the epoch only after calling this."""
        self.handed = self.order.skip
        for batch in super().__iter__():
            self.handed += 1  # before the batch is used: when it has been, a checkpoint counts it
            yield batch

    def coming(self, batches: int) -> Tensor:
        """Return the keys of the batch handed out last and of those that come after it in the epoch, int64 (pairs,)."""
        first = max(0, self.handed - 1)
        numbers = range(first, min(first + batches, len(self.order)))
        return self.crops.keys_of([pair for number in numbers for pair in self.order.own(self.order.epoch, number)])

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
