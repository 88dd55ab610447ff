"""Orders are pure functions of (seed, place), on one rank and on several, and crops come with the keys of their draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.blur import key_of
from datamodules.face_batches import CropSet, EvalOrder, PairOrder


def test_the_row_of_faces_is_endless_and_each_comes_once_before_any_comes_again() -> None:
    order = PairOrder(n=7, batch_size=4, size=10, seed=3)
    row = []
    for epoch in range(5):
        order.set_epoch(epoch)
        batches = list(order)
        assert [len(batch) for batch in batches] == [4, 4, 2] == [4] * (len(order) - 1) + [2]
        row += [pair for batch in batches for pair in batch]
    for turn in range(7):
        assert sorted(row[7 * turn : 7 * turn + 7]) == [(face, turn) for face in range(7)]
    other = PairOrder(n=7, batch_size=4, size=10, seed=4)
    assert other.batch(0, 0) != order.batch(0, 0)


def test_a_batch_is_the_same_on_one_rank_and_on_two() -> None:
    whole = list(PairOrder(9, 4, 12, seed=0))
    ranks = [list(PairOrder(9, 4, 12, 0, rank, 2)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert batch == [pair for pairs in zip(*parts, strict=True) for pair in pairs]
    with pytest.raises(
        ValueError, match="batch_size is that of all ranks together: 5 pairs cannot be dealt evenly to 2"
    ):
        PairOrder(9, 5, 10, 0, 0, 2)


def test_evaluation_faces_go_to_all_ranks_in_as_many_batches() -> None:
    assert list(EvalOrder(7, 3)) == [[(0, 0), (1, 0), (2, 0)], [(3, 0), (4, 0)], [(5, 0), (6, 0)]]
    ranks = [list(EvalOrder(7, 2, rank, 2)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert sorted(pair[0] for batches in ranks for batch in batches for pair in batch) == list(range(7))
    with pytest.raises(ValueError, match="1 faces do not go into 1 batches on each of 2 ranks"):
        EvalOrder(1, 8, 0, 2)


def test_crops_are_handed_out_as_bytes_with_their_keys() -> None:
    crops = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    batch = CropSet(crops, 1, "train", "train")[[(1, 0), (0, 2), (1, 1)]]
    assert batch.crops_BCSS.dtype == torch.uint8
    assert torch.equal(batch.crops_BCSS[0], torch.from_numpy(crops[1]).permute(2, 0, 1))
    assert len(set(batch.key_B.tolist())) == 3
    assert batch.key_B[0] == key_of(1, "train", 1)
