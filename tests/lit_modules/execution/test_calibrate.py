"""Points on a line give that line back, as a topology whose prices are the points."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from datamodules.planning import collectives, roofline
from datamodules.planning.graph import Graph, Op, TensorInfo
from datamodules.planning.topology import Topology, TopologyError
from lit_modules.execution.calibrate import Calibration, calibration, fit_line, fit_products
from lit_modules.execution.engine import TERMS
from lit_modules.execution.engine_points import benches, equations
from lit_modules.execution.timing import Point, point

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


def _products(rate: float = 9e10, packing: float = 6e9) -> list[Point]:
    shapes = [(8, 320, 1280), (64, 256, 256), (600, 320, 640)]
    made = [(2.0 * m * k * n, 4.0 * (m * k + k * n + m * n)) for m, k, n in shapes]
    return [Point("layer", f, f / rate + b / packing, (), str(i), b) for i, (f, b) in enumerate(made)]


def test_products_cost_arithmetic_and_traffic() -> None:
    fits = fit_products(_products())
    assert fits["arithmetic"].rate == pytest.approx(9e10)
    assert fits["packing"].rate == pytest.approx(6e9)
    assert fits["arithmetic"].error < 1e-9
    with pytest.raises(ValueError, match="do not grow with the operations"):
        fit_products([Point("layer", 1e6, 1.0, (), "a", 1e9), Point("layer", 1e9, 0.1, (), "b", 1e8)])


def test_a_layers_product_is_priced_as_it_was_measured() -> None:
    """On the machine as calibrated; on the plain one, which is what simulated machines have, products are arithmetic alone."""
    made = calibration([*made_up_points(), *_products()], 2)
    m, k, n = 8, 320, 1280
    tensors = (
        TensorInfo("a", (m, k), "float32"),
        TensorInfo("b", (k, n), "float32"),
        TensorInfo("c", (m, n), "float32"),
    )
    op = Op("product", "mm", (0, 1), (2,), {}, 2 * m * k * n, "forward")
    graph = Graph("one", tensors, (op,), (), (0, 1), (2,))
    row = ((-1, -1), (-1,))
    start = made.topology.launch_s
    priced = roofline.op_seconds(op, graph, row, 2, made.topology)
    assert priced == pytest.approx(start + _products()[0].seconds, rel=1e-6)
    plain = roofline.op_seconds(op, graph, row, 2, made.plain)
    assert plain == start + max(op.flops / LINES["compute"][1], 4 * (m * k + k * n + m * n) / made.plain.memory_rate)
    assert made.plain.product_bytes_per_s is None
    assert "product_bytes_per_s" not in made.plain.to_dict()
    assert Topology.from_dict(made.topology.to_dict()) == made.topology
    with pytest.raises(TopologyError, match="product_bytes_per_s must be above 0, got 0"):
        replace(made.topology, product_bytes_per_s=0.0)


@cache
def whole_machine() -> Calibration:
    """A machine on which each of the engine's terms is a millisecond."""
    small, points = benches(2), [*made_up_points(), *_products()]
    asked = equations(small, calibration(points, 2).topology, 0.0)
    steps = [Point("step", 0.0, e.base_s + 1e-3 * e.counts_U.sum(), (), e.what) for e in asked]
    return calibration([*points, *steps], 2, benches=small)


def test_an_engine_is_fitted_where_points_measure_it() -> None:
    made = whole_machine()
    assert made.engine.overlap == 0  # gloo works on the cores that compute
    assert made.engine.seconds == pytest.approx(dict.fromkeys(TERMS, 1e-3), rel=1e-6)
    assert made.engine_error < 1e-9
    assert {"start_s", "styled_s", "all_reduce_per_s", "packing_per_s"} <= made.terms.keys()
    assert not calibration([*made_up_points(), *_products()], 2).engine.seconds


def test_intervals_hold_the_value_and_widen_with_noise() -> None:
    def noisy(spread: float) -> list[Point]:
        factors = [1 - spread, 1.0, 1.0, 1 + spread, 1 + 2 * spread]
        return [point(p.kind, p.amount, [p.seconds * f for f in factors]) for p in made_up_points()]

    widths = []
    for spread in (0.02, 0.2):
        made = calibration(noisy(spread), 2)
        assert made.intervals.keys() == made.terms.keys()
        for name in ("start_s", "compute_per_s", "send_per_s"):
            low, high = made.intervals[name]
            assert low <= made.terms[name] <= high
        widths.append(made.intervals["compute_per_s"][1] - made.intervals["compute_per_s"][0])
    assert widths[0] < widths[1]
    assert not calibration(made_up_points(), 2).intervals
