"""Critics: sizes, what a score sees, and who may be penalised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_modules.nets.counting import count_params
from lit_modules.nets.critic import DoubleScaleCritic, PatchCritic, ScorePool, check_penalty
from lit_modules.ops.adversarial import Baseline, critic_loss, generator_loss, gradient_penalty


@pytest.mark.parametrize(("layers", "params"), [(3, 2_764_737), (5, 11_154_369)])
def test_the_published_sizes(layers: int, params: int) -> None:
    widths = [64 * min(2**i, 8) for i in range(layers + 1)]
    by_hand = sum(16 * a * b + b for a, b in zip([3, *widths], [*widths, 1], strict=True))
    with torch.device("meta"):
        assert count_params(PatchCritic(layers=layers)) == by_hand == params


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_score_sees_its_receptive_field(layers: int) -> None:
    torch.manual_seed(0)
    critic = PatchCritic(width=2, layers=layers, norm="none").double()
    x = torch.rand(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    (scores,) = critic(x)
    middle = scores.shape[-1] // 2
    (grad,) = torch.autograd.grad(scores[0, 0, middle, middle], x)
    for seen in (grad.abs().sum((0, 1, 2)) > 0, grad.abs().sum((0, 1, 3)) > 0):
        assert seen.sum() == critic.receptive_field
        first = seen.nonzero()[0].item()
        assert seen[first : first + critic.receptive_field].all()


def test_the_published_receptive_fields() -> None:
    assert [PatchCritic(2, layers).receptive_field for layers in (2, 3, 5)] == [34, 70, 286]


@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
def test_the_score_of_an_image_depends_on_no_other(norm: str) -> None:
    torch.manual_seed(0)
    critic = PatchCritic(width=4, layers=2, norm=norm)
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(critic(x)[0], critic.eval()(x)[0])
    torch.testing.assert_close(critic(x)[0][:1], critic(x[:1])[0])
    check_penalty(critic)


def test_batch_norm_makes_it_depend_and_is_refused_under_a_penalty() -> None:
    torch.manual_seed(0)
    critic = DoubleScaleCritic(4, 1, 2, norm="batch")
    x = torch.rand(3, 3, 32, 32)
    assert not torch.allclose(critic(x)[0][:1], critic(torch.cat([x[:1], 1 - x[1:]]))[0][:1], atol=1e-4)
    with pytest.raises(ValueError, match=r"must not have batch norm, but critics\.0\.net\.3 is BatchNorm2d: use norm"):
        check_penalty(critic)


@pytest.mark.parametrize("norm", ["instance", "layer", "none", "batch"])
def test_norms_stand_between_the_first_layer_and_the_scores(norm: str) -> None:
    critic = PatchCritic(width=4, layers=3, norm=norm)
    kinds = [type(m).__name__ for m in critic.net]
    name = {"instance": ["InstanceNorm2d"], "layer": ["GroupNorm"], "batch": ["BatchNorm2d"], "none": ["Identity"]}[
        norm
    ]
    block = ["Conv2d", *name, "LeakyReLU"]
    assert kinds == ["Conv2d", "LeakyReLU", *block, *block, *block, "Conv2d"]
    weights = torch.cat([m.weight.flatten() for m in critic.net if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_conditional_critic_needs_the_blurred_image_and_another_ignores_it() -> None:
    torch.manual_seed(0)
    x, blurred = torch.rand(2, 2, 3, 24, 24)
    plain, conditional = PatchCritic(4, 2), PatchCritic(4, 2, conditional=True)
    assert torch.equal(plain(x, blurred)[0], plain(x)[0])
    assert count_params(conditional) == count_params(plain) + 16 * 3 * 4
    assert not torch.allclose(conditional(x, blurred)[0], conditional(x, blurred.flip(0))[0])
    with pytest.raises(ValueError, match=r"needs the blurred images too: critic\(images, blurred\)"):
        conditional(x)


def test_two_scales_are_two_critics() -> None:
    torch.manual_seed(0)
    critic = DoubleScaleCritic(width=4, patch_layers=2, image_layers=3)
    x = torch.rand(2, 3, 64, 64)
    patch, image = critic(x)
    assert torch.equal(patch, critic.critics[0](x)[0])
    assert torch.equal(image, critic.critics[1](x)[0])
    assert patch.shape[2] > image.shape[2]
    assert count_params(critic) == count_params(PatchCritic(4, 2)) + count_params(PatchCritic(4, 3))


@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
def test_the_penalty_of_a_critic_trains_all_that_moves_its_gradient(norm: str) -> None:
    torch.manual_seed(0)
    critic = DoubleScaleCritic(4, 1, 2, norm=norm).double()
    real, fake = torch.rand(2, 2, 3, 24, 24, dtype=torch.float64)
    penalty = gradient_penalty(critic, real, fake, torch.Generator().manual_seed(0))
    penalty.backward()
    for name, parameter in critic.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    # and it is the derivative: along the gradient, a small step lowers the penalty by its length times the gradient's
    pairs = [(p, p.grad) for p in critic.parameters() if p.grad is not None]
    slope = torch.cat([grad.flatten() for _, grad in pairs]).norm()
    with torch.no_grad():
        for p, grad in pairs:
            p.sub_(1e-6 * grad / slope)
    lower = gradient_penalty(critic, real, fake, torch.Generator().manual_seed(0))
    torch.testing.assert_close((penalty - lower) / 1e-6, slope, rtol=0.01, atol=0)


def test_a_pool_remembers_the_last_steps_and_survives_a_checkpoint() -> None:
    pool = ScorePool(size=3, scales=2)
    for step in range(1, 6):
        pool.push([torch.full((2, 1, 4, 4), float(step)), torch.tensor([10.0 * step])])
        last = range(max(1, step - 2), step + 1)
        expected = sum(last) / len(last)
        assert [m.item() for m in pool.mean()] == pytest.approx([expected, 10 * expected])
    resumed = ScorePool(size=3, scales=2)
    resumed.load_state_dict(pool.state_dict())
    for one in (pool, resumed):
        one.push([torch.tensor([0.5]), torch.tensor([0.5])])
    assert torch.equal(torch.stack(pool.mean()), torch.stack(resumed.mean()))
    assert not list(pool.parameters())


def test_pools_feed_a_relativistic_loss() -> None:
    torch.manual_seed(0)
    critic = DoubleScaleCritic(4, 1, 2)
    real_pool, fake_pool = ScorePool(scales=2), ScorePool(scales=2)
    real, fake = torch.rand(2, 2, 3, 32, 32)
    real_scores, fake_scores = critic(real), critic(fake.requires_grad_())
    real_pool.push(real_scores)
    fake_pool.push(fake_scores)
    baseline = Baseline(real_pool.mean(), fake_pool.mean())
    pooled = critic_loss("ralsgan", real_scores, fake_scores, baseline)
    torch.testing.assert_close(pooled, critic_loss("ralsgan", real_scores, fake_scores))  # of one step, the same means
    generator_loss("ralsgan", fake_scores, [s.detach() for s in real_scores], baseline).backward()
    assert fake.grad is not None
    assert fake.grad.abs().max() > 0


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="layers must be an int of at least 1, got 0"):
        PatchCritic(layers=0)
    with pytest.raises(ValueError, match="norm must be one of instance, layer, batch, none; got 'spectral'"):
        PatchCritic(norm="spectral")
    with pytest.raises(ValueError, match="size must be an int of at least 1, got 0"):
        ScorePool(0)
    with pytest.raises(ValueError, match="the pool is for 2 score maps, got 1"):
        ScorePool(scales=2).push([torch.zeros(1)])
    with pytest.raises(ValueError, match="the pool is empty"):
        ScorePool().mean()
    assert isinstance(PatchCritic(4, 1).net, nn.Sequential)
