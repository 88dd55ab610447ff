"""Points of known functions and images, and the samples that the restricted normalisation draws from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules import tropical_cnn
from datamodules.catalogue import generated_card
from datamodules.min_max_plus import FunctionData, SampledImages, _generator
from datamodules.sources import DataCard, ImageArrays
from lit_modules.ops.targets import target

RNG = np.random.default_rng(0)
CARD = DataCard("Toy", 90, "0" * 64, "none", False, "made up")


def _function(**options) -> FunctionData:
    given = {"name": "waves_2d", "batch_size": 8, "seed": 0, "train_samples": 30, "val_samples": 20, "test_samples": 25}
    made = FunctionData(**{**given, "eval_batch_size": 10, **options})
    made.setup("fit")
    return made


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch):
    arrays = ImageArrays(
        RNG.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8),
        np.arange(60, dtype=np.uint8) % 10,
        RNG.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8),
        np.arange(30, dtype=np.uint8) % 10,
        CARD,
    )
    monkeypatch.setattr(tropical_cnn, "load_images", lambda *_: arrays)

    def make(**options) -> SampledImages:
        given = {"batch_size": 8, "seed": 0, "val_samples": 20, "eval_batch_size": 15}
        made = SampledImages("mnist", **{**given, **options})
        made.setup("fit")
        return made

    return make


@pytest.mark.parametrize("name", ["sine_1d", "waves_2d", "waves_8d"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_the_targets_at_the_points_as_handed_out(name: str, dtype: str) -> None:
    made = _function(name=name, seed=4, dtype=dtype)
    f = target(name, 4)
    for split, count in (("train", 30), ("val", 20), ("test", 25)):
        x, y = (torch.cat(parts) for parts in zip(*getattr(made, f"{split}_dataloader")(), strict=True))
        assert x.shape == (count, f.dims)
        assert x.dtype == y.dtype == getattr(torch, dtype)
        assert 0 <= x.min() <= x.max() <= 1
        assert torch.equal(y, f(x.double()).to(y.dtype))
    assert (made.train_size, made.input_shape) == (30, (f.dims,))
    assert [len(y) for _, y in made.train_dataloader()] == [8, 8, 8, 6]


def test_seeds_change_training_but_not_the_points_that_are_evaluated() -> None:
    a, b, again = _function(seed=0), _function(seed=1), _function(seed=0)
    for split in ("val_set", "test_set"):
        assert torch.equal(getattr(a, split).x_ND, getattr(b, split).x_ND)
        assert not torch.equal(getattr(a, split).y_N, getattr(b, split).y_N)  # another member of the family
    assert not torch.equal(a.train_set.x_ND, b.train_set.x_ND)
    assert torch.equal(a.train_set.x_ND, again.train_set.x_ND)


def test_splits_share_no_point() -> None:
    made = _function()
    rows = [tuple(x.tolist()) for split in (made.train_set, made.val_set, made.test_set) for x in split.x_ND]
    assert len(set(rows)) == 30 + 20 + 25


def test_the_order_is_keyed_by_the_epoch() -> None:
    def order(epoch: int) -> torch.Tensor:
        loader = _function().train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([y for _, y in loader])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(0), order(1))
    assert torch.equal(order(0).sort().values, order(1).sort().values)


def test_the_card_says_that_nothing_is_real() -> None:
    made = _function()
    assert made.card == generated_card("waves_2d")
    assert (made.card.real, made.card.name) == (False, "waves_2d")


def _rows(batches) -> list[bytes]:
    return [row.numpy().tobytes() for batch in batches for row in batch]


@pytest.mark.parametrize("kind", ["function", "images"])
def test_samples_are_training_inputs_without_replacement(kind: str, images) -> None:
    made = _function() if kind == "function" else images()
    everything = _rows([made.train_set[list(range(made.train_size))][0]])
    assert len(set(everything)) == made.train_size
    batches = list(made.sample_inputs(17, key=0))
    assert [len(b) for b in batches] == ([10, 7] if kind == "function" else [15, 2])
    drawn = _rows(batches)
    assert len(set(drawn)) == 17
    assert set(drawn) <= set(everything)
    assert batches[0].shape[1:] == made.input_shape
    for whole in (None, made.train_size, made.train_size + 5):
        assert _rows(made.sample_inputs(whole, key=3)) == everything


@pytest.mark.parametrize("kind", ["function", "images"])
def test_samples_are_a_function_of_seed_and_key(kind: str, images) -> None:
    make = _function if kind == "function" else images
    if kind == "function":
        fixed = _function()  # the training points themselves depend on the seed; their choice must too
        chosen = {}
        for seed in (0, 1):
            fixed.seed = seed
            chosen |= {(seed, key): tuple(_rows(fixed.sample_inputs(9, key))) for key in (0, 1, 100)}
    else:
        chosen = {(s, key): tuple(_rows(make(seed=s).sample_inputs(9, key))) for s in (0, 1) for key in (0, 1, 100)}
    assert len(set(chosen.values())) == 6
    assert tuple(_rows(make(seed=0).sample_inputs(9, 100))) == chosen[0, 100]


def test_drawing_samples_neither_reads_nor_moves_global_randomness() -> None:
    made = _function()
    torch.manual_seed(0)
    first = _rows(made.sample_inputs(9, 5))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn
    assert _rows(made.sample_inputs(9, 5)) == first


def test_keys_mean_the_same_in_every_process() -> None:
    """A pure function of the key, not Python's hash, which may differ between processes and between versions."""
    assert _generator("samples|0|100").initial_seed() == 2113124977818226083


def test_images_are_watched_on_validation_alone(images) -> None:
    made = images()
    loader = made.val_dataloader()
    assert isinstance(loader, DataLoader)
    assert sum(len(y) for _, y in loader) == 20
    assert sum(len(y) for _, y in made.test_dataloader()) == 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "waves_3d"}, "unknown target 'waves_3d', nearest: 'waves_.d'"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"train_samples": -1}, "train_samples must be an int of at least 1, got -1"),
        ({"train_samples": None}, "train_samples must be an int of at least 1, got None"),
        ({"val_samples": 0}, "val_samples"),
        ({"test_samples": 0}, "test_samples"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"dtype": "float16"}, "float32 or float64, got 'float16'"),
    ],
)
def test_bad_arguments_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _function(**options)


def test_no_samples_are_refused(images) -> None:
    for made in (_function(), images()):
        with pytest.raises(ValueError, match="at least one sample is needed, got 0"):
            list(made.sample_inputs(0, 0))
