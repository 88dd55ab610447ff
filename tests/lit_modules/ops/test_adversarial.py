"""Adversarial losses are their formulas; the gradient penalty is known where the critic's gradient is."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_modules.ops.adversarial import Baseline, Kind, critic_loss, generator_loss, gradient_penalty

KINDS = get_args(Kind)


def _scores(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real, fake = 2 * torch.randn(2, 4, 1, 5, 6, generator=generator)
    return real + 0.5, fake


def _images(B: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.rand(2, B, 3, 8, 6, generator=generator, dtype=torch.float64)
    return real, fake


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_their_formulas(kind: str) -> None:
    real, fake = (x.double().numpy() for x in _scores())
    m_real, m_fake = real.mean(), fake.mean()
    critic = {
        "wgan": fake.mean() - real.mean(),
        "lsgan": 0.5 * ((real - 1) ** 2).mean() + 0.5 * (fake**2).mean(),
        "bce": -np.log(1 / (1 + np.exp(-real))).mean() - np.log(1 - 1 / (1 + np.exp(-fake))).mean(),
        "hinge": np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean(),
        "ralsgan": (((real - m_fake - 1) ** 2).mean() + ((fake - m_real + 1) ** 2).mean()) / 2,
    }[kind]
    generator = {
        "wgan": -fake.mean(),
        "lsgan": 0.5 * ((fake - 1) ** 2).mean(),
        "bce": _softplus(-fake).mean(),
        "hinge": -fake.mean(),
        "ralsgan": (((fake - m_real - 1) ** 2).mean() + ((real - m_fake + 1) ** 2).mean()) / 2,
    }[kind]
    assert critic_loss(kind, *_scores()).item() == pytest.approx(critic, rel=1e-5)
    real_scores, fake_scores = _scores()
    assert generator_loss(kind, fake_scores, real_scores).item() == pytest.approx(generator, rel=1e-5)
    if kind != "ralsgan":
        assert torch.equal(generator_loss(kind, fake_scores), generator_loss(kind, fake_scores, real_scores))


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_players_pull_apart(kind: str) -> None:
    """The critic is better off with higher real and lower fake scores, the generator with higher fake ones."""
    real, fake = ((0.1 * x).requires_grad_() for x in _scores())
    real_grad, fake_grad = torch.autograd.grad(critic_loss(kind, real, fake), (real, fake))
    assert real_grad.sum() < 0 < fake_grad.sum()
    (fake_grad,) = torch.autograd.grad(generator_loss(kind, fake, real), fake)
    assert fake_grad.sum() < 0


def test_a_relativistic_generator_is_the_critic_with_real_and_fake_exchanged() -> None:
    real, fake = _scores()
    assert torch.equal(generator_loss("ralsgan", fake, real), critic_loss("ralsgan", fake, real))
    assert torch.allclose(critic_loss("ralsgan", real + 7, fake + 7), critic_loss("ralsgan", real, fake))
    assert critic_loss("ralsgan", real, real).item() == pytest.approx(1 + real.var(correction=0).item(), rel=1e-5)


def test_a_baseline_takes_the_place_of_the_means_and_has_no_gradient() -> None:
    real, fake = (x.requires_grad_() for x in _scores())
    same = Baseline(real.mean().detach(), fake.mean().detach())
    assert torch.allclose(critic_loss("ralsgan", real, fake, same), critic_loss("ralsgan", real, fake))
    other = Baseline(torch.tensor(2.0), torch.tensor(-1.0))
    expected = ((real + 1 - 1).square().mean() + (fake - 2 + 1).square().mean()) / 2
    assert torch.allclose(critic_loss("ralsgan", real, fake, other), expected)
    (grad,) = torch.autograd.grad(generator_loss("ralsgan", fake, real.detach(), other), fake)
    assert torch.allclose(grad, (fake - 2 - 1).detach() / fake.numel())


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_averaged_whatever_their_size(kind: str) -> None:
    one = _scores(0)
    two = one[0][1:, :, :2, :2], one[1][1:, :, :2, :2]
    both = critic_loss(kind, [one[0], two[0]], [one[1], two[1]])
    assert torch.allclose(both, (critic_loss(kind, *one) + critic_loss(kind, *two)) / 2)
    both = generator_loss(kind, [one[1], two[1]], [one[0], two[0]])
    each = [generator_loss(kind, fake, real) for real, fake in (one, two)]
    assert torch.allclose(both, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind: str) -> None:
    real, fake = (x.bfloat16() for x in _scores())
    assert critic_loss(kind, real, fake).dtype == torch.float32
    assert torch.equal(critic_loss(kind, real, fake), critic_loss(kind, real.float(), fake.float()))


def test_bce_stays_finite_for_a_sure_critic() -> None:
    sure = torch.full((2, 1), 1e4, requires_grad=True)
    loss = generator_loss("bce", -sure)
    loss.backward()
    assert loss.item() == 1e4
    assert sure.grad is not None
    assert (sure.grad == 0.5).all()


class Linear(nn.Module):
    """D(x) = <w, x>, whose gradient is w everywhere."""

    def __init__(self, size: int, norm: float) -> None:
        super().__init__()
        w = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        self.w = nn.Parameter(norm * w / w.norm())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.flatten(1) @ self.w


@pytest.mark.parametrize("norm", [0.25, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic_is_known(norm: float) -> None:
    real, fake = _images()
    critic = Linear(144, norm)
    penalty = gradient_penalty(critic, real, fake)
    assert penalty.item() == pytest.approx((norm - 1) ** 2, abs=1e-12)
    penalty.backward()
    expected = 2 * (norm - 1) * critic.w / norm
    torch.testing.assert_close(critic.w.grad, expected.detach())
    signed = gradient_penalty(critic, real, fake, image_scale=2)  # [0, 1] images of a paper whose images lie in [-1, 1]
    assert signed.item() == pytest.approx((norm / 2 - 1) ** 2, abs=1e-12)


def test_the_penalty_of_a_quadratic_critic_shows_where_it_is_taken() -> None:
    """D(x) = |x|^2 / 2 has the gradient x: the penalty is that of the mixed images' own norms, each with its own alpha."""
    real, fake = _images()
    alpha_B = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)

    def critic(x: Tensor) -> Tensor:
        return x.square().flatten(1).sum(1) / 2

    u = alpha_B[:, None, None, None] * real + (1 - alpha_B)[:, None, None, None] * fake
    expected = (u.flatten(1).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(critic, real, fake, alpha_B=alpha_B), expected)
    ends = gradient_penalty(critic, real, fake, alpha_B=torch.ones(4))
    torch.testing.assert_close(ends, (real.flatten(1).norm(dim=1) - 1).square().mean())


def test_alpha_comes_from_the_generator_one_for_each_image() -> None:
    real, fake = torch.ones(64, 1, 1, 1), torch.zeros(64, 1, 1, 1)
    seen = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach().flatten())
        return x.flatten(1).sum(1)

    for seed in (0, 0, 1):
        gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert len(set(seen[0].tolist())) == 64
    assert 0.4 < seen[0].mean() < 0.6
    state = torch.random.get_rng_state()
    gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_score_maps_count_by_their_mean_and_scales_by_their_own_gradients() -> None:
    real, fake = _images()
    one, two = Linear(144, 2.0), Linear(144, 0.5)

    def patches(x: Tensor) -> list[Tensor]:
        wide = one(x)[:, None, None, None].expand(-1, 1, 3, 3)  # nine scores that are all the same
        return [wide, two(x)]

    assert gradient_penalty(patches, real, fake).item() == pytest.approx(((2 - 1) ** 2 + (0.5 - 1) ** 2) / 2, abs=1e-12)


def test_the_penalty_has_the_gradient_of_finite_differences() -> None:
    torch.manual_seed(0)
    real, fake = (x[:2, :1, :4, :4] for x in _images())
    conv = nn.Conv2d(1, 3, 3).double()
    head = torch.randn(3, dtype=torch.float64)
    alpha_B = torch.tensor([0.2, 0.9])

    def penalty(weight: Tensor) -> Tensor:
        def critic(x: Tensor) -> Tensor:
            return torch.tanh(torch.conv2d(x, weight)).mean((2, 3)) @ head

        return gradient_penalty(critic, real, fake, alpha_B=alpha_B)

    assert torch.autograd.gradcheck(penalty, conv.weight.detach().requires_grad_())


def test_a_critic_without_gradient_is_penalised_and_not_nan() -> None:
    real, fake = _images()
    critic = Linear(144, 1.0)
    with torch.no_grad():
        critic.w.zero_()
    penalty = gradient_penalty(critic, real, fake)
    penalty.backward()
    assert penalty.item() == 1
    assert critic.w.grad is not None
    assert torch.isfinite(critic.w.grad).all()


def test_no_gradient_goes_back_to_the_generator() -> None:
    real, fake = (x.requires_grad_() for x in _images())
    gradient_penalty(lambda x: x.square().flatten(1).sum(1), real, fake).requires_grad_().backward()
    assert real.grad is None
    assert fake.grad is None


def test_the_penalty_is_float32_whatever_autocast_says() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
    real, fake = (x.float() for x in _images())
    alpha_B = torch.rand(4)
    exact = gradient_penalty(critic, real, fake, alpha_B=alpha_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert critic(real).dtype == torch.bfloat16
        mixed = gradient_penalty(critic, real, fake, alpha_B=alpha_B)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)
    assert gradient_penalty(critic, real.half(), fake.half()).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(gradient_penalty(critic, real, fake, alpha_B=alpha_B), exact)


def test_what_cannot_be_judged_is_refused() -> None:
    real, fake = _scores()
    for loss in (critic_loss, generator_loss):
        with pytest.raises(
            ValueError, match="unknown adversarial loss 'wgan_gp'; known: wgan, lsgan, bce, hinge, ralsgan"
        ):
            loss("wgan_gp", real, fake)
        with pytest.raises(ValueError, match="only ralsgan compares with a baseline, not lsgan"):
            loss("lsgan", real, fake, Baseline(real, fake))
        with pytest.raises(ValueError, match=r"scales differ: \[1, 2, 1, 2\]|scales differ: \[2, 1, 2, 1\]"):
            loss("ralsgan", [real], [fake, fake])
        with pytest.raises(ValueError, match="scales differ"):
            loss("ralsgan", [real, real], [fake, fake], Baseline([real.mean()], [fake.mean()]))
    with pytest.raises(ValueError, match="ralsgan compares fake with real scores"):
        generator_loss("ralsgan", fake)
    images, other = _images()
    with pytest.raises(ValueError, match=r"must match, got \(4, 3, 8, 6\) and \(2, 3, 8, 6\)"):
        gradient_penalty(Linear(144, 1), images, other[:2])
    with pytest.raises(ValueError, match="one number for each of 4 images"):
        gradient_penalty(Linear(144, 1), images, other, alpha_B=torch.rand(1))
    with pytest.raises(ValueError, match="scores of 4 images must begin with 4"):
        gradient_penalty(lambda x: Linear(144, 1)(x).mean(), images, other)
    assert math.isfinite(critic_loss("wgan", real, fake).item())
