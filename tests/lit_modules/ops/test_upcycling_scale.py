"""The published table of factors, and what cannot be scaled or routed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_modules.ops.upcycling import correction, scale_of
from lit_modules.ops.upcycling_scale import ACTIVATIONS, DEGREE, GATED, Factors, preserves

ST, TS = "softmax_topk", "topk_softmax"
TABLE = [  # E, G, T, C and s of softmax-then-topK, C and s of topK-then-softmax
    (8, 1, 1, 8, 2.000, None, None),
    (8, 1, 2, 4, 1.587, 1, 1.0),
    (8, 2, 2, 16, 2.520, 2, 1.260),
    (8, 4, 4, 32, 3.175, 4, 1.587),
    (8, 8, 8, 64, 4.000, 8, 2.000),
    (8, 8, 16, 32, 3.175, 8, 2.000),
    (8, 16, 16, 128, 5.040, 16, 2.520),
    (8, 32, 32, 256, 6.350, 32, 3.175),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "E{}G{}T{}".format(*row[:3]))
@pytest.mark.parametrize("activation", ["squared_relu", "swiglu", "geglu", "reglu"])
def test_the_papers_factors(row: tuple, activation: str) -> None:
    E, G, T, missing_st, scale_st, missing_ts, scale_ts = row
    assert correction(E, G, T, ST) == missing_st
    factors = scale_of(E, G, T, ST, activation)
    assert round(factors.up, 3) == round(factors.down, 3) == scale_st
    assert factors.gate == (factors.up if activation in GATED else 1)
    assert factors.output == 1
    if missing_ts is not None:
        assert correction(E, G, T, TS) == missing_ts
        assert round(scale_of(E, G, T, TS, activation).down, 3) == scale_ts


@settings(deadline=None)
@given(E=st.integers(1, 64), G=st.integers(1, 64), data=st.data())
def test_factors_by_activation_and_mode(E: int, G: int, data: st.DataObject) -> None:
    T = data.draw(st.integers(1, E * G))
    missing = correction(E, G, T, ST)
    assert missing == pytest.approx(E * G * G / T)
    for activation in ("relu", "gelu", "silu"):  # Megatron-LM's exponent for whatever is neither gated nor squared
        assert scale_of(E, G, T, ST, activation).up == pytest.approx(math.sqrt(missing))
    root = math.sqrt(missing)
    for activation in ACTIVATIONS:
        exact = scale_of(E, G, T, ST, activation, "exact")
        if activation in DEGREE:
            assert exact == scale_of(E, G, T, ST, activation, "paper")
            assert exact.up ** DEGREE[activation] == pytest.approx(missing)
        else:
            assert exact == (Factors(root, 1.0, root) if activation in GATED else Factors(1.0, 1.0, missing))
        assert scale_of(E, G, T, ST, activation, "down_only") == Factors(1.0, 1.0, missing)
        assert scale_of(E, G, T, ST, activation, "output") == Factors(1.0, 1.0, 1.0, missing)
        assert scale_of(E, G, T, ST, activation, "none") == Factors(1.0, 1.0, 1.0)
        assert scale_of(E, G, T, ST, activation, 2.5) == Factors(2.5, 2.5 if activation in GATED else 1.0, 2.5)


def test_which_scales_preserve_the_function() -> None:
    for activation in ACTIVATIONS:
        assert preserves("exact", activation, 64)
        assert preserves("down_only", activation, 64)
        assert preserves("output", activation, 64)
        assert not preserves("none", activation, 64)
        assert preserves("paper", activation, 64) == (activation in DEGREE)
        assert preserves("paper", activation, 1)
        assert preserves("none", activation, 1)
    assert preserves(4.0, "squared_relu", 64)
    assert preserves(8, "relu", 64)
    assert not preserves(2.5, "squared_relu", 64)
    assert not preserves(4.0, "swiglu", 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 1, 1, TS, "relu"), "the router's gradient is zero"),
        ((8, 1, 9, ST, "relu"), "between 1 and the 8 experts of E8G1, got 9"),
        ((8, 1, 0, ST, "relu"), "between 1 and the 8 experts"),
        ((0, 1, 1, ST, "relu"), "at least 1, got 0 and 1"),
        ((8, 1, 1, "softmax_top", "relu"), "unknown order 'softmax_top', nearest: 'softmax_topk'"),
        ((8, 1, 1, ST, "swiglo"), "unknown activation 'swiglo', nearest: 'swiglu'"),
        ((8, 1, 1, ST, "relu", "exactly"), "unknown scale mode 'exactly', nearest: 'exact'"),
        ((8, 1, 1, ST, "relu", 0.0), "positive and finite, got 0"),
        ((8, 1, 1, ST, "relu", float("nan")), "positive and finite, got nan"),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_of(*arguments)
