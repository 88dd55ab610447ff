"""Numbers as people read them."""

from __future__ import annotations

import pytest

from experiments.numbers import signed, with_half_width


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.8933, "points", "+2.89"),
        (-0.001234, "nats", "-0.00123"),
        (0.0, "points", "+0.00"),
        (1234.5, "steps", "+1.23e+03"),
    ],
)
def test_a_difference_shows_its_sign(value: float, unit: str, text: str) -> None:
    assert signed(value, unit) == text


@pytest.mark.parametrize(
    ("mean", "half", "unit", "text"),
    [
        (95.123, 0.456, "points", "95.12 ± 0.46"),
        (0.012341, 0.00056, "rmse", "0.01234 ± 0.00056"),
        (1234.5, 12.3, "steps", "1,234 ± 12"),
        (0.5, 0.0, "nats", "0.5 ± 0"),
        (1e-9, 2e-10, "nats", "1e-09 ± 2e-10"),
    ],
)
def test_a_mean_shows_as_many_places_as_its_interval(mean: float, half: float, unit: str, text: str) -> None:
    assert with_half_width(mean, half, unit) == text
