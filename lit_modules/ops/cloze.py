"""A cloze test without labels: does the model prefer the true continuation of a text to those of other texts?

Legend: B sequences, S tokens, P of the prefix, R = S - P of the continuation, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def cloze_hits(
    net: Callable[[Tensor], Tensor], x_BS: Tensor, y_BS: Tensor, candidates: int = 4, length: int = 16
) -> Tensor | None:
    """Return for each sequence whether its own continuation is the likeliest of `candidates`.

    The prefix is all but the last `length` tokens; the other candidates are the continuations of the sequences that follow
    in the batch, so all are real text of one length and chance is 1 / candidates. A tie counts as a miss.

    Args:
        net: maps tokens (B, S) to logits (B, S, V).
        x_BS: tokens (B, S), int64.
        y_BS: the tokens that follow each of them (B, S), int64.
        candidates: continuations to choose from.
        length: tokens of a continuation; half of S at most is taken.
    Returns:
        bool (B,), or None for a batch of fewer sequences than candidates.
    Raises:
        ValueError: fewer than 2 candidates.
    Source: ours; the paper's accuracy is MMLU, which a model of this size answers by chance.
    """
    if candidates < 2:
        raise ValueError(f"a choice needs at least 2 candidates, got {candidates}")
    if len(x_BS) < candidates:
        return None
    length = max(1, min(length, x_BS.shape[1] // 2))
    prefix = x_BS.shape[1] - length  # the last token of the prefix is x[:, prefix]; its continuation is y[:, prefix:]
    scores = []
    for shift in range(candidates):
        tail_BR = y_BS[:, prefix:].roll(-shift, 0)
        x = torch.cat([x_BS[:, : prefix + 1], tail_BR[:, :-1]], 1)
        logits_BRV = net(x)[:, prefix:].float()
        scores.append(-F.cross_entropy(logits_BRV.transpose(1, 2), tail_BR, reduction="none").sum(1))
    scores_CB = torch.stack(scores)
    return (scores_CB[0] > scores_CB[1:]).all(0)
