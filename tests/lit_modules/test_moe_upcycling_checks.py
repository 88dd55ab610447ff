"""Paper 1's checks before any update: right where the MoE is its parent, and by how much it is off where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_moe import HIDDEN, LAYERS, STILL, WIDTH, Text, trainer, transformer

from lit_modules.moe_upcycling_checks import StepZero
from lit_modules.nets.moe import Experts
from lit_modules.nets.transformer import Transformer
from lit_modules.nets.upcycled import Copy, Upcycle

EXACT = Experts(expansion=2, granularity=2, top_k=2, order="topk_softmax")
FREE = Experts(expansion=2, granularity=2, top_k=2, router_std=0.02)


def _parent() -> Transformer:
    return transformer(seed=7)


def _checked(net: Transformer, parent: Transformer, folder: Path, data: Text | None = None) -> dict[str, float]:
    module = StepZero(net, STILL, steps_per_epoch=1)
    module.on_inherit(parent.state_dict())
    (found,) = trainer(folder).test(module, datamodule=data or Text(), verbose=False)
    return dict(found)


def _upcycled(experts: Experts, parent: Transformer, **recipe) -> Transformer:
    net = transformer(experts)
    Upcycle(**recipe)(net, parent.state_dict(), torch.Generator().manual_seed(3))
    return net


def test_an_exact_upcycling_is_its_parent(tmp_path: Path) -> None:
    parent = _parent()
    found = _checked(_upcycled(EXACT, parent), parent, tmp_path)
    assert found["check/relative_error"] < 1e-5
    assert abs(found["check/loss_gap"]) < 1e-5
    assert found["check/params_gap"] == 0


def test_a_copy_has_no_error_at_all(tmp_path: Path) -> None:
    parent, net = _parent(), transformer()
    Copy()(net, parent.state_dict(), torch.Generator())
    found = _checked(net, parent, tmp_path)
    assert [found[f"check/{name}"] for name in ("relative_error", "loss_gap", "params_gap")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("recipe", [{"scale": "none"}, {"init": "random_router"}])
def test_what_is_not_the_parent_is_off_by_so_much(recipe: dict, tmp_path: Path) -> None:
    """The largest of the batches' errors, and the mean over all tokens of the losses' difference, in float64."""
    parent, data = _parent(), Text(test=20, eval_batch=8)  # batches of 8, 8 and 4
    net = _upcycled(FREE, parent, **recipe)
    found = _checked(net, parent, tmp_path, data)
    x, y = data.whole("test")
    ours, dense = net(x).double(), parent(x).double()
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours.split(8), dense.split(8), strict=True)]
    assert max(errors) > 1.01 * sum(errors) / 3
    assert found["check/relative_error"] == pytest.approx(max(errors), rel=1e-4)
    assert max(errors) > 0.05
    losses = [-z.log_softmax(-1).gather(-1, y[..., None]).mean().item() for z in (ours, dense)]
    assert found["check/loss_gap"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert abs(found["check/loss_gap"]) > 1e-3
    assert found["test/loss"] == pytest.approx(losses[0], rel=1e-5)  # that of the MoE, not of its parent


def test_another_parent_is_not_ones_own(tmp_path: Path) -> None:
    parent = _parent()
    found = _checked(_upcycled(EXACT, parent), transformer(seed=8), tmp_path)
    assert found["check/relative_error"] > 0.5


@pytest.mark.parametrize(
    ("experts", "gap"),
    [
        (FREE, 0),
        (Experts(expansion=8, granularity=1, top_k=1), 0),
        (Experts(expansion=2, granularity=4, top_k=4, shared=4), LAYERS * 2 * WIDTH * HIDDEN),  # one more MLP a layer
        (Experts(expansion=2, granularity=2, top_k=2, output="learnable"), LAYERS),
        (Experts(expansion=2, granularity=2, top_k=2, output="layernorm"), LAYERS * WIDTH),
    ],
)
def test_parameters_beyond_the_formula_are_counted(experts: Experts, gap: int, tmp_path: Path) -> None:
    found = _checked(transformer(experts), _parent(), tmp_path)
    assert found["check/params_gap"] == gap


def test_the_formula_is_of_the_layers_that_are_mixtures_and_of_gated_mlps_too(tmp_path: Path) -> None:
    options = {"activation": "swiglu", "moe_layers": [1], "tied": True}
    dense = {name: value for name, value in options.items() if name != "moe_layers"}
    found = _checked(transformer(FREE, **options), transformer(**dense), tmp_path)
    assert found["check/params_gap"] == 0


def test_nothing_is_trained() -> None:
    module = StepZero(transformer(FREE), STILL, steps_per_epoch=1)
    assert not any(p.requires_grad for p in module.dense.parameters())
    with pytest.raises(RuntimeError, match="nothing is trained"):
        module.configure_optimizers()
