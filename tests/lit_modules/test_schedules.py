"""Learning-rate laws against their published definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lit_modules.schedules import cosine, exponential_decay, linear_decay, step_decay, token_cosine


def test_step_decay_is_the_published_script_stepping_at_the_start_of_each_epoch() -> None:
    """The published loop calls StepLR.step() first in every epoch; epoch by epoch the rates must agree."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    published = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.95)
    law = step_decay(gamma=0.95, every=2)
    for epoch in range(100):
        optimizer.step()
        published.step()
        assert 0.02 * law(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        assert law(epoch + 0.999) == law(epoch)


def test_exponential_decay_is_torchs_exponential_lr() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    law = exponential_decay(gamma=0.9)
    for epoch in range(50):
        assert 1e-3 * law(epoch + 0.5) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        reference.step()


def test_cosine_warms_up_linearly_peaks_at_one_and_ends_at_the_floor() -> None:
    law = cosine(epochs=10, floor=0.1, warmup=2)
    assert law(0) == 0
    assert law(1) == pytest.approx(0.5)
    assert law(2) == pytest.approx(1)
    assert law(6) == pytest.approx(0.1 + 0.9 * 0.5)
    assert law(10) == pytest.approx(0.1)
    assert law(11) == pytest.approx(0.1)
    later = [law(2 + 8 * i / 100) for i in range(101)]
    assert all(a >= b for a, b in itertools.pairwise(later))
    assert not math.isnan(law(2))


def test_cosine_warms_up_from_where_it_is_told_to_start() -> None:
    law = cosine(epochs=10, floor=0.1, warmup=2, start=0.4)
    assert [law(e) for e in (0, 0.5, 1, 2)] == pytest.approx([0.4, 0.55, 0.7, 1.0])
    plain = cosine(epochs=10, floor=0.1, warmup=2)
    assert [law(e) for e in (2, 3.3, 9, 10)] == [plain(e) for e in (2, 3.3, 9, 10)]
    assert cosine(epochs=10, start=0.4)(0) == 1  # without a warm-up there is nowhere to start from


def test_a_law_of_tokens_is_the_same_whatever_the_number_of_epochs() -> None:
    """A tenth of the training is the warm-up: of 2 epochs, of 10 and of half a one."""
    laws = {epochs: token_cosine(epochs, floor=0.2, warmup=0.1, start=0.3) for epochs in (0.5, 2, 10)}
    for share in (0, 0.03, 0.1, 0.25, 0.7, 1, 1.2):
        expected = (
            0.3 + 0.7 * share / 0.1 if share < 0.1 else 0.2 + 0.8 * (1 + math.cos(math.pi * (share - 0.1) / 0.9)) / 2
        )
        expected = expected if share <= 1 else 0.2
        for epochs, law in laws.items():
            assert law(share * epochs) == pytest.approx(expected), (share, epochs)
    assert token_cosine(4, warmup=0)(0) == 1


def test_a_warm_up_is_a_share_below_one() -> None:
    for warmup in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match=rf"share of the training in \[0, 1\), got {warmup}"):
            token_cosine(10, warmup=warmup)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: step_decay(gamma=0, every=2),
        lambda: step_decay(gamma=1.1, every=2),
        lambda: step_decay(gamma=0.9, every=0),
        lambda: exponential_decay(gamma=-1),
        lambda: cosine(epochs=1, warmup=1),
        lambda: cosine(epochs=2, floor=2),
        lambda: cosine(epochs=2, start=-0.1),
        lambda: cosine(epochs=2, start=1.1),
        lambda: token_cosine(epochs=2, start=1.1),
        lambda: token_cosine(epochs=0),
    ],
)
def test_impossible_arguments_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"must"):
        wrong()


def test_linear_decay_is_constant_and_then_a_line_to_zero() -> None:
    law = linear_decay(300, 0.5)
    assert [law(epoch) for epoch in (0, 149, 150)] == [1.0, 1.0, 1.0]
    assert law(225) == pytest.approx(0.5)
    assert law(300) == 0.0
    assert law(301) == 0.0
    with pytest.raises(ValueError, match="constant is a share"):
        linear_decay(10, 1.0)
    with pytest.raises(ValueError, match="epochs must be above 0"):
        linear_decay(0)
