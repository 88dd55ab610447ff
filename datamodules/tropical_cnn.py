"""Paper 3's data: MNIST, Fashion-MNIST and CIFAR-10, with a validation split carved from the training images."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.images import EpochShuffle, Images, InOrder, loader, split_indices
from datamodules.sources import DataCard, dataset, load_images


class ImageClassificationData(LightningDataModule):
    """Batches of (x float32 (B, C, H, W) in [0, 1], y int64 (B,)). No augmentation, no mean or std, as published.

    Args:
        name: "mnist", "fashion_mnist" or "cifar10".
        batch_size: images per training batch.
        seed: with the epoch, the key of the order of training images.
        val_samples: size of the fixed validation split.
        train_samples: size of the fixed training subset, or None for all that remain.
        test_samples: the first so many test images, or None for all.
        eval_batch_size: images per evaluation batch; evaluation noise is keyed by the batch index, so it is fixed.
        root: where official files lie; default DATA_ROOT.
        num_workers: loading processes.
    Raises:
        ValueError: an unknown name or impossible size.
    Source: the co-author's code of arXiv 2103.02096 for the transforms; the validation split is ours.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        seed: int,
        val_samples: int = 5000,
        train_samples: int | None = None,
        test_samples: int | None = None,
        eval_batch_size: int = 1000,
        root: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        dataset(name)
        for argument, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}")
        if test_samples is not None and test_samples < 1:
            raise ValueError(f"test_samples must be at least 1, got {test_samples}")
        self.dataset_name, self.batch_size, self.seed, self.eval_batch_size = name, batch_size, seed, eval_batch_size
        self.val_samples, self.train_samples, self.test_samples = val_samples, train_samples, test_samples
        self.root, self.num_workers = Path(root) if root else None, num_workers
        self.card: DataCard | None = None

    def setup(self, stage: str | None = None) -> None:
        """Load the arrays once; stages share them."""
        if self.card is not None:
            return
        arrays = load_images(self.dataset_name, self.root)
        train, val = split_indices(len(arrays.train_labels), self.val_samples, self.train_samples)
        self.train_set = Images(arrays.train_images[train], arrays.train_labels[train])
        self.val_set = Images(arrays.train_images[val], arrays.train_labels[val])
        self.test_set = Images(arrays.test_images[: self.test_samples], arrays.test_labels[: self.test_samples])
        self.num_classes = int(arrays.train_labels.max()) + 1
        self.input_shape = (arrays.train_images.shape[3], *arrays.train_images.shape[1:3])  # (C, H, W)
        self.card = arrays.card

    @property
    def train_size(self) -> int:
        """Images seen in one epoch."""
        return len(self.train_set)

    def train_dataloader(self) -> DataLoader:
        """Training batches in an order keyed by (seed, epoch); the last one may be short."""
        return loader(self.train_set, EpochShuffle(self.train_size, self.batch_size, self.seed), self.num_workers)

    def val_dataloader(self) -> list[DataLoader]:
        """Validation, which decides, and the test set, which is only watched for the published protocol's number."""
        return [self._in_order(self.val_set), self._in_order(self.test_set)]

    def test_dataloader(self) -> DataLoader:
        """The test set."""
        return self._in_order(self.test_set)

    def _in_order(self, images: Images) -> DataLoader:
        return loader(images, InOrder(len(images), self.eval_batch_size), self.num_workers)
