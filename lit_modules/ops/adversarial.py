"""Adversarial losses and the gradient penalty.

Legend: B batch, C channels, H height, W width. Scores are a tensor of any shape, or one per scale (a critic's score maps);
each scale has a loss of its own, and the loss is their mean. All is computed in float32 (float64 for float64 scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Kind = Literal["wgan", "lsgan", "bce", "hinge", "ralsgan"]
Scores = Tensor | Sequence[Tensor]


class Baseline(NamedTuple):
    """The mean scores that a relativistic loss compares with, a scalar per scale; see lit_modules.nets.critic.ScorePool."""

    real: Scores
    fake: Scores


def critic_loss(kind: str, real_scores: Scores, fake_scores: Scores, baseline: Baseline | None = None) -> Tensor:
    """Return what the critic minimises, a scalar.

    wgan     mean D(fake) - mean D(real)
    lsgan    (mean (D(real) - 1)^2 + mean D(fake)^2) / 2
    bce      mean softplus(-D(real)) + mean softplus(D(fake))
    hinge    mean relu(1 - D(real)) + mean relu(1 + D(fake))
    ralsgan  (mean (D(real) - m_fake - 1)^2 + mean (D(fake) - m_real + 1)^2) / 2

    m_real and m_fake are the means of these very scores, with their gradients, or those of `baseline`.

    Raises:
        ValueError: an unknown kind, scales that differ in number, or a baseline for a kind that has none.
    Source: WGAN (arXiv 1701.07875), LSGAN (arXiv 1611.04076) eq. 9, GAN (arXiv 1406.2661), hinge (arXiv 1705.02894),
        relativistic average least squares (arXiv 1807.00734). DeblurGAN's "lsgan" is not this: its code takes absolute
        differences.
    """
    _check(kind, baseline)
    losses = []
    for real, fake, m_real, m_fake in _scales(real_scores, fake_scores, baseline):
        match kind:
            case "wgan":
                losses.append(fake.mean() - real.mean())
            case "lsgan":
                losses.append(((real - 1).square().mean() + fake.square().mean()) / 2)
            case "bce":
                losses.append(F.softplus(-real).mean() + F.softplus(fake).mean())
            case "hinge":
                losses.append(F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            case "ralsgan":
                losses.append(_relativistic(real - m_fake, fake - m_real))
    return torch.stack(losses).mean()


def generator_loss(
    kind: str, fake_scores: Scores, real_scores: Scores | None = None, baseline: Baseline | None = None
) -> Tensor:
    """Return what the generator minimises, a scalar.

    wgan     -mean D(fake)
    lsgan    mean (D(fake) - 1)^2 / 2
    bce      mean softplus(-D(fake)), the non-saturating form
    hinge    -mean D(fake)
    ralsgan  (mean (D(fake) - m_real - 1)^2 + mean (D(real) - m_fake + 1)^2) / 2

    Only ralsgan looks at the real scores, and needs them. Its second term has a gradient only where m_fake is that of the
    scores: with a baseline it is a constant, and real scores may come without a graph.

    Raises:
        ValueError: as critic_loss; ralsgan without real scores.
    Source: see critic_loss.
    """
    _check(kind, baseline)
    if kind == "ralsgan" and real_scores is None:
        raise ValueError("ralsgan compares fake with real scores: generator_loss needs real_scores too")
    losses = []
    for real, fake, m_real, m_fake in _scales(
        fake_scores if real_scores is None else real_scores, fake_scores, baseline
    ):
        match kind:
            case "wgan" | "hinge":
                losses.append(-fake.mean())
            case "lsgan":
                losses.append((fake - 1).square().mean() / 2)
            case "bce":
                losses.append(F.softplus(-fake).mean())
            case "ralsgan":
                losses.append(_relativistic(fake - m_real, real - m_fake))
    return torch.stack(losses).mean()


def gradient_penalty(
    critic: Callable[[Tensor], Scores],
    real_BCHW: Tensor,
    fake_BCHW: Tensor,
    generator: Generator | None = None,
    alpha_B: Tensor | None = None,
    image_scale: float = 1.0,
) -> Tensor:
    """Return E[(|gradient of D at u| - 1)^2], u = a * real + (1 - a) * fake, a scalar with a graph to the critic.

    D(u) is the mean of an image's scores, as the losses have it, its gradient's norm is over C, H and W, and a is drawn
    from U(0, 1) for each image. A critic of several scales is several functions: the penalty is the mean over them. All in
    float32, whatever autocast says: the square of a norm of small numbers underflows in half precision.

    Args:
        critic: maps images (B, C, H, W) to scores, the first dimension of each being B. No batch norm, see
            lit_modules.nets.critic.check_penalty.
        real_BCHW, fake_BCHW: equally many; no gradient goes back to them.
        generator: draws a, where alpha_B is not given; None for the global one.
        alpha_B: a itself.
        image_scale: by which the gradient's norm is divided: 2 penalises images in [0, 1] as if they lay in a paper's
            [-1, 1], where the same change of score is spread over twice the distance.
    Raises:
        ValueError: images of different shapes, alpha of another length, or scores that do not begin with B.
    Source: WGAN-GP (arXiv 1704.00028), eq. 3. DeblurGAN's public code draws one a per batch, sums scores and takes the
        norm over C only, at every pixel. Asking norm 1 of the sum of P scores over C, H and W would leave their mean, which
        the generator follows, a norm of 1 / P.
    """
    if real_BCHW.shape != fake_BCHW.shape:
        raise ValueError(f"real and fake images must match, got {tuple(real_BCHW.shape)} and {tuple(fake_BCHW.shape)}")
    B, dtype = len(real_BCHW), torch.promote_types(real_BCHW.dtype, torch.float32)
    real_BCHW, fake_BCHW = real_BCHW.detach().to(dtype), fake_BCHW.detach().to(dtype)
    if alpha_B is None:
        device = real_BCHW.device if generator is None else generator.device
        alpha_B = torch.rand(B, generator=generator, device=device)
    if alpha_B.shape != (B,):
        raise ValueError(f"alpha must be one number for each of {B} images, got shape {tuple(alpha_B.shape)}")
    alpha_B111 = alpha_B.to(real_BCHW)[:, None, None, None]
    u_BCHW = (alpha_B111 * real_BCHW + (1 - alpha_B111) * fake_BCHW).requires_grad_()
    penalties = []
    with torch.enable_grad(), torch.autocast(u_BCHW.device.type, enabled=False):
        for scores in _listed(critic(u_BCHW)):
            if scores.shape[:1] != (B,):
                raise ValueError(f"scores of {B} images must begin with {B}, got shape {tuple(scores.shape)}")
            score = scores.reshape(B, -1).mean(1).sum()  # the sum over images: no score depends on another image
            (grad_BCHW,) = torch.autograd.grad(score, u_BCHW, create_graph=True)
            penalties.append((_norm(grad_BCHW) / image_scale - 1).square().mean())
        return torch.stack(penalties).mean()


def _norm(grad_BCHW: Tensor) -> Tensor:
    """Norm over all but the first dimension, (B,): vector_norm's own gradient at 0 is 0, not NaN."""
    return torch.linalg.vector_norm(grad_BCHW.flatten(1), dim=1)


def _relativistic(above: Tensor, below: Tensor) -> Tensor:
    return ((above - 1).square().mean() + (below + 1).square().mean()) / 2


def _check(kind: str, baseline: Baseline | None) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"unknown adversarial loss {kind!r}; known: {', '.join(get_args(Kind))}")
    if baseline is not None and kind != "ralsgan":
        raise ValueError(f"only ralsgan compares with a baseline, not {kind}")


def _listed(scores: Scores) -> list[Tensor]:
    return [scores] if isinstance(scores, Tensor) else list(scores)


def _scales(real: Scores, fake: Scores, baseline: Baseline | None) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per scale: real and fake scores, and the means that they are compared with."""
    reals, fakes = ([s.to(torch.promote_types(s.dtype, torch.float32)) for s in _listed(x)] for x in (real, fake))
    means = [[s.mean() for s in reals], [s.mean() for s in fakes]]
    if baseline is not None:
        means = [_listed(baseline.real), _listed(baseline.fake)]
    if len({len(reals), len(fakes), len(means[0]), len(means[1])}) > 1 or not reals:
        counts = [len(reals), len(fakes), *map(len, means)]
        raise ValueError(f"scales differ: {counts} of real and fake scores and of the means they are compared with")
    return list(zip(reals, fakes, *means, strict=True))
