"""The cloze test: right for an oracle, wrong for who cannot decide, chance for who guesses, and a sum worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_modules.ops.cloze import cloze_hits

VOCAB = 32


def _counting(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Sequences that count upwards, each from a start of its own: what comes next is certain."""
    tokens = (torch.arange(batch)[:, None] * 5 + torch.arange(length + 1)) % VOCAB
    return tokens[:, :-1], tokens[:, 1:]


def _oracle(x_BS: Tensor) -> Tensor:
    return 20.0 * F.one_hot((x_BS + 1) % VOCAB, VOCAB).float()


class _Bigram:
    """Logits that depend on the last token only, drawn once; keeps what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.asked: list[Tensor] = []

    def __call__(self, x_BS: Tensor) -> Tensor:
        self.asked.append(x_BS)
        return self.table[x_BS]


@pytest.mark.parametrize("length", [8, 40])
def test_who_knows_what_comes_next_is_always_right_and_who_is_sure_of_the_opposite_never(length: int) -> None:
    x, y = _counting(6, length)
    hits = cloze_hits(_oracle, x, y)
    assert hits is not None
    assert hits.dtype == torch.bool
    assert hits.tolist() == [True] * 6
    wrong = cloze_hits(lambda x: -_oracle(x), x, y)
    assert wrong is not None
    assert not wrong.any()


def test_who_gives_all_the_same_score_has_chosen_nothing() -> None:
    """Every candidate ties: counting ties as hits would give a constant net a perfect score."""
    x, y = _counting(8, 20)
    hits = cloze_hits(lambda x: torch.zeros(*x.shape, VOCAB), x, y)
    assert hits is not None
    assert not hits.any()


def test_one_tie_is_a_miss_even_beside_worse_candidates() -> None:
    x, y = _counting(6, 8)
    x[1], y[1] = x[0], y[0]  # the first sequence's true continuation is also its second candidate
    hits = cloze_hits(_oracle, x, y)
    assert hits is not None
    assert hits.tolist() == [False] + 5 * [True]  # the twin of the second is five places on: none of its candidates


@pytest.mark.parametrize("candidates", [2, 4, 5])
def test_who_guesses_is_right_by_chance(candidates: int) -> None:
    """Random text and a net that knows nothing of it: 1 / candidates, within four standard deviations."""
    tokens = torch.randint(VOCAB, (4000, 13), generator=torch.Generator().manual_seed(1))
    hits = cloze_hits(_Bigram(), tokens[:, :-1], tokens[:, 1:], candidates)
    assert hits is not None
    chance = 1 / candidates
    assert abs(hits.float().mean().item() - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)


def test_a_score_is_the_log_probability_of_the_continuation_after_the_sequences_own_prefix() -> None:
    """Token by token in float64, for continuations of the sequences that follow in the batch."""
    net, batch, prefix = _Bigram(2), 7, 7  # 12 tokens, 5 of which are the continuation
    tokens = torch.randint(VOCAB, (batch, 13), generator=torch.Generator().manual_seed(3))
    log_p = net.table.double().log_softmax(1)
    expected = []
    for i in range(batch):
        scores = []
        for shift in range(3):
            last, score = tokens[i, prefix], 0.0
            for token in tokens[(i + shift) % batch, prefix + 1 :]:
                score += log_p[last, token].item()
                last = token
            scores.append(score)
        expected.append(scores[0] > max(scores[1:]))
    hits = cloze_hits(net, tokens[:, :-1], tokens[:, 1:], candidates=3, length=5)
    assert hits is not None
    assert hits.tolist() == expected
    assert 0 < sum(expected) < batch


@pytest.mark.parametrize(("context", "length", "taken"), [(12, 5, 5), (12, 16, 6), (9, 16, 4), (1, 16, 1)])
def test_no_more_than_half_of_a_sequence_is_its_continuation(context: int, length: int, taken: int) -> None:
    net = _Bigram()
    tokens = torch.randint(VOCAB, (4, context + 1), generator=torch.Generator().manual_seed(4))
    x, y = tokens[:, :-1], tokens[:, 1:]
    before = x.clone(), y.clone()
    cloze_hits(net, x, y, length=length)
    assert [asked.shape for asked in net.asked] == [x.shape] * 4
    for shift, asked in enumerate(net.asked):
        kept = context - taken + 1  # the prefix, whose last token predicts the first of the continuation
        assert torch.equal(asked[:, :kept], x[:, :kept])
        assert torch.equal(asked[:, kept:], y.roll(-shift, 0)[:, context - taken : -1])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_a_batch_too_small_to_choose_from_says_nothing_and_a_choice_of_one_is_refused() -> None:
    x, y = _counting(3, 8)
    assert cloze_hits(_oracle, x, y) is None
    assert cloze_hits(_oracle, x, y, candidates=3) is not None
    for few in (1, 0):
        with pytest.raises(ValueError, match=rf"at least 2 candidates, got {few}"):
            cloze_hits(_oracle, x, y, candidates=few)
