"""The restricted normal form: the tightest weights that keep a layer's outputs on given samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_modules.ops.restricted import require_finite, restricted_weight, tighter
from lit_modules.ops.tropical import tropical_matmul

KINDS = ("min", "max")
SIGN = {"min": 1, "max": -1}  # sign * W' <= sign * W


def _layer(kind: str, n: int = 40, k: int = 6, m: int = 5, whole: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs (N, K), weights (M, K) and outputs (N, M) of a layer, float64; of whole numbers if asked."""
    generator = torch.Generator().manual_seed(seed)
    f, w = (3 * torch.randn(size, generator=generator, dtype=torch.float64) for size in ((n, k), (m, k)))
    if whole:
        f, w = f.round(), w.round()
    return f, w, tropical_matmul(f, w, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_formula(kind: str) -> None:
    f, _, g = _layer(kind, n=7, k=3, m=2)
    pick = {"min": max, "max": min}[kind]
    expected = [[pick(float(g[n, i] - f[n, j]) for n in range(7)) for j in range(3)] for i in range(2)]
    assert restricted_weight(f, g, kind).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_in_whole_numbers_every_property_is_exact(kind: str) -> None:
    f, w, g = _layer(kind, whole=True)
    tight = restricted_weight(f, g, kind)
    assert not torch.equal(tight, w)
    assert (SIGN[kind] * tight <= SIGN[kind] * w).all()
    again = tropical_matmul(f, tight, kind=kind)
    assert torch.equal(again, g)
    assert torch.equal(restricted_weight(f, again, kind), tight)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_tight_somewhere_and_loose_nowhere(kind: str) -> None:
    f, w, g = _layer(kind)
    slack_NMK = SIGN[kind] * (restricted_weight(f, g, kind) + f[:, None, :] - g[:, :, None])
    assert slack_NMK.min() >= -1e-12
    assert slack_NMK.amin(0).abs().max() <= 1e-12
    before_NMK = SIGN[kind] * (w + f[:, None, :] - g[:, :, None])
    assert before_NMK.amin(0).max() > 0.1  # there were weights that won nowhere


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_can_go_further(kind: str) -> None:
    f, _, g = _layer(kind, whole=True)
    tight = restricted_weight(f, g, kind)
    for i in range(5):
        for j in range(6):
            further = tight.clone()
            further[i, j] -= SIGN[kind]
            assert not torch.equal(tropical_matmul(f, further, kind=kind), g)


@pytest.mark.parametrize("kind", KINDS)
def test_off_the_samples_outputs_move_one_way_only(kind: str) -> None:
    f, w, g = _layer(kind)
    fresh = 3 * torch.randn(500, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    moved = tropical_matmul(fresh, restricted_weight(f, g, kind), kind=kind) - tropical_matmul(fresh, w, kind=kind)
    assert (SIGN[kind] * moved).max() <= 1e-12
    assert (SIGN[kind] * moved).min() < -0.1


def test_min_and_max_are_dual() -> None:
    f, _, g = _layer("min")
    assert torch.equal(restricted_weight(-f, -g, "max"), -restricted_weight(f, g, "min"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_union_of_samples_joins_exactly(kind: str) -> None:
    f, _, g = (t.float() for t in _layer(kind, n=41))
    joined = restricted_weight(f[:13], g[:13], kind)
    for low, high in ((13, 14), (14, 41)):
        joined = tighter(joined, restricted_weight(f[low:high], g[low:high], kind), kind)
    assert torch.equal(joined, restricted_weight(f, g, kind))


def test_one_sample_makes_every_weight_win() -> None:
    f, _, g = _layer("min", n=1)
    assert torch.equal(restricted_weight(f, g, "min"), g.T - f)


F, G = torch.zeros(3, 2), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("f", "g", "kind", "words"),
    [
        (F, G, "mean", "min or max, got 'mean'"),
        (F[:2], G, "min", r"share N, got \(2, 2\) and \(3, 4\)"),
        (F[0], G, "min", r"share N, got \(2,\)"),
        (F[:0], G[:0], "min", "at least one sample, got 0"),
        (F[:, :0], G, "min", "0 inputs and 4 outputs"),
        (F, G[:, :0], "max", "2 inputs and 0 outputs"),
        (F.index_fill(1, torch.tensor([1]), float("nan")), G, "min", r"input \[0, 1\] is nan"),
        (F, G.index_fill(0, torch.tensor([2]), float("-inf")), "max", r"output \[2, 0\] is -inf"),
        (F - 3e38, G + 3e38, "min", r"normal form \[0, 0\] is inf"),
    ],
)
def test_what_has_no_normal_form_is_named(f: Tensor, g: Tensor, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        restricted_weight(f, g, kind)


def test_the_first_bad_value_is_named_and_good_ones_pass() -> None:
    require_finite(torch.tensor([1e38, -1e38]), "weight")
    with pytest.raises(ValueError, match=r"weight \[1\] is inf"):
        require_finite(torch.tensor([0.0, float("inf"), float("nan")]), "weight")
