"""The generator and the critic each move when they should, on what they should, and a resumed run is the same run."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules.face_deblur import FaceDeblurData
from experiments.run import EpochRandomness, weights_sha256
from lit_modules.deblur_report import DeblurReport
from lit_modules.face_deblur import FaceDeblur, check_terms
from lit_modules.nets.critic import DoubleScaleCritic, PatchCritic
from lit_modules.nets.deblur_naf import DeblurNAF
from lit_modules.schedules import linear_decay

CRITIC = partial(PatchCritic, width=4, layers=2)
GAME: dict[str, Any] = {"critic": CRITIC, "adversarial_weight": 0.01, "penalty": 10.0}


@pytest.fixture(scope="module")
def data() -> FaceDeblurData:
    data = FaceDeblurData(
        "procedural_faces",
        batch_size=4,
        seed=0,
        size=40,
        train_samples=16,
        train_faces=16,
        val_samples=4,
        test_samples=4,
    )
    data.setup()
    return data


def _net() -> DeblurNAF:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DeblurNAF(width=4, encoder=(1,), middle=1, decoder=(1,))


def _module(**settings: Any) -> FaceDeblur:
    report = DeblurReport(judge=False)
    adam = partial(torch.optim.Adam, lr=1e-3)
    return FaceDeblur(_net(), adam, steps_per_epoch=4, report=report, **{"pixel": "l1", **settings})


def _fit(
    module: LightningModule, data: FaceDeblurData, folder: Path, epochs: int = 1, resume: Path | None = None
) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=[EpochRandomness(0)], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return trainer


def _moved(before: dict[str, torch.Tensor], module: FaceDeblur, prefix: str) -> bool:
    now = module.state_dict()
    return any(not torch.equal(before[name], now[name]) for name in before if name.startswith(prefix))


def _copy(module: FaceDeblur) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_critic_moves_at_every_batch_and_the_generator_at_every_nth(data: FaceDeblurData, tmp_path: Path) -> None:
    moves: list[tuple[bool, bool]] = []

    class Watched(FaceDeblur):
        def training_step(self, pairs: Any, batch_idx: int) -> None:
            before = _copy(self)
            super().training_step(pairs, batch_idx)
            moves.append((_moved(before, self, "critic."), _moved(before, self, "net.")))

    adam = partial(torch.optim.Adam, lr=1e-3)
    module = Watched(_net(), adam, steps_per_epoch=4, report=DeblurReport(judge=False), critic_steps=2, **GAME)
    trainer = _fit(module, data, tmp_path)
    assert moves == [(True, False), (True, True)] * 2
    assert module.batches == 4
    assert trainer.callback_metrics["val/batches"] == 4


def test_without_a_critic_there_is_one_optimiser_and_no_adversarial_term(data: FaceDeblurData, tmp_path: Path) -> None:
    module = _module()
    before = _copy(module)
    trainer = _fit(module, data, tmp_path)
    assert len(trainer.optimizers) == 1
    assert _moved(before, module, "net.")
    pairs = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    with torch.no_grad():
        losses = module.step(pairs)
    assert losses.adversarial == 0
    assert losses.perceptual == 0
    assert losses.pixel == pytest.approx(
        float((module.net(pairs.blurred) - pairs.sharp).abs().mean().detach()), rel=1e-6
    )


def test_the_schedule_counts_batches_for_both_optimisers(data: FaceDeblurData, tmp_path: Path) -> None:
    module = _module(schedule=linear_decay(2, 0.0), critic_steps=2, **GAME)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Detected call of `lr_scheduler")
        trainer = _fit(module, data, tmp_path)
    rates = [optimiser.param_groups[0]["lr"] for optimiser in trainer.optimizers]
    assert rates == pytest.approx([0.5e-3, 0.5e-3])  # one of two epochs is over, whatever has moved how often


@pytest.mark.parametrize(
    "settings",
    [GAME | {"ema": 0.5, "critic_steps": 2}, GAME | {"game": "ralsgan", "penalty": 0.0, "pool": 3}],
    ids=["wgan", "ralsgan"],
)
def test_a_resumed_run_ends_with_the_same_generator_critic_average_and_pool(
    settings: dict[str, Any], data: FaceDeblurData, tmp_path: Path
) -> None:
    whole = _module(schedule=linear_decay(2), **settings)
    _fit(whole, data, tmp_path, epochs=2)
    first = _module(schedule=linear_decay(2), **settings)
    _fit(first, data, tmp_path, epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    resumed = _module(schedule=linear_decay(2), **settings)
    _fit(resumed, data, tmp_path, epochs=2, resume=tmp_path / "last.ckpt")
    assert weights_sha256(resumed.state_dict()) == weights_sha256(whole.state_dict())
    assert weights_sha256(first.state_dict()) != weights_sha256(whole.state_dict())
    assert resumed.batches == whole.batches == 8


def test_the_averaged_generator_follows_its_law_and_is_what_restores(data: FaceDeblurData, tmp_path: Path) -> None:
    module = _module(ema=0.9)
    kept: list[dict[str, torch.Tensor]] = []

    class Watch(EpochRandomness):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            kept.append({name: tensor.clone() for name, tensor in pl_module.net.state_dict().items()})

    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[Watch(0)], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    averaged = kept[0]  # the average begins with the first weights it sees
    for weights in kept[1:]:
        averaged = {name: 0.9 * averaged[name] + 0.1 * weights[name] for name in weights}
    found = module.averaged.module.state_dict()  # type: ignore[union-attr]
    for name, tensor in averaged.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    x = torch.rand(1, 3, 40, 40)
    assert torch.equal(module(x), module.averaged(x).clamp(0, 1))  # type: ignore[misc]
    assert not torch.equal(module(x), module.net(x).clamp(0, 1))


def test_the_critics_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = _module(**GAME, seed=3)
    torch.manual_seed(2)
    again, other = _module(**GAME, seed=3), _module(**GAME, seed=4)
    assert weights_sha256(first.critic.state_dict()) == weights_sha256(again.critic.state_dict())  # type: ignore[union-attr]
    assert weights_sha256(first.critic.state_dict()) != weights_sha256(other.critic.state_dict())  # type: ignore[union-attr]


def test_a_critic_of_two_scales_has_a_pool_of_two(data: FaceDeblurData, tmp_path: Path) -> None:
    double = partial(DoubleScaleCritic, width=4, patch_layers=1, image_layers=2)
    module = _module(critic=double, adversarial_weight=0.01, game="ralsgan", pool=5)
    _fit(module, data, tmp_path)
    assert [int(pool.pushed) for pool in module.pools] == [4, 4]  # type: ignore[union-attr]
    assert module.pools[0].means_NS.shape == (5, 2)  # type: ignore[index]


def test_inherited_weights_are_where_the_average_begins() -> None:
    module = _module(ema=0.9)
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.fill_(0.25)
    module.on_inherit({})
    assert all((p == 0.25).all() for p in module.averaged.module.parameters())  # type: ignore[union-attr]


def test_a_loss_that_is_not_finite_stops_the_run(data: FaceDeblurData, tmp_path: Path) -> None:
    module = _module()
    with torch.no_grad():
        next(module.net.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="generator's loss became nan in epoch 0"):
        _fit(module, data, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_weight": -1.0}, "pixel_weight must be at least 0, got -1"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1"),
        ({"critic_steps": 0}, "critic_steps must be at least 1, got 0"),
        ({"perceptual_weight": 0.1}, "features is none: name a network"),
        ({"adversarial_weight": 0.1}, "there is no critic: give both or neither"),
        ({"critic": CRITIC}, "there is a critic: give both or neither"),
        ({"pixel": "l3"}, "l3"),
        (GAME | {"critic": partial(CRITIC, norm="batch")}, "must not have batch norm"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _module(**settings)


def test_check_terms_takes_what_the_module_takes_by_default() -> None:
    check_terms(dict(_module().hparams), critic=False)
