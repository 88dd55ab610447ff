"""Points on a line give that line back, as a topology whose prices are the points."""

from __future__ import annotations

import pytest

from datamodules.planning import collectives, roofline
from lit_modules.execution.calibrate import Point, calibration, fit_line

LINES = {"all_reduce": (4e-4, 1e8), "send": (2e-4, 3e8), "compute": (1e-5, 2e10), "memory": (5e-6, 4e9)}
AMOUNTS = (1e3, 1e5, 1e6, 1e7, 1e8)


def made_up_points(noise: float = 0.0) -> list[Point]:
    """Points on LINES, every other one a little late."""
    lines = [
        Point(kind, b, (start + b / rate) * (1 + noise * (i % 2)))
        for kind, (start, rate) in LINES.items()
        for i, b in enumerate(AMOUNTS)
    ]
    return [*lines, Point("overhead", 40, 40 * 2e-5)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_prices_on_the_calibrated_machine_are_what_was_measured(ranks: int) -> None:
    made = calibration(made_up_points(), ranks)
    start, rate = LINES["all_reduce"]
    everything = tuple(range(ranks))
    for size in AMOUNTS:
        priced = collectives.collective(
            "all_reduce", size, collectives.group_of(made.topology, everything), made.topology, "ring"
        )
        assert priced == pytest.approx(start + size / rate, rel=1e-6)
        sent = collectives.send(size, made.topology, 0, 1)
        assert sent == pytest.approx(LINES["send"][0] + size / LINES["send"][1], rel=1e-6)
    assert all(fit.error < 1e-9 for fit in made.fits.values())
    assert made.topology.launch_s == pytest.approx(2e-5)
    big = roofline.seconds(2e10, 0.0, "float32", made.topology)
    assert big == pytest.approx(1.0, rel=1e-3)


def test_errors_are_relative() -> None:
    points = [p for p in made_up_points(noise=0.1) if p.kind == "send"]
    fit = fit_line(points)
    assert 0.01 < fit.error < 0.1
    assert fit.rate == pytest.approx(LINES["send"][1], rel=0.1)
    assert fit.intercept == pytest.approx(LINES["send"][0], rel=0.15)


def test_what_is_no_line_is_refused() -> None:
    with pytest.raises(ValueError, match="two amounts"):
        fit_line([Point("send", 5, 1.0), Point("send", 5, 2.0)])
    with pytest.raises(ValueError, match="do not grow"):
        fit_line([Point("send", 1, 2.0), Point("send", 1e6, 1.0), Point("send", 1e7, 0.5)])
