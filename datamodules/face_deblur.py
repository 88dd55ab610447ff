"""Paper 2's data: sharp faces from memory, blurred on the device, the pairs a GAN learns to deblur from.

Legend: B batch (over all ranks), C = 3 channels, H = W side of a picture, S side of a crop with its margins, K kernel side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.blur import Augmentation, Camera, Motion, augment, motion_kernels, photograph, preset, valid_part
from datamodules.face_batches import Crops, CropSet, EvalOrder, PairLoader, PairOrder
from datamodules.faces import SMALLEST_SIZE, FaceSet, is_faces, load_faces, source_of
from datamodules.sources import DataCard

EVAL_SEED = 0  # validation and test pairs are the same for every run, net and machine
TRAIN = "train"  # the name of the training law; those of the test sets are "test/..."
AHEAD = 256  # kernels of training pairs drawn at once
TESTS = {"near_linear": "near_linear", "deblurgan": "deblurgan"}


class Pairs(NamedTuple):
    """Blurred and sharp pictures float32 (B, 3, H, W) in [0, 1], which faces (B,), and the kernels (B, K, K)."""

    blurred: Tensor
    sharp: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks a batch for
    kernels: Tensor


class FaceDeblurData(LightningDataModule):
    """Batches of `Pairs`, whose blur is drawn from a key and applied where the batch is, after its transfer.

    A training pair's key is (seed, face, how often the face came before): each face is blurred anew every time. An epoch
    takes the next `train_samples` of an endless row of permutations of all faces, and a run that is stopped and resumed goes
    on with the very next batch. Validation and test pairs are keyed by the face alone.

    The blur is applied to a larger crop, which is then cut: what a motion carries into the picture over its edge is what was
    there, up to an eighth of the side; beyond that, and where the photograph ends, it is a reflection.

    Args:
        name: of a set of faces, see `datamodules.faces`.
        batch_size: B, pairs per step over all ranks together.
        seed: the key of the order, the motions and the augmentation of training pairs.
        size: H, in pixels.
        train_samples: pairs per epoch; None for as many as there are training faces.
        train_faces: how many training faces to use; None for all there are, of procedural ones as many as `train_samples`.
        val_samples, test_samples: faces of the evaluation sets; None for all there are, of procedural ones 256 and 512.
        motion: the law of the training blur, or the name of one of `datamodules.blur.PRESETS`.
        camera: what else happens to the blurred picture, in all three splits.
        test_motions: the laws of the test sets, by name; the first one is that of validation too.
        augmentation: of training faces, before the blur; by default half of them are mirrored.
        photo: whether Albumentations changes training faces as well, see `datamodules.face_batches.CropSet`.
        eval_batch_size: at most so many pairs per evaluation batch on each rank.
        num_workers: loading processes.
    Raises:
        ValueError: an unknown name or impossible size; in `setup`, sizes beyond what the set holds.
        DataUnavailable: in `setup`, nothing led to the faces.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        seed: int,
        size: int = 64,
        train_samples: int | None = None,
        train_faces: int | None = None,
        val_samples: int | None = None,
        test_samples: int | None = None,
        motion: Motion | str = "training",
        camera: Camera | None = None,
        test_motions: Mapping[str, Motion | str] | None = None,
        augmentation: Augmentation | None = None,
        photo: bool = False,
        eval_batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not is_faces(name):
            source_of(name)  # says what there is
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        optional = {"train_samples": train_samples, "train_faces": train_faces}
        optional |= {"val_samples": val_samples, "test_samples": test_samples}
        for argument, value in (sizes | {key: value for key, value in optional.items() if value is not None}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument} must be an int of at least 1, got {value!r}")
        if size < SMALLEST_SIZE:
            raise ValueError(f"size must be at least {SMALLEST_SIZE}, got {size}")
        self.faces_name, self.batch_size, self.seed, self.size = name, batch_size, seed, size
        self.train_samples, self.photo = train_samples, photo
        self.samples = {"train": train_faces, "val": val_samples, "test": test_samples}
        self.camera = camera if camera is not None else Camera()
        self.augmentation = augmentation if augmentation is not None else Augmentation()
        tests = {test: _motion(law) for test, law in (TESTS if test_motions is None else test_motions).items()}
        if not tests:
            raise ValueError("test_motions is empty: name at least one, whose law is that of validation too")
        self.test_names = tuple(tests)
        self.motions = {TRAIN: _motion(motion)} | {f"test/{test}": law for test, law in tests.items()}
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self.input_shape = (3, size, size)
        self.card: DataCard | None = None
        self._loader: PairLoader | None = None
        self._ahead: dict[int, Tensor] = {}  # kernels of training pairs, by key

    def setup(self, stage: str | None = None) -> None:
        """Load the faces once; stages share them."""
        if self.card is not None:
            return
        wanted = {"train": self.train_samples} | {split: count for split, count in self.samples.items() if count}
        drawn = {split: count for split, count in wanted.items() if count is not None}
        faces = load_faces(self.faces_name, self.size, drawn)
        chosen = {split: self._chosen(faces, split) for split in self.samples}
        first = f"test/{self.test_names[0]}"
        self.train_set = CropSet(chosen["train"], self.seed, "train", TRAIN, self.photo)
        self.val_set = CropSet(chosen["val"], EVAL_SEED, "val", first)
        self.test_sets = {name: CropSet(chosen["test"], EVAL_SEED, "test", f"test/{name}") for name in self.test_names}
        self.margin, self.card = faces.margin, faces.card

    def _chosen(self, faces: FaceSet, split: str) -> np.ndarray:
        """The first faces of a split, as many as were asked for."""
        there, asked = faces.of(split), self.samples[split]
        argument = "train_faces" if split == "train" else f"{split}_samples"
        if asked is not None and asked > len(there):
            raise ValueError(
                f"{argument} is {asked}, but the {split} split of '{self.faces_name}' holds {len(there)} faces"
            )
        if not len(there):
            people = len(set(faces.people_N.tolist()))
            raise ValueError(
                f"the {split} split of '{self.faces_name}' is empty: its {len(faces.crops_NSS3)} faces are of {people} people, "
                f"who are split by the sha256 of their names. More people are needed ({faces.card.note})"
            )
        return faces.crops_NSS3[there[:asked]]

    @property
    def train_size(self) -> int:
        """Pairs seen in one epoch, by all ranks together."""
        return self.train_samples or len(self.train_set)

    def train_dataloader(self) -> PairLoader:
        """Training crops; see `on_after_batch_transfer`."""
        order = PairOrder(len(self.train_set), self.batch_size, self.train_size, self.seed, *self._rank_and_world())
        about = {"faces": self.card.sha256 if self.card else None, "n": len(self.train_set), "size": self.size}
        about |= {"batch_size": self.batch_size, "train_size": self.train_size, "seed": self.seed}
        self._loader = PairLoader(self.train_set, order, self.num_workers, about)
        return self._loader

    def val_dataloader(self) -> DataLoader:
        """Validation crops."""
        return self._evaluation(self.val_set)

    def test_dataloader(self) -> list[DataLoader]:
        """The same test faces once for each law of motion, in the order of `test_names`."""
        return [self._evaluation(crops) for crops in self.test_sets.values()]

    def _evaluation(self, crops: CropSet) -> DataLoader:
        order = EvalOrder(len(crops), self.eval_batch_size, *self._rank_and_world())
        return DataLoader(crops, sampler=order, batch_size=None, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make pairs of the crops that arrived; Lightning calls this on the batch's device."""
        return self.pairs(batch) if isinstance(batch, Crops) else batch

    @torch.no_grad()
    def pairs(self, crops: Crops) -> Pairs:
        """Blur a batch of crops, on the device it is on."""
        sharp_BCSS = crops.crops_BCSS.float() / 255
        if crops.motion == TRAIN:
            sharp_BCSS = augment(sharp_BCSS, crops.key_B, self.augmentation)
        kernels_BKK = self._kernels(crops)
        blurred_BCSS = photograph(sharp_BCSS, kernels_BKK, self.camera, crops.key_B)
        blurred, sharp = self._core(blurred_BCSS), self._core(sharp_BCSS)
        return Pairs(blurred, sharp, crops.index_B, kernels_BKK)

    def _kernels(self, crops: Crops) -> Tensor:
        """The kernels of a batch. A kernel has the same bits in any batch, and small batches cost as much as large ones: in
        training those of the coming batches are drawn too, and kept until their turn comes.
        """
        law, keys = self.motions[crops.motion], crops.key_B.tolist()
        if crops.motion != TRAIN or self._loader is None:
            return motion_kernels(law, crops.key_B, self.size)
        if any(key not in self._ahead for key in keys):
            batches = -(-AHEAD // max(1, len(keys)))
            coming_B = torch.cat([crops.key_B, self._loader.coming(batches).to(crops.key_B.device)])
            self._ahead = dict(zip(coming_B.tolist(), motion_kernels(law, coming_B, self.size), strict=True))
        return torch.stack([self._ahead[key] for key in keys])

    def _core(self, images_BCHW: Tensor) -> Tensor:
        """The picture proper, in the middle of a crop; of what a "valid" convolution left, what is left of it."""
        around = images_BCHW.shape[-1] - self.size
        if around < 0:
            raise ValueError(
                f"boundary 'valid' leaves {images_BCHW.shape[-1]} pixels of crops of {self.size + 2 * self.margin}, "
                f"fewer than the size {self.size}: draw smaller kernels, or use boundary 'reflect'"
            )
        return valid_part(images_BCHW, around + 1).contiguous()

    def _rank_and_world(self) -> tuple[int, int]:
        """Among the ranks that see different data, which the strategy knows."""
        known = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (known["rank"], known["num_replicas"]) if known is not None else (0, 1)


def _motion(law: Motion | str) -> Motion:
    return preset(law) if isinstance(law, str) else law
