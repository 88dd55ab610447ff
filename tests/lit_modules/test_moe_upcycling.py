"""Paper 1's LightningModule: its loss, what its optimiser does to which parameters, its schedule in tokens, what it logs."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from toy_moe import ADAMW, CONTEXT, HIDDEN, LAYERS, STILL, VOCAB, WIDTH, Text, trainer, transformer

from experiments.cell import ablations, resolve
from experiments.records import CellKey
from lit_modules.moe_upcycling import CANDIDATES, MoEUpcycling, parameter_groups
from lit_modules.nets.moe import Experts
from lit_modules.ops.cloze import cloze_hits
from lit_modules.schedules import token_cosine

MIXTURE = Experts(expansion=2, granularity=2, top_k=2)
COARSE = Experts(expansion=4, top_k=1)


class _Seen(Callback):
    """Keeps each batch's loss, the learning rates it ran at and the tokens before it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self.val: list[float] = []

    def on_train_batch_start(self, fit, module, *_) -> None:
        self.rates.append({group["name"]: group["lr"] for group in fit.optimizers[0].param_groups})
        self.tokens.append(module.tokens)

    def on_train_batch_end(self, fit, module, outputs, *_) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_end(self, fit, *_) -> None:
        self.val.append(fit.callback_metrics["val/loss"].item())


def _module(
    experts: Experts | None = None, optimizer=STILL, net: dict[str, Any] | None = None, **options
) -> MoEUpcycling:
    return MoEUpcycling(transformer(experts, **(net or {})), optimizer, **{"steps_per_epoch": 8, **options})


def _fitted(folder: Path, module: MoEUpcycling, epochs: int = 1, data: Text | None = None):
    seen = _Seen()
    fit = trainer(folder, epochs, callbacks=[seen])
    fit.fit(module, datamodule=data or Text())
    return fit, seen


def _cross_entropy(logits_BSV: Tensor, y_BS: Tensor) -> float:
    """Mean over tokens of -log p of the token that follows, in float64."""
    p = logits_BSV.double().softmax(-1).gather(-1, y_BS[..., None])
    return -p.log().mean().item()


@pytest.mark.parametrize("experts", [MIXTURE, COARSE])
def test_the_loss_is_cross_entropy_and_the_weighted_sums_of_both_router_losses(
    experts: Experts, tmp_path: Path
) -> None:
    module, data = _module(experts, balance=0.3, z=0.05), Text()
    _, seen = _fitted(tmp_path, module, data=data)
    x, y = (part[:4] for part in data.whole("train"))
    expected = _cross_entropy(module.net(x), y)
    balance = z = 0.0
    for layer in module.net.moe_layers().values():
        logits = layer.routed.logits_SN.detach().double()  # type: ignore[union-attr]
        chosen = logits.topk(experts.top_k).indices.flatten()
        shares = torch.bincount(chosen, minlength=experts.count).double() / len(chosen)
        balance += experts.count * float(shares @ logits.softmax(1).mean(0))
        z += float(logits.exp().sum(1).log().square().mean())
    assert balance > 0.9 * LAYERS  # one for each layer: a mean over layers would be half of it
    assert seen.losses[0] == pytest.approx(expected + 0.3 * balance + 0.05 * z, rel=1e-5)
    losses = module.step((x, y))
    assert losses.cross_entropy.item() == pytest.approx(expected, rel=1e-5)
    assert (losses.balance.item(), losses.z.item()) == pytest.approx((balance, z), rel=1e-5)


def test_a_dense_net_has_cross_entropy_alone(tmp_path: Path) -> None:
    module, data = _module(balance=5.0, z=5.0), Text()
    _, seen = _fitted(tmp_path, module, data=data)
    x, y = (part[:4] for part in data.whole("train"))
    assert seen.losses[0] == pytest.approx(_cross_entropy(module.net(x), y), rel=1e-5)
    assert module.configure_callbacks() == []
    assert [type(c).__name__ for c in _module(MIXTURE).configure_callbacks()] == ["ExpertWatch"]


EVERYTHING = Experts(expansion=2, granularity=2, top_k=2, shared=1, output="learnable")


@pytest.mark.parametrize(("experts", "tied"), [(None, False), (None, True), (MIXTURE, False), (EVERYTHING, True)])
def test_every_trainable_parameter_is_in_exactly_one_group(experts: Experts | None, tied: bool) -> None:
    net = transformer(experts, tied=tied)
    net.blocks[0].attention.query.weight.requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(net)}
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {kind: {names[id(p)] for p in group["params"]} for kind, group in groups.items()}
    assert found.get("routers", set()) == {n for n in names.values() if n.endswith("router.weight")}
    norms = {n for n in names.values() if "norm" in n} | {n for n in names.values() if n.endswith("output_scale")}
    assert found["norms"] == norms
    assert len(norms) == 2 * LAYERS + 1 + (LAYERS if experts is EVERYTHING else 0)
    assert {"embedding.weight", "blocks.1.attention.output.weight"} <= found["matrices"]
    if experts is not None:
        assert {"blocks.0.mlp.up", "blocks.1.mlp.down"} <= found["matrices"]
    assert all(groups[kind].get("weight_decay") == 0 for kind in groups if kind != "matrices")


def test_weight_decay_shrinks_matrices_and_leaves_norms_and_routers_alone() -> None:
    """One step of AdamW without gradients: p becomes (1 - lr * decay) p, or stays."""
    module = _module(EVERYTHING, ADAMW)
    optimizer = module.configure_optimizers()
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    for p in module.net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in module.net.named_parameters():
        decayed = p.ndim > 1 and "router" not in name
        expected = before[name] * (1 - 0.01 * 0.1) if decayed else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("schedule", [None, token_cosine(2, 0.1, 0.25, 0.1)])
def test_the_routers_rate_is_a_multiple_of_all_others_at_every_step(schedule, tmp_path: Path) -> None:
    module = _module(MIXTURE, partial(torch.optim.AdamW, lr=0.02), schedule=schedule, router_lr=0.1, epochs=2)
    _, seen = _fitted(tmp_path, module, epochs=2)
    assert len(seen.rates) == 16
    for step, rates in enumerate(seen.rates):
        factor = 1.0 if schedule is None else schedule(step / 8)
        expected = {"matrices": 0.02 * factor, "norms": 0.02 * factor, "routers": 0.002 * factor}
        assert rates == pytest.approx(expected, rel=1e-9)


def test_a_router_rate_of_zero_keeps_the_routers_and_nothing_else(tmp_path: Path) -> None:
    module = _module(MIXTURE, ADAMW, router_lr=0.0)
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    _fitted(tmp_path, module)
    still = {name for name, p in module.net.named_parameters() if torch.equal(before[name], p)}
    assert still == {name for name in before if name.endswith("router.weight")}


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_the_gradient_is_scaled_down_to_the_largest_norm_and_never_up(clip: float, tmp_path: Path) -> None:
    """SGD at rate 1 moves the weights by the gradient itself."""
    module, data = _module(MIXTURE, partial(torch.optim.SGD, lr=1.0), clip=clip), Text(train=4)
    x, y = data.whole("train")
    losses = module.step((x, y))
    (losses.cross_entropy + 0.01 * losses.balance).backward()
    gradients = [p.grad.clone() for p in module.net.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert 0.05 < norm < 1e6
    module.net.zero_grad()
    before = [p.detach().clone() for p in module.net.parameters()]
    _fitted(tmp_path, module, data=data)
    for p, old, gradient in zip(module.net.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - gradient * min(1.0, clip / norm), rtol=1e-4, atol=1e-6)


def test_the_schedule_is_the_same_curve_of_tokens_for_half_and_for_eight_times_the_batch(tmp_path: Path) -> None:
    law = token_cosine(2, floor=0.1, warmup=0.25, start=0.1)
    curves = {}
    for batch in (2, 4, 32):
        module = _module(COARSE, ADAMW, schedule=law, steps_per_epoch=32 // batch, epochs=2)
        _, seen = _fitted(tmp_path, module, epochs=2, data=Text(batch_size=batch))
        curves[batch] = dict(zip(seen.tokens, [rates["matrices"] for rates in seen.rates], strict=True))
        epoch = 32 * CONTEXT
        assert list(curves[batch]) == list(range(0, 2 * epoch, batch * CONTEXT))
        assert curves[batch] == pytest.approx({n: 0.01 * law(n / epoch) for n in curves[batch]}, rel=1e-9)
    assert curves[2].items() >= curves[4].items() >= curves[32].items()


def test_points_of_the_validation_curve_are_named_by_percent_and_weigh_every_token_alike(tmp_path: Path) -> None:
    module, data = _module(COARSE, ADAMW, epochs=3), Text(val=10, eval_batch=4)  # batches of 4, 4 and 2
    fit, seen = _fitted(tmp_path, module, epochs=3, data=data)
    logged = {name: float(v) for name, v in fit.callback_metrics.items() if name.startswith("val_at/")}
    assert logged == pytest.approx(dict(zip(("val_at/033", "val_at/067", "val_at/100"), seen.val, strict=True)))
    assert seen.val[0] > seen.val[1] > seen.val[2]
    x, y = data.whole("val")
    assert logged["val_at/100"] == pytest.approx(_cross_entropy(module.net(x), y), rel=1e-5)


def test_tokens_are_counted_and_the_last_epoch_is_chosen_by_them(tmp_path: Path) -> None:
    """The worst epoch last: the paper takes the last weights, not the best."""
    keep = ModelCheckpoint(tmp_path, "best", monitor="val/tokens", mode="max", save_on_train_epoch_end=True)
    module = _module(COARSE, partial(torch.optim.SGD, lr=0.5, maximize=True), epochs=2)
    seen = _Seen()
    fit = trainer(tmp_path, 2, callbacks=[seen, keep], enable_checkpointing=True)
    fit.fit(module, datamodule=Text())
    assert seen.val[1] > seen.val[0]
    tokens = 2 * 32 * CONTEXT
    assert fit.callback_metrics["train/tokens"] == fit.callback_metrics["val/tokens"] == tokens == module.tokens
    assert keep.best_model_score == tokens
    kept = torch.load(keep.best_model_path, weights_only=False)
    assert kept["epoch"] == 1
    assert (kept["tokens"], sorted(kept["curve"])) == (tokens, [50, 100])
    assert all(torch.equal(kept["state_dict"][f"net.{n}"], p) for n, p in module.net.state_dict().items())


@pytest.mark.parametrize("experts", [None, COARSE, MIXTURE])
def test_what_is_logged_at_test(experts: Experts | None, tmp_path: Path) -> None:
    module, data = _module(experts), Text(test=16, eval_batch=16)
    (tested,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    x, y = data.whole("test")
    loss = _cross_entropy(module.net(x), y)
    assert tested["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert tested["test/bpb"] == pytest.approx(loss / math.log(2) / 2, rel=1e-5)  # two bytes to a token
    hits = cloze_hits(module.net, x[::4], y[::4], candidates=CANDIDATES)
    assert hits is not None
    assert tested["test/cloze"] == pytest.approx(100 * hits.sum().item() / 4)
    count = sum(p.numel() for p in module.net.parameters())
    mlp = 2 * WIDTH * HIDDEN
    idle = 0 if experts is None else LAYERS * (experts.count - experts.top_k) * mlp // experts.granularity
    assert tested["cost/active_params"] == count - idle
    matrices = LAYERS * (4 * WIDTH**2 + mlp) + VOCAB * WIDTH  # the embedding is looked up, the head multiplied
    if experts is not None:
        matrices += LAYERS * (experts.count * WIDTH + (experts.top_k // experts.granularity - 1) * mlp)
    assert tested["cost/flops_per_token"] == 2 * matrices + LAYERS * 4 * CONTEXT * WIDTH
    assert ("moe/dead" in tested) == (experts is not None)


def test_the_cloze_score_is_over_all_sequences_and_missing_where_no_batch_has_enough(tmp_path: Path) -> None:
    module = _module()
    few = Text(test=12, eval_batch=12)  # every fourth of 12 are 3 sequences
    (tested,) = trainer(tmp_path).test(module, datamodule=few, verbose=False)
    assert "test/cloze" not in tested
    assert "test/loss" in tested
    uneven = Text(test=44, eval_batch=28)  # 7 sequences to choose from, then 4
    (tested,) = trainer(tmp_path).test(module, datamodule=uneven, verbose=False)
    x, y = uneven.whole("test")
    both = [cloze_hits(module.net, *(p[low:high:4] for p in (x, y))) for low, high in ((0, 28), (28, 44))]
    right = sum(hits.sum().item() for hits in both if hits is not None)
    assert tested["test/cloze"] == pytest.approx(100 * right / 11, rel=1e-5)


def test_a_diverging_loss_stops_the_run_and_impossible_coefficients_are_refused(tmp_path: Path) -> None:
    module = _module()
    module.net.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan in epoch 0"):
        _fitted(tmp_path, module)
    for name in ("balance", "z", "router_lr"):
        with pytest.raises(ValueError, match=rf"{name} must be at least 0, got -0\.1"):
            _module(**{name: -0.1})
    for clip in (0.0, -1.0):
        with pytest.raises(ValueError, match="clip must be above 0"):
            _module(clip=clip)


def test_it_learns(tmp_path: Path) -> None:
    """Text that goes up by one with probability 0.8 and else down: no net can be below its entropy."""
    floor = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    module = _module(COARSE, partial(torch.optim.AdamW, lr=0.01), epochs=6)
    fit, seen = _fitted(tmp_path, module, epochs=6, data=Text(train=256, val=64, batch_size=16))
    assert seen.losses[0] > math.log(VOCAB) - 0.5
    assert 0.8 * floor < fit.callback_metrics["val/loss"] < floor + 0.25


DISTINCT = ["dense", "e8g8t8_10_layernorm", "e8g8t8_10_learnable", "e8g8t8s8_10", "e8g1t1_10_capacity", "e8g1t2_10_ts"]


@pytest.mark.parametrize("ablation", DISTINCT)
def test_every_kind_of_ablation_trains_two_batches(ablation: str, tmp_path: Path) -> None:
    assert ablation in ablations("moe_upcycling")
    config = resolve(CellKey("moe_upcycling", ablation, "python_stdlib", 0, "smoke")).config
    torch.manual_seed(0)
    net = instantiate(config["net"], vocab=VOCAB)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optim = config["optim"]
    module = instantiate(
        config["module"],
        net=net,
        optimizer=instantiate(optim["optimizer"], _partial_=True),
        schedule=instantiate(optim["schedule"], start=0.5),
        steps_per_epoch=2,
    )
    fit, seen = _fitted(tmp_path, module, data=Text(train=8))
    assert len(seen.losses) == 2
    assert config["selection"]["monitor"] in fit.callback_metrics
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())
