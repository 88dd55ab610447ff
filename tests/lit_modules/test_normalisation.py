"""Restricted normalisation of whole nets: outputs on the samples stay, weights tighten, and it happens when it is said to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from datamodules.min_max_plus import FunctionData
from lit_modules import normalisation
from lit_modules.min_max_plus import MinMaxPlus
from lit_modules.nets.layers import MaxPlusLinear, MinPlusLinear, TropicalLinear
from lit_modules.nets.mmp import TYPES, ConvMMPNet, MMPNet, type_spec
from lit_modules.normalisation import (
    DeadWeights,
    Normalisation,
    normalise_,
    normalised_weights,
    tropical_layers,
    winning_shares,
)
from lit_modules.ops.restricted import restricted_weight

SIGN = {"min": 1, "max": -1}  # sign * W' <= sign * W


def _samples(count: int = 200, inputs: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))


def _net(spec: str, inputs: int = 8, seed: int = 0, whole: bool = False) -> MMPNet:
    torch.manual_seed(seed)
    net = MMPNet(spec, inputs)
    if whole:  # whole numbers: float32 is exact, whatever the order of a sum
        for parameter in net.parameters():
            parameter.data = (3 * torch.randn_like(parameter)).round()
    return net


def _heard(net: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Each tropical layer's own inputs and outputs."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, f, g, name=name: heard.update({name: (f[0].detach(), g.detach())}))
        for name, layer in tropical_layers(net).items()
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return heard


def _relative_change(before: Tensor, after: Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("pairs", [1, 2, 4])
@torch.no_grad()
def test_outputs_stay_weights_tighten_and_twice_is_once(name: str, pairs: int) -> None:
    net, x = _net(type_spec(name, 5, 16, pairs)), _samples()
    before, old = net(x), {key: layer.weight.clone() for key, layer in tropical_layers(net).items()}
    change = normalise_(net, [x])
    assert _relative_change(before, net(x)) <= 1e-5
    moved = [(layer.weight - old[key]).abs() for key, layer in tropical_layers(net).items()]
    assert change == pytest.approx(torch.cat([m.flatten() for m in moved]).mean().item(), rel=1e-5)
    assert change > 0.1
    for key, layer in tropical_layers(net).items():
        assert (SIGN[layer.kind] * layer.weight <= SIGN[layer.kind] * old[key]).all()  # exactly, rounding or not
        f_NK, g_NM = _heard(net, x)[key]
        slack_NMK = SIGN[layer.kind] * (layer.weight + f_NK[:, None] - g_NM[:, :, None])
        assert slack_NMK.amin(0).abs().max() <= 1e-5 * f_NK.abs().max().clamp(min=1)
    assert normalise_(net, [x]) <= 1e-6
    assert _relative_change(before, net(x)) <= 1e-5


@torch.no_grad()
def test_in_whole_numbers_nothing_is_approximate() -> None:
    net, x = _net("L9 m7 M6 L5 m4 M3", whole=True), (2 * _samples()).round()
    before = net(x)
    assert normalise_(net, [x]) > 0
    once = copy.deepcopy(net.state_dict())
    assert torch.equal(net(x), before)
    assert normalise_(net, [x]) == 0
    assert all(torch.equal(a, b) for a, b in zip(once.values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_several_batches_give_exactly_what_one_gives(name: str) -> None:
    net, x = _net(type_spec(name, 5, 9, 2), whole=True), (2 * _samples()).round()
    one = normalised_weights(net, [x])
    for sizes in ([1, 50, 0, 149], [100, 100], [1] * 200):
        many = normalised_weights(net, iter(x.split(sizes)))
        assert one.keys() == many.keys() == tropical_layers(net).keys()
        assert all(torch.equal(one[key], many[key]) for key in one)
    assert all(torch.equal(one[key], w) for key, w in normalised_weights(net, x).items())  # one batch needs no list


@torch.no_grad()
def test_forgetting_earlier_batches_would_show() -> None:
    """Negative control: the normal form of the last batch alone changes the outputs on the others."""
    net, x = _net("L16 m16 M5"), _samples()
    before = net(x)
    normalise_(net, [x[-20:]])
    assert _relative_change(before[-20:], net(x)[-20:]) <= 1e-5
    assert _relative_change(before, net(x)) > 0.01


@torch.no_grad()
def test_another_layers_input_would_show() -> None:
    """Negative control: L M m L with the linear output, not the max layer's, as the min layer's input is another function."""
    net, x = _net(type_spec("type5", 3, 16)), _samples()
    right = copy.deepcopy(net)
    before, heard = net(x), _heard(net, x)
    upper, lower = tropical_layers(net)
    wrong_f = net[1](x)
    assert not torch.equal(wrong_f, heard[lower][0])
    assert torch.equal(wrong_f, heard[upper][0])
    tropical_layers(net)[lower].weight.copy_(restricted_weight(wrong_f, heard[lower][1], "min"))
    assert _relative_change(before, net(x)) > 0.1
    tropical_layers(right)[lower].weight.copy_(restricted_weight(heard[upper][1], heard[lower][1], "min"))
    assert _relative_change(before, right(x)) <= 1e-5
    torch.testing.assert_close(tropical_layers(right)[lower].weight, normalised_weights(right, [x])[lower])


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@torch.no_grad()
def test_part_of_the_way_keeps_the_outputs_too(share: float) -> None:
    net, x = _net(type_spec("type3", 5, 16, 3)), _samples()
    before, old, goal = net(x), copy.deepcopy(net), normalised_weights(net, [x])
    change = normalise_(net, [x], share=share)
    assert _relative_change(before, net(x)) <= 1e-5
    for key, layer in tropical_layers(net).items():
        mixed = (1 - share) * tropical_layers(old)[key].weight + share * goal[key]
        torch.testing.assert_close(layer.weight, mixed, atol=1e-6, rtol=1e-6)
    assert change == pytest.approx(share * normalise_(old, [x]), rel=1e-4)


@pytest.mark.parametrize("which", ["min", "max", "both"])
@torch.no_grad()
def test_only_the_chosen_layers_move(which: str) -> None:
    net, x = _net(type_spec("type3", 5, 16, 2)), _samples()
    before, old = net(x), copy.deepcopy(net)
    normalise_(net, [x], which)
    for (name, module), other in zip(net.named_modules(), old.modules(), strict=True):
        if isinstance(module, nn.Linear | TropicalLinear):
            chosen = isinstance(module, TropicalLinear) and which in ("both", module.kind)
            assert torch.equal(module.weight, other.weight) != chosen, name
    assert _relative_change(before, net(x)) <= 1e-5


@torch.no_grad()
def test_more_weights_win_afterwards() -> None:
    net, x = _net(type_spec("type3", 5, 16, 2)), _samples(400)
    before = winning_shares(net, [x])
    normalise_(net, [x])
    after = winning_shares(net, [x])
    assert all(after[key] > before[key] for key in before)


def test_the_winners_share_is_a_count() -> None:
    """Against winners marked one by one, over batches; a weight that wins in one batch only counts once."""
    net, x = _net("L6 m5 M4"), _samples(12)
    with torch.no_grad():
        heard = _heard(net, x)
    for key, share in winning_shares(net, x.split([5, 7])).items():
        layer, won = tropical_layers(net)[key], set()
        for f in heard[key][0]:
            for i, w in enumerate(layer.weight):
                sums = (f + w).tolist()
                won.add((i, sums.index(min(sums) if layer.kind == "min" else max(sums))))
        assert share == pytest.approx(len(won) / layer.weight.numel())
    assert all(p.grad is None for p in net.parameters())
    assert winning_shares(_net("L6 R L4"), [x]) == {}


def test_at_ties_the_first_is_the_winner() -> None:
    layer = MinPlusLinear(4, 3, init="zeros")
    assert winning_shares(nn.Sequential(layer), [torch.zeros(2, 4)]) == {"0": 0.25}


@torch.no_grad()
def test_a_convolutional_stack_keeps_its_outputs_and_its_windows() -> None:
    torch.manual_seed(0)
    net = ConvMMPNet(["MinP-Min", "MaxP-Max"], "m6 M4", 1, 8, width=3)
    x = torch.randn(60, 1, 8, 8)
    before, old = net(x), copy.deepcopy(net.body.state_dict())
    assert normalise_(net, x.split(25)) > 0.01
    assert _relative_change(before, net(x)) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(old.values(), net.body.state_dict().values(), strict=True))


class _Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MinPlusLinear(5, 5, init="normal:1.0")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(-2 * self.layer(x))


@torch.no_grad()
def test_a_layer_that_runs_twice_keeps_its_outputs_at_both_places() -> None:
    torch.manual_seed(0)
    net, x = _Twice(), _samples(30, 5)
    before = net(x)
    assert normalise_(net, [x]) > 0.01
    assert _relative_change(before, net(x)) <= 1e-5


@torch.no_grad()
def test_a_bias_is_no_part_of_the_product() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(MaxPlusLinear(8, 6, bias=True, init="normal:1.0"))
    net[0].bias.fill_(1e4)
    x = _samples()
    plain = nn.Sequential(MaxPlusLinear(8, 6))
    plain[0].weight.copy_(net[0].weight)
    assert torch.equal(normalised_weights(net, [x])["0"], normalised_weights(plain, [x])["0"])


def test_the_nets_state_and_modes_are_left_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), MinPlusLinear(6, 4))
    net.train()
    net[2].eval()
    state = copy.deepcopy(net.state_dict())
    normalised_weights(net, _samples().split(50))
    winning_shares(net, [_samples()])
    assert [module.training for module in net.modules()] == [True, True, True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    assert not net[3]._forward_hooks
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def _spoil(place: tuple[int, ...], value: float, layer: int = 2) -> Callable[[MMPNet], None]:
    def spoil(net: MMPNet) -> None:
        net[layer].weight.data[place] = value

    return spoil


def _empty(net: MMPNet) -> None:
    net[2].weight = nn.Parameter(torch.zeros(5, 0))


def _share(net: MMPNet) -> None:
    net[3].weight = net[2].weight


def _nothing(net: MMPNet) -> None:
    pass


X = _samples(10)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("spoil", "samples", "options", "error", "words"),
    [
        (_spoil((0, 1), NAN), [X], {}, ValueError, r"layer '2_min_plus' weight \[0, 1\] is nan"),
        (_spoil((3, 0), INF), [X], {}, ValueError, r"layer '2_min_plus' weight \[3, 0\] is inf"),
        (_spoil((2, 4), -INF, 3), [X], {}, ValueError, r"layer '3_max_plus' weight \[2, 4\] is -inf"),
        (_spoil((1, 0), NAN, 1), [X], {}, ValueError, r"layer '2_min_plus': input \[0, 1\] is nan"),
        (_spoil((2, 4), INF, 3), [X], {"which": "min"}, ValueError, None),  # a layer that stays may be what it likes
        (_nothing, [X, X.index_fill(1, torch.tensor([0]), NAN)], {}, ValueError, r"input \[0, 0\] is nan"),
        (_nothing, [], {}, ValueError, "at least one sample is needed, got 0"),
        (_nothing, [X[:0], X[:0]], {}, ValueError, "at least one sample is needed, got 0"),
        (_nothing, [X, X[:, :5]], {}, ValueError, r"8 values per sample, got \(10, 5\)"),
        (_nothing, [(X, X)], {}, TypeError, r"tensors \(B, ...\); got \(tensor"),
        (_nothing, [torch.tensor(1.0)], {}, TypeError, r"got tensor\(1"),
        (_empty, [X], {}, ValueError, r"'2_min_plus' has a weight of shape \(5, 0\)"),
        (_share, [X], {}, ValueError, "'2_min_plus' and '3_max_plus' share one weight"),
        (_nothing, [X], {"share": 0.0}, ValueError, r"share must lie in \(0, 1\], got 0.0"),
        (_nothing, [X], {"share": 1.5}, ValueError, "got 1.5"),
        (_nothing, [X], {"share": NAN}, ValueError, "got nan"),
        (_nothing, [X], {"which": "all"}, ValueError, "which must be min, max or both, got 'all'"),
    ],
)
def test_an_error_names_the_value_and_leaves_the_net_as_it_was(spoil, samples, options, error, words) -> None:
    net = _net("L5 m5 M5 L3")
    spoil(net)
    net.train()
    state = copy.deepcopy(net.state_dict())
    if words is None:
        assert normalise_(net, samples, **options) > 0
        return
    with pytest.raises(error, match=words):
        normalise_(net, samples, **options)
    for (name, a), b in zip(state.items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)
    assert all(module.training and not module._forward_hooks for module in net.modules())


def test_nets_that_cannot_be_normalised_or_fed_are_named() -> None:
    with pytest.raises(ValueError, match="no tropical linear layer to normalise"):
        normalise_(_net("L5 R L3"), [X])
    with pytest.raises(ValueError, match=r"which='max'"):
        normalise_(_net("L5 m3"), [X], "max")
    with pytest.raises(ValueError, match=r"does not take samples of shape \(10, 8\)"):
        normalise_(nn.Sequential(nn.Linear(7, 3), MinPlusLinear(3, 2)), [X])
    with pytest.raises(ValueError, match="at least one sample is needed, got 0"):
        winning_shares(_net("L5 m3"), [])
    with pytest.raises(ValueError, match="in_features must be an int of at least 1, got 0"):
        MinPlusLinear(0, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "always"}, "off, init, steps or epoch, got 'always'"),
        ({"which": "all"}, "min, max or both, got 'all'"),
        ({"every": 0}, "every must be an int of at least 1, got 0"),
        ({"every": 2.5}, "every must be an int of at least 1, got 2.5"),
        ({"samples": 0}, "samples must be an int of at least 1, got 0"),
        ({"share": 0}, r"share must lie in \(0, 1\], got 0"),
        ({"share": 1.1}, "got 1.1"),
    ],
)
def test_an_impossible_schedule_is_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Normalisation(**options)
    assert Normalisation(samples=None).samples is None


class _Spy(MinMaxPlus):
    """Notes, after each step and its normalisation, how many steps each weight's Adam moments have seen."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.ages: list[dict[str, int]] = []

    def on_train_batch_end(self, *_) -> None:
        state = self.trainer.optimizers[0].state
        self.ages.append({n: int(state[p]["step"]) if p in state else 0 for n, p in self.net.named_parameters()})


class _Memory(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, float]] = []

    name, version = "memory", 0

    def log_hyperparams(self, *_, **__) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen += [(step, v) for k, v in metrics.items() if k == "normalisation/change"]


Run = tuple[_Spy, list[tuple[int, float]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Callable[..., Run]:
    """Train 4 batches an epoch; return the module and (step, sum of the samples) of every normalisation."""
    calls: list[tuple[int, float]] = []
    current: list[Trainer] = []

    def spy(net: nn.Module, samples, which: str, share: float) -> float:
        batches = list(samples)
        calls.append((current[0].global_step, torch.cat(batches).sum().item()))
        return normalise_(net, batches, which, share)

    monkeypatch.setattr(normalisation, "normalise_", spy)

    def train(how: dict | None, epochs: int = 3, checkpoint=None, logger=False, **options) -> Run:
        torch.manual_seed(0)
        module = _Spy(
            MMPNet("L6 m5 M4 L1", 2), partial(torch.optim.Adam, lr=0.01), steps_per_epoch=4, task="regression",
            normalisation=None if how is None else Normalisation(**{"samples": 10, **how}),
        )  # fmt: skip
        calls.clear()
        keep = {"dirpath": tmp_path, "save_top_k": -1, "enable_version_counter": False}
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, default_root_dir=tmp_path, limit_val_batches=0, callbacks=[
                ModelCheckpoint(filename="epoch{epoch}", auto_insert_metric_name=False, save_on_train_epoch_end=True, **keep),
                ModelCheckpoint(filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=1, **keep),
            ], **options,
        )  # fmt: skip
        current[:] = [trainer]
        data = FunctionData("waves_2d", 8, 0, train_samples=32, val_samples=1, test_samples=1)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
        return module, list(calls)

    return train


SCHEDULES = {
    "off": ({"schedule": "off"}, []),
    "none": (None, []),
    "init": ({"schedule": "init"}, [0]),
    "steps": ({"schedule": "steps", "every": 5}, [0, 5, 10]),
    "all steps": ({"schedule": "steps", "every": 4}, [0, 4, 8, 12]),
    "rare steps": ({"schedule": "steps", "every": 13}, [0]),
    "epoch": ({"schedule": "epoch"}, [0, 4, 8]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_happens_when_the_schedule_says_and_never_else(name: str, run) -> None:
    how, steps = SCHEDULES[name]
    _, calls = run(how)
    assert [step for step, _ in calls] == steps
    assert len({drawn for _, drawn in calls}) == len(calls)  # other samples each time


def test_layers_and_share_are_those_asked_for(run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watch(net: nn.Module, samples, which: str, share: float) -> float:
        asked.append((len(torch.cat(list(samples))), which, share))
        return 0.0

    monkeypatch.setattr(normalisation, "normalise_", watch)
    run({"schedule": "epoch", "which": "max", "share": 0.25, "samples": 17}, epochs=2)
    assert asked == [(17, "max", 0.25)] * 2


def test_accumulated_batches_are_no_steps(run) -> None:
    _, calls = run({"schedule": "steps", "every": 2}, accumulate_grad_batches=2)
    assert [step for step, _ in calls] == [0, 2, 4, 6]


@pytest.mark.parametrize("name", ["init", "steps", "all steps", "epoch"])
@pytest.mark.parametrize("cut", ["epoch0", "epoch1"])
def test_a_run_that_is_cut_after_an_epoch_goes_on_as_if_it_were_not(name: str, cut: str, run, tmp_path) -> None:
    how, _ = SCHEDULES[name]
    how = {**how, "reset_moments": True, "share": 0.5}
    whole, all_calls = run(how)
    first = 4 * (int(cut[-1]) + 1)
    rest, later = run(how, checkpoint=tmp_path / f"{cut}.ckpt")
    done_by_then = [c for c in all_calls if c[0] < first or (c[0] == first and name != "epoch")]
    assert done_by_then + later == all_calls
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


@pytest.mark.parametrize(("name", "later"), [("init", []), ("steps", [10]), ("epoch", [8])])
def test_going_on_in_the_middle_of_an_epoch_does_not_fire_twice(name: str, later: list[int], run, tmp_path) -> None:
    how, _ = SCHEDULES[name]
    run(how)
    _, calls = run(how, checkpoint=tmp_path / "step5.ckpt")  # saved right after step 5's own normalisation
    assert [step for step, _ in calls] == later


@pytest.mark.parametrize("which", ["min", "both"])
def test_moments_are_kept_or_forgotten_as_asked(which: str, run) -> None:
    how = {"schedule": "steps", "every": 3, "which": which}
    kept, _ = run(how, epochs=2)
    reset, _ = run({**how, "reset_moments": True}, epochs=2)
    moved = {f"{name}.weight" for name in tropical_layers(reset.net, which)}
    for module, forgetful in ((kept, set()), (reset, moved)):
        for name, _ in module.net.named_parameters():
            ages = [age[name] for age in module.ages]
            assert ages == ([1, 2, 0, 1, 2, 0, 1, 2] if name in forgetful else [1, 2, 3, 4, 5, 6, 7, 8]), name
    assert len(moved) == (1 if which == "min" else 2)


def test_the_change_is_logged_at_its_step(run) -> None:
    memory = _Memory()
    run({"schedule": "steps", "every": 5}, logger=memory)
    assert [step for step, _ in memory.seen] == [0, 5, 10]
    fresh = run({"schedule": "off"}, epochs=1)[0]
    torch.manual_seed(0)
    net, data = MMPNet("L6 m5 M4 L1", 2), fresh.trainer.datamodule
    assert memory.seen[0][1] == normalise_(net, data.sample_inputs(10, key=0))


def test_outputs_do_not_move_when_it_fires(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the samples drawn, in a net that is being trained, share and all."""
    changes = []
    spied = normalisation.normalise_

    def watch(net: nn.Module, samples, which: str, share: float) -> float:
        x = torch.cat(list(samples))
        with torch.no_grad():
            before = net(x)
            moved = spied(net, [x], which, share)
            changes.append((_relative_change(before, net(x)), moved))
        return moved

    monkeypatch.setattr(normalisation, "normalise_", watch)
    run({"schedule": "steps", "every": 2, "samples": None})
    assert len(changes) == 7
    assert all(relative <= 1e-5 for relative, _ in changes)
    assert changes[0][1] > 0.1


def test_without_a_source_of_samples_it_says_so(tmp_path) -> None:
    module = MinMaxPlus(
        MMPNet("L3 m1", 2), partial(torch.optim.SGD, lr=0.1), steps_per_epoch=1, task="regression",
        normalisation=Normalisation("init"),
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = FunctionData("waves_2d", 8, 0, train_samples=8, val_samples=1, test_samples=1)
    data.setup()
    with pytest.raises(TypeError, match=r"datamodule's sample_inputs\(n, key\); got None"):
        trainer.fit(module, data.train_dataloader())


def test_the_monitor_refuses_no_samples() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        DeadWeights(0)
