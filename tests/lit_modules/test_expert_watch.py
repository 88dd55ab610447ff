"""What is said of the experts is what they do: each statistic against values worked out by hand."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import Tensor
from toy_moe import ADAMW, CONTEXT, LAYERS, STILL, Text, trainer, transformer

from lit_modules.expert_watch import STEPS, ExpertWatch, Tally
from lit_modules.moe_upcycling import MoEUpcycling
from lit_modules.nets.moe import Experts
from lit_modules.ops.routing import Routing, route

COARSE = Experts(expansion=4, granularity=1, top_k=1)
GRANULAR = Experts(expansion=2, granularity=2, top_k=2)


def _routing(experts_SK: list[list[int]], probs_SN: list[list[float]]) -> Routing:
    """A routing made by hand; logits are logarithms of the probabilities."""
    chosen, probs = torch.tensor(experts_SK), torch.tensor(probs_SN)
    return Routing(probs.gather(1, chosen), chosen, probs, probs.log())


def _statistics(*routings: Routing, granularity: int = 1) -> dict[str, float]:
    tally = Tally()
    for routing in routings:
        tally.add(routing, granularity)
    return tally.statistics()


def test_the_load_of_three_tokens_against_one() -> None:
    found = _statistics(_routing([[0], [0], [0], [1]], [[0.4, 0.3, 0.2, 0.1]] * 4))
    assert found["load_max"] == pytest.approx(3.0)  # three of four tokens, where one would be fair
    assert found["load_min"] == 0.0
    assert found["load_cv"] == pytest.approx(
        math.sqrt((2**2 + 0 + 1 + 1) / 4)
    )  # of all experts: divided by N, not N - 1
    assert found["dead"] == 50.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["effective"] == pytest.approx(100 * math.exp(entropy) / 4)
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1)))
    assert found["kept"] == pytest.approx((3 * 0.4 + 0.3) / 4)
    assert found["balance"] == pytest.approx(4 * (0.75 * 0.4 + 0.25 * 0.3))
    assert found["z"] == pytest.approx(0.0, abs=1e-9)  # logits are log-probabilities: their logsumexp is 0
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    mean = sum(logits) / 4
    assert found["logit_std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in logits) / 3), rel=1e-5)


def test_balance_is_one_and_all_experts_are_effective() -> None:
    found = _statistics(_routing([[0], [1], [2], [3]], [[0.25] * 4] * 4))
    expected = {"load_max": 1, "load_min": 1, "load_cv": 0, "dead": 0, "effective": 100, "balance": 1, "kept": 0.25}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["entropy"] == pytest.approx(math.log(4))
    one = _statistics(_routing([[2]] * 5, [[0.1, 0.1, 0.7, 0.1]] * 5))
    assert (one["load_max"], one["dead"]) == (4.0, 75.0)
    assert one["effective"] == pytest.approx(25.0)


@pytest.mark.parametrize(("third", "dead"), [(2, 50.0), (3, 25.0), (0, 50.0)])
def test_an_expert_is_dead_below_a_hundredth_of_its_fair_share(third: int, dead: float) -> None:
    """Of 1000 tokens over 4 experts the fair share is 250: two tokens are 0.008 of it, three are 0.012."""
    chosen = [[0]] * 600 + [[1]] * (400 - third) + [[2]] * third
    assert _statistics(_routing(chosen, [[0.25] * 4] * 1000))["dead"] == dead


def test_purity_wants_every_shard_equally_often_and_coverage_counts_those_there() -> None:
    """Two replicas of two shards: experts 0 and 2 hold shard 0, experts 1 and 3 shard 1."""
    flat = [[0.25] * 4] * 4
    found = _statistics(_routing([[0, 1], [0, 3], [0, 2], [1, 3]], flat), granularity=2)
    assert found["purity"] == 50.0  # the first two tokens, although the second mixes replicas
    assert found["coverage"] == pytest.approx(75.0)
    whole = _statistics(_routing([[0, 1, 2, 3]] * 2, flat[:2]), granularity=2)
    assert (whole["purity"], whole["coverage"]) == (100.0, 100.0)


def test_where_picks_cannot_hold_every_shard_equally_often_nothing_is_said_of_it(tmp_path: Path) -> None:
    """Half of the picks are a shared expert's: topK 1 of granularity 2."""
    halved = Experts(expansion=2, granularity=2, top_k=1, shared=1)
    module, data = _module(halved), Text()
    fit = trainer(tmp_path)
    fit.fit(module, datamodule=data)
    assert module.watch is not None
    assert module.watch.groups
    assert not [name for name in module.watch.groups if not name.startswith("coverage/")]
    (tested,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert "moe/coverage" in tested
    assert not [name for name in tested if "purity" in name]


def test_batches_count_by_their_tokens() -> None:
    small, large = _routing([[0]], [[0.7, 0.3]]), _routing([[1]] * 3, [[0.1, 0.9]] * 3)
    apart, together = (
        _statistics(small, large),
        _statistics(_routing([[0]] + [[1]] * 3, [[0.7, 0.3]] + [[0.1, 0.9]] * 3)),
    )
    assert apart["kept"] == pytest.approx((0.7 + 3 * 0.9) / 4)
    for name in ("kept", "entropy", "load_max", "load_cv", "effective", "purity", "logit_std", "z"):
        assert apart[name] == pytest.approx(together[name]), name


def _module(experts: Experts, optimizer=STILL, epochs: int = 1, **options) -> MoEUpcycling:
    return MoEUpcycling(transformer(experts, **options), optimizer, steps_per_epoch=8, epochs=epochs)


def _tie(module: MoEUpcycling) -> None:
    """Virtual groups: each row of a router G times in a row."""
    for layer in module.net.moe_layers().values():
        rows = layer.router.weight.data[:: layer.experts.granularity]
        layer.router.weight.data.copy_(rows.repeat_interleave(layer.experts.granularity, 0))


def test_virtual_groups_are_watched_after_so_many_updates(tmp_path: Path) -> None:
    module = _module(GRANULAR, partial(torch.optim.SGD, lr=0.5), epochs=2)
    _tie(module)
    fit = trainer(tmp_path, epochs=2)
    fit.fit(module, datamodule=Text())
    logged = {name: value for name, value in fit.callback_metrics.items() if name.startswith(("purity/", "coverage/"))}
    updates = [step for step in STEPS if step < 16]  # 2 epochs of 8 batches
    assert set(logged) == {f"{name}/{step:05d}" for name in ("purity", "coverage") for step in updates}
    assert logged["purity/00000"] == logged["coverage/00000"] == 100.0  # tied rows, before the first update
    assert min(float(logged[f"purity/{step:05d}"]) for step in updates) < 100  # and no longer


def test_the_groups_after_an_update_are_those_of_the_next_batch(tmp_path: Path) -> None:
    """Nothing is learnt, so the value after s updates is that of the net on the batch that comes s-th."""
    module, data = _module(GRANULAR), Text()
    trainer(tmp_path).fit(module, datamodule=data)
    for step in (0, 1, 2, 5):
        x = data.whole("train")[0][4 * step : 4 * step + 4]
        module.net(x)
        pure = []
        for layer in module.net.moe_layers().values():
            shards = layer.routed.experts_SK % 2  # type: ignore[union-attr]
            pure.append((shards.sort(1).values == torch.tensor([0, 1])).all(1).double().mean().item())
        assert module.watch is not None
        assert module.watch.groups[f"purity/{step:05d}"] == pytest.approx(100 * sum(pure) / LAYERS, rel=1e-6)
    assert len({module.watch.groups[f"purity/{step:05d}"] for step in (0, 1, 2, 5)}) > 1


def test_dropped_choices_are_percent_of_all_and_only_where_there_is_a_capacity(tmp_path: Path) -> None:
    """A router of zeros sends every token to the first of four experts, which may take half a fair share more."""
    module = _module(Experts(expansion=4, top_k=1, capacity_factor=1.5))
    for layer in module.net.moe_layers().values():
        layer.router.weight.data.zero_()
    fit = trainer(tmp_path)
    fit.fit(module, datamodule=Text(batch_size=4))
    capacity = 1.5 * 4 * CONTEXT / 4  # of the 32 choices in a batch
    assert fit.callback_metrics["train/dropped"].item() == pytest.approx(100 * (1 - capacity / 32))
    free = trainer(tmp_path)
    free.fit(_module(COARSE), datamodule=Text())
    assert "train/dropped" not in free.callback_metrics


def _loads(module: MoEUpcycling, x: Tensor) -> list[list[float]]:
    """Every layer's load on a batch, in fair shares, from the logits alone."""
    module.net.eval()(x)
    found = []
    for layer in module.net.moe_layers().values():
        chosen = layer.routed.logits_SN.topk(layer.experts.top_k).indices.flatten().tolist()  # type: ignore[union-attr]
        found.append([chosen.count(n) * layer.experts.count / len(chosen) for n in range(layer.experts.count)])
    return found


def test_the_load_of_every_expert_after_every_epoch_is_kept_in_a_file(tmp_path: Path) -> None:
    module, data = _module(COARSE, moe_layers=[1]), Text()
    test = trainer(tmp_path, epochs=3, num_sanity_val_steps=1)  # a trial validation is no epoch
    test.fit(module, datamodule=data)
    test.test(module, datamodule=data, verbose=False)
    kept = json.loads((tmp_path / "expert_load.json").read_text())
    assert kept["layers"] == [1]
    expected = _loads(module, data.whole("val")[0])
    assert len(kept["epochs"]) == 3
    for epoch in kept["epochs"]:
        assert epoch == [pytest.approx(layer, abs=1e-4) for layer in expected]
        assert sum(epoch[0]) == pytest.approx(4, abs=1e-3)


def test_what_is_logged_at_test_is_of_the_test_text_by_layer_and_on_average(tmp_path: Path) -> None:
    module, data = _module(COARSE), Text(eval_batch=16)  # large enough for a cloze test, which routes other text
    (tested,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert "test/cloze" in tested
    loads = _loads(module, data.whole("test")[0])
    for at in range(LAYERS):
        assert tested[f"moe/layer{at}/load_max"] == pytest.approx(max(loads[at]))
        assert tested[f"moe/layer{at}/load_min"] == pytest.approx(min(loads[at]))
        layer = module.net.moe_layers()[at]
        probs = route(layer.routed.logits_SN, 1, "softmax_topk").probs_SN  # type: ignore[union-attr]
        assert tested[f"moe/layer{at}/kept"] == pytest.approx(probs.max(1).values.mean().item(), rel=1e-5)
    names = [name.removeprefix("moe/layer0/") for name in tested if name.startswith("moe/layer0/")]
    assert {"load_max", "dead", "purity", "cosine", "z", "balance", "entropy"} <= set(names)
    for name in names:
        both = [tested[f"moe/layer{at}/{name}"] for at in range(LAYERS)]
        assert tested[f"moe/{name}"] == pytest.approx(sum(both) / LAYERS), name
    assert module.watch is not None
    assert {tally.tokens for tally in module.watch.tallies.values()} == {16 * CONTEXT}  # the text, not the cloze test


def test_the_cosine_is_to_the_weights_at_the_start(tmp_path: Path) -> None:
    module, data = _module(COARSE, ADAMW, epochs=2), Text()
    start = {at: layer.up.detach().double().clone() for at, layer in module.net.moe_layers().items()}
    (before,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert before["moe/cosine"] == pytest.approx(1.0, abs=1e-6)
    fit = trainer(tmp_path, epochs=2)
    fit.fit(module, datamodule=data)
    (after,) = fit.test(module, datamodule=data, verbose=False)
    expected = []
    for at, layer in module.net.moe_layers().items():
        pairs = zip(layer.up.detach().double().flatten(1), start[at].flatten(1), strict=True)
        expected.append(sum((a @ b / a.norm() / b.norm()).item() for a, b in pairs) / 4)
        assert after[f"moe/layer{at}/cosine"] == pytest.approx(expected[-1], abs=1e-6)
    assert after["moe/cosine"] == pytest.approx(sum(expected) / LAYERS, abs=1e-6)
    assert after["moe/cosine"] < 0.99


class _StateAfterFirstEpoch(Callback):
    def __init__(self, watch: ExpertWatch) -> None:
        self.watch, self.kept = watch, {}

    def on_train_epoch_start(self, fit, *_) -> None:
        if fit.current_epoch == 1:
            self.kept = self.watch.state_dict()


def test_a_state_is_a_copy_that_a_later_run_takes_up(tmp_path: Path) -> None:
    module = _module(COARSE, ADAMW, epochs=2)
    assert module.watch is not None
    early = _StateAfterFirstEpoch(module.watch)
    trainer(tmp_path, epochs=2, callbacks=[early]).fit(module, datamodule=Text())
    assert len(early.kept["loads"]) == 1
    assert len(module.watch.loads) == 2
    assert set(early.kept["groups"]) < set(module.watch.groups)
    other = ExpertWatch(module.net)
    other.load_state_dict(early.kept)
    assert other.state_dict() == early.kept
    assert other.loads == module.watch.loads[:1]


def test_what_has_not_been_routed_cannot_be_watched(tmp_path: Path) -> None:
    module = _module(COARSE)
    assert module.watch is not None
    with pytest.raises(RuntimeError, match="not routed anything"):
        module.watch.on_validation_batch_end(trainer(tmp_path), module)
