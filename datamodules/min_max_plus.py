"""Paper 4's data: images as in paper 3, and points with the values of a known function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.catalogue import generated_card
from datamodules.images import EpochShuffle, Images, InOrder
from datamodules.tropical_cnn import ImageClassificationData
from lit_modules.ops.targets import target


class SampledImages(ImageClassificationData):
    """Images as in paper 3, watched on validation only, with samples for the restricted normalisation."""

    def val_dataloader(self) -> DataLoader:  # type: ignore[override]
        """Validation images."""
        return self._in_order(self.val_set)

    def sample_inputs(self, count: int | None, key: int) -> Iterator[Tensor]:
        """Yield batches (B, C, H, W) of `count` training images (None: all), drawn without replacement by (seed, key)."""
        yield from _sampled(self.train_set, self.train_size, count, self.seed, key, self.eval_batch_size)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points (N, D) and values (N,), handed out a batch at a time."""

    def __init__(self, x_ND: Tensor, y_N: Tensor) -> None:
        self.x_ND, self.y_N = x_ND, y_N

    def __len__(self) -> int:
        return len(self.y_N)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x_ND[indices], self.y_N[indices]


class FunctionData(LightningDataModule):
    """Batches of (x (B, D) uniform in [0, 1]^D, y (B,)), the values of a function named in `lit_modules.ops.targets`.

    Args:
        name: of the target.
        batch_size: points per training batch.
        seed: chooses the member of the target's family, the training points and their order.
        train_samples, val_samples, test_samples: how many; validation and test points do not depend on the seed.
        dtype: "float32" or "float64".
        eval_batch_size: points per evaluation batch.
    Raises:
        ValueError: an unknown name or impossible size.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        seed: int,
        train_samples: int = 20_000,
        val_samples: int = 5_000,
        test_samples: int = 20_000,
        dtype: str = "float32",
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__()
        sizes = {"train_samples": train_samples, "val_samples": val_samples, "test_samples": test_samples}
        for argument, value in (sizes | {"batch_size": batch_size, "eval_batch_size": eval_batch_size}).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument} must be an int of at least 1, got {value!r}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
        self.target = target(name, seed)
        self.batch_size, self.seed, self.eval_batch_size = batch_size, seed, eval_batch_size
        self.sizes = tuple(sizes.values())
        self.dtype = getattr(torch, dtype)
        self.input_shape = (self.target.dims,)
        self.card = generated_card(name)

    def setup(self, stage: str | None = None) -> None:
        """Draw the points; every stage draws the same."""
        keys = (f"train|{self.seed}", "val", "test")  # what is evaluated is the same for every net and training seed
        self.train_set, self.val_set, self.test_set = map(self._points, self.sizes, keys)

    def _points(self, count: int, key: str) -> Points:
        generator = _generator(f"points|{self.target.name}|{key}")
        x_ND = torch.rand(count, self.target.dims, generator=generator, dtype=torch.float64).to(self.dtype)
        return Points(x_ND, self.target(x_ND.double()).to(self.dtype))  # the value at the point as it is handed out

    @property
    def train_size(self) -> int:
        """Points seen in one epoch."""
        return self.sizes[0]

    def train_dataloader(self) -> DataLoader:
        """Training batches in an order keyed by (seed, epoch)."""
        return _loader(self.train_set, EpochShuffle(self.train_size, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader:
        """Validation points."""
        return self._in_order(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """Test points."""
        return self._in_order(self.test_set)

    def sample_inputs(self, count: int | None, key: int) -> Iterator[Tensor]:
        """Yield batches (B, D) of `count` training points (None: all), drawn without replacement by (seed, key)."""
        yield from _sampled(self.train_set, self.train_size, count, self.seed, key, self.eval_batch_size)

    def _in_order(self, points: Points) -> DataLoader:
        return _loader(points, InOrder(len(points), self.eval_batch_size))


def _loader(points: Points, batches: Sampler[list[int]]) -> DataLoader:
    return DataLoader(points, sampler=batches, batch_size=None)


def _generator(key: str) -> torch.Generator:
    """A generator that is a pure function of the key, the same in every process."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)


def _sampled(
    dataset: Images | Points, size: int, count: int | None, seed: int, key: int, batch: int
) -> Iterator[Tensor]:
    if count is not None and count < 1:
        raise ValueError(f"at least one sample is needed, got {count}")
    if count is None or count >= size:
        chosen = list(range(size))
    else:
        chosen = torch.randperm(size, generator=_generator(f"samples|{seed}|{key}"))[:count].tolist()
    for low in range(0, len(chosen), batch):
        yield dataset[chosen[low : low + batch]][0]
