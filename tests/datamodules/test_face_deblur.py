"""Pairs: blurred from a larger crop, fresh in training, fixed in evaluation, exact after a resume with and without workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import face_deblur
from datamodules.blur import CAMERAS, Augmentation, Camera, Motion, convolve, kernel_extent, key_of, motion_kernels
from datamodules.face_align import margin_of
from datamodules.face_batches import PairLoader
from datamodules.face_deblur import FaceDeblurData, Pairs
from datamodules.faces import FaceSet
from datamodules.sources import DataCard

SIZE, SIDE = 32, 32 + 2 * margin_of(32)
COUNTS = {"train": 20, "val": 6, "test": 9}
CARD = DataCard("Toy", 35, "0" * 64, "none", False, "made up", "35 faces of 35 pictures")


def _faces() -> FaceSet:
    """Smooth random pictures, so that blur and flips show."""
    n = sum(COUNTS.values())
    rough = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(rough, (SIDE, SIDE), mode="bilinear")
    crops = (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    splits = np.repeat(list(COUNTS), list(COUNTS.values()))
    names = np.array([f"{i}" for i in range(n)])
    return FaceSet(crops, np.zeros((n, 5, 2), np.float32), names, names, splits, SIZE, CARD)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(face_deblur, "load_faces", lambda *_: _faces())

    def make(**options) -> FaceDeblurData:
        made = FaceDeblurData(**{"name": "faces", "batch_size": 8, "seed": 0, "size": SIZE, **options})
        made.setup("fit")
        return made

    return make


def _all(data: FaceDeblurData, loader) -> Pairs:
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return Pairs(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def test_batches_are_pairs_in_the_unit_interval(data) -> None:
    made = data()
    batch = data().on_after_batch_transfer(next(iter(made.train_dataloader())), 0)
    assert isinstance(batch, Pairs)
    assert batch.blurred.shape == batch.sharp.shape == (8, 3, SIZE, SIZE)
    assert batch.blurred.dtype == batch.sharp.dtype == torch.float32
    assert 0 <= batch.blurred.min() <= batch.blurred.max() <= 1
    assert batch.index.dtype == torch.int64
    assert torch.allclose(batch.kernels.sum((1, 2)), torch.ones(8), atol=1e-5)
    assert (made.input_shape, made.train_size, made.card) == ((3, SIZE, SIZE), 20, CARD)
    assert (batch.blurred - batch.sharp).abs().mean() > 0.01


def test_evaluation_crops_are_the_faces_and_their_blur_is_that_of_the_kernel(data) -> None:
    made = data(test_motions={"line": Motion(kind="linear", extent=(0.1, 0.2))})
    pairs, faces = _all(made, made.test_dataloader()[0]), _faces()
    m = faces.margin
    crops = torch.from_numpy(faces.crops_NSS3[faces.of("test")]).permute(0, 3, 1, 2).float() / 255
    assert pairs.index.tolist() == list(range(9))
    assert torch.equal(pairs.sharp, crops[:, :, m : m + SIZE, m : m + SIZE])
    assert torch.equal(pairs.kernels, motion_kernels(made.motions["test/line"], key_of(0, "test", pairs.index), SIZE))
    blurred = convolve(crops.double(), pairs.kernels.double())[:, :, m : m + SIZE, m : m + SIZE]
    assert (pairs.blurred - blurred).abs().max() < 1e-5


def test_what_moves_in_over_the_border_is_what_was_there(data) -> None:
    """Within the margin's reach the blur equals that of an unbounded picture, not that of a reflected one."""
    made = data(test_motions={"line": Motion(kind="linear", extent=(0.2, 0.2))})
    pairs, faces = _all(made, made.test_dataloader()[0]), _faces()
    crops = torch.from_numpy(faces.crops_NSS3[faces.of("test")]).permute(0, 3, 1, 2).float() / 255
    assert 2 * faces.margin >= 0.2 * SIZE + 1
    kernels = pairs.kernels
    reach = (kernels.shape[-1] - 1) // 2 - faces.margin
    assert kernels.sum((1, 2)).allclose(
        kernels[:, reach:-reach, reach:-reach].sum((1, 2))
    )  # all mass within the margin
    unbounded = convolve(crops, kernels[:, reach:-reach, reach:-reach], "valid")
    assert (pairs.blurred - unbounded).abs().max() < 1e-5
    reflected = convolve(pairs.sharp, kernels[:, reach:-reach, reach:-reach])
    assert (pairs.blurred - reflected).abs().max() > 0.02


def test_a_valid_convolution_is_cut_like_its_sharp_side(data) -> None:
    small = {"m": Motion(kind="linear", extent=(0.05, 0.05))}
    valid = data(camera=Camera(boundary="valid"), test_motions=small)
    reflected = data(test_motions=small)
    for a, b in zip(*(_all(d, d.test_dataloader()[0]) for d in (valid, reflected)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    far = data(camera=Camera(boundary="valid"), test_motions={"m": Motion(extent=(0.2, 0.2))})
    with pytest.raises(ValueError, match=r"boundary 'valid' leaves .* pixels of crops of 40, fewer than the size 32"):
        _all(far, far.test_dataloader()[0])


def test_evaluation_pairs_are_the_same_for_every_run(data) -> None:
    noisy = {"camera": CAMERAS["sensor"]}
    a = data(seed=0, train_samples=4, **noisy)
    b = data(seed=7, batch_size=3, eval_batch_size=2, motion="severe", augmentation=Augmentation(0), **noisy)
    for which in range(3):
        left, right = (_all(one, [one.val_dataloader(), *one.test_dataloader()][which]) for one in (a, b))
        assert all(torch.allclose(x.float(), y.float(), atol=1e-6) for x, y in zip(left, right, strict=True))
    fewer = data(test_samples=4, **noisy)
    first, four = (_all(one, one.test_dataloader()[1]).blurred for one in (a, fewer))
    assert torch.allclose(first[:4], four, atol=1e-6)


def test_test_sets_differ_in_their_motion_alone_and_validation_has_the_first(data) -> None:
    made = data(test_motions={"weak": Motion(extent=(0.03, 0.05)), "strong": "severe"})
    assert made.test_names == ("weak", "strong")
    weak, strong = (_all(made, loader) for loader in made.test_dataloader())
    assert torch.equal(weak.sharp, strong.sharp)
    assert (kernel_extent(weak.kernels) < 0.06 * SIZE + 1).all()
    assert (kernel_extent(strong.kernels) > 0.12 * SIZE - 1).all()
    validation = _all(made, made.val_dataloader())
    assert torch.equal(
        validation.kernels, motion_kernels(made.motions["test/weak"], key_of(0, "val", validation.index), SIZE)
    )


def test_every_time_a_face_comes_it_is_blurred_anew(data) -> None:
    made = data(train_samples=40, augmentation=Augmentation(flip=0.5))
    pairs = _all(made, made.train_dataloader())
    assert sorted(pairs.index.tolist()) == sorted([*range(20), *range(20)])
    assert len({kernel.numpy().tobytes() for kernel in pairs.kernels}) == 40
    m = made.margin
    core = torch.from_numpy(made.train_set.crops_NSS3[:, m:-m, m:-m]).permute(0, 3, 1, 2)
    known = core[pairs.index].float() / 255
    same = [torch.equal(sharp, face) for sharp, face in zip(pairs.sharp, known, strict=True)]
    mirrored = [torch.equal(sharp, face.flip(-1)) for sharp, face in zip(pairs.sharp, known, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 5 < sum(mirrored) < 35


def test_other_photographs_of_a_face_are_a_function_of_its_key(data) -> None:
    made, again, plain = data(photo=True), data(photo=True), data()
    first = _all(made, made.train_dataloader())
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first.sharp, _all(again, again.train_dataloader()).sharp)
    unchanged = _all(plain, plain.train_dataloader())
    assert torch.equal(first.index, unchanged.index)
    changed = ((first.sharp - unchanged.sharp).abs().amax((1, 2, 3)) > 0.01).sum()
    assert 10 < changed <= 20  # of 20, each of three changes coming with probability 1/2
    alone = made.train_set[[(int(first.index[3]), 0)]]
    assert torch.equal(made.pairs(alone).sharp[0], first.sharp[3])


class _Watch(LightningModule):
    """Keeps what it is given: faces, and what was drawn for them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch: Pairs, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch.index.tolist(), batch.blurred.double().sum().item()))
        return self.weight.sum()

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        assert isinstance(batch, Pairs)

    def test_step(self, batch: Pairs, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, len(batch.index)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _trainer(folder: Path, epochs: int, **options) -> Trainer:
    return Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                   enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, **options)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("workers", "steps"), [(0, 2), (1, 2), (1, 3)]
)  # an epoch has three: inside it, and at its end
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(data, tmp_path: Path, workers: int, steps: int) -> None:
    whole = _Watch()
    _trainer(tmp_path, 3, enable_checkpointing=False).fit(whole, datamodule=data(seed=5))
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)
    first = _Watch()
    _trainer(tmp_path, 1, callbacks=[keep]).fit(first, datamodule=data(seed=5, num_workers=workers))
    rest = _Watch()
    _trainer(tmp_path, 3, callbacks=[keep]).fit(
        rest,
        datamodule=data(seed=5, num_workers=workers),
        ckpt_path=tmp_path / f"step={steps}.ckpt",
        weights_only=False,
    )
    assert first.seen == whole.seen[:3]
    assert rest.seen == whole.seen[steps:]
    assert len({str(batch) for batch in whole.seen}) == 9


def test_the_state_of_another_order_is_refused(data) -> None:
    state = data(seed=1).train_dataloader().state_dict()
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        data(seed=2).train_dataloader().load_state_dict(state)
    assert isinstance(data().train_dataloader(), PairLoader)


def test_lightning_runs_all_test_sets_in_order(data, tmp_path: Path) -> None:
    watch = _Watch()
    _trainer(tmp_path, 1).test(watch, datamodule=data(eval_batch_size=5), verbose=False)
    assert watch.seen == [(0, 5), (0, 4), (1, 5), (1, 4)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"train_samples": 2.5}, "train_samples must be an int of at least 1, got 2.5"),
        ({"eval_batch_size": True}, "eval_batch_size must be an int"),
        ({"size": 8}, "size must be at least 16, got 8"),
        ({"name": "face"}, "unknown faces 'face'; did you mean 'faces'"),
        ({"motion": "sever"}, "unknown preset 'sever', nearest: 'severe'"),
        ({"test_motions": {}}, "test_motions is empty"),
        ({"test_motions": {"a": "nearlinear"}}, "nearest: 'near_linear'"),
    ],
)
def test_bad_arguments_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FaceDeblurData(**{"name": "faces", "batch_size": 8, "seed": 0, **options})


def test_more_than_there_is_cannot_be_had(data) -> None:
    with pytest.raises(ValueError, match="test_samples is 10, but the test split of 'faces' holds 9 faces"):
        data(test_samples=10)
    with pytest.raises(ValueError, match="train_faces is 21, but the train split"):
        data(train_faces=21)
    assert data(train_faces=5, train_samples=64).train_size == 64


def test_an_empty_split_says_how_many_people_there_are(data, monkeypatch: pytest.MonkeyPatch) -> None:
    few = _faces()
    few.splits_N[few.splits_N == "val"] = "train"
    monkeypatch.setattr(face_deblur, "load_faces", lambda *_: few)
    with pytest.raises(
        ValueError, match=r"the val split of 'faces' is empty: its 35 faces are of 35 people.*35 pictures"
    ):
        data()


def test_procedural_faces_come_in_the_numbers_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    made = FaceDeblurData("procedural_faces", 4, 0, 16, train_faces=5, val_samples=2, test_samples=3)
    made.setup("fit")
    assert (len(made.train_set), len(made.val_set), len(made.test_sets["deblurgan"])) == (5, 2, 3)
    assert (made.card.name, made.card.real) == ("procedural faces", False)
    made = FaceDeblurData("procedural_faces", 4, 0, 16, train_samples=8, val_samples=2, test_samples=3)
    made.setup("fit")
    assert len(made.train_set) == made.train_size == 8


def test_hydra_builds_it_from_a_plain_configuration(data) -> None:
    laws = {"near_linear": "near_linear", "own": {"_target_": "datamodules.blur.Motion", "extent": [0.1, 0.2]}}
    node = {
        "_target_": "datamodules.face_deblur.FaceDeblurData",
        **{"name": "faces", "batch_size": 8, "seed": 0, "size": SIZE, "motion": "mild", "test_motions": laws},
        "camera": {"_target_": "datamodules.blur.Camera", "gamma": 2.2, "noise_sigma": [0.0, 0.01]},
        "augmentation": {"_target_": "datamodules.blur.Augmentation", "flip": 0.0},
    }
    made = instantiate(node)
    made.setup("fit")
    assert made.test_names == ("near_linear", "own")
    assert made.motions["test/own"] == Motion(extent=(0.1, 0.2))
    assert made.camera == Camera(gamma=2.2, noise_sigma=(0.0, 0.01))
    assert _all(made, made.test_dataloader()[1]).blurred.isfinite().all()
