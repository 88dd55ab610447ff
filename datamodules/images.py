"""Images in memory: splits, scaling, and an order of batches that is a pure function of (seed, epoch).

Legend: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SPLIT_SEED = 0  # the validation split is the same for every training seed, net and machine


@dataclass(frozen=True)
class ImageSet:
    """What a data set holds, known without loading it: numbers of images, and their channels, side and classes."""

    train: int
    test: int
    channels: int
    image_size: int
    classes: int


IMAGE_SETS = {
    "mnist": ImageSet(60_000, 10_000, 1, 28, 10),
    "fashion_mnist": ImageSet(60_000, 10_000, 1, 28, 10),
    "cifar10": ImageSet(50_000, 10_000, 3, 32, 10),
}


def check_split(n: int, val_samples: int, train_samples: int | None = None) -> None:
    """Check that n training images can be split so.

    Raises:
        ValueError: sizes that leave nothing, or ask for more than there is.
    """
    if not 0 < val_samples < n:
        raise ValueError(f"val_samples must lie between 1 and {n - 1}, got {val_samples}")
    rest = n - val_samples
    if train_samples is not None and not 0 < train_samples <= rest:
        raise ValueError(
            f"train_samples must lie between 1 and {rest} ({n} less {val_samples} for validation), got {train_samples}"
        )


def split_indices(n: int, val_samples: int, train_samples: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (training, validation) indices of a fixed random split of n training images.

    The last `val_samples` of one fixed permutation are for validation; training takes the first `train_samples` of the
    rest, or all of it. So a smaller training set is a part of a larger one, and validation never changes with it.

    Raises:
        ValueError: sizes that leave nothing, or ask for more than there is.
    """
    check_split(n, val_samples, train_samples)
    rest = n - val_samples
    order = np.random.default_rng(SPLIT_SEED).permutation(n)
    return order[:rest][:train_samples], order[rest:]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images kept as bytes and handed out a batch at a time as float32 (B, C, H, W) in [0, 1], with int64 labels (B,)."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray) -> None:
        self.images_NCHW = torch.from_numpy(np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)))
        self.labels_N = torch.from_numpy(labels_N.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return the whole batch of these indices at once: per-image collation costs more than a small net's step."""
        return self.images_NCHW[indices].float() / 255, self.labels_N[indices]


class EpochShuffle(Sampler[list[int]]):
    """Batches of a permutation keyed by (seed, epoch). Lightning calls `set_epoch` before each epoch, resumed or not."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed, self.epoch = n, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for start in range(0, self.n, self.batch_size):
            yield order[start : start + self.batch_size].tolist()


class InOrder(Sampler[list[int]]):
    """Batches of 0, 1, 2, … for evaluation."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n, self.batch_size = n, batch_size

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.n, self.batch_size):
            yield list(range(start, min(self.n, start + self.batch_size)))


class EpochLoader(DataLoader):
    """A loader whose workers are not started before its first batch is asked for.

    Lightning makes the iterator of a resumed run before it tells the sampler the epoch; workers that were dealt their indices
    then would see the first epoch's order again.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def loader(images: Images, batches: Sampler[list[int]], num_workers: int = 0) -> DataLoader:
    """Return a loader that asks `images` for one whole batch at a time."""
    return EpochLoader(images, sampler=batches, batch_size=None, num_workers=num_workers)
