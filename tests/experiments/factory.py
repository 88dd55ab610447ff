"""Made-up papers and records for tests of everything that reads results. Nothing here is ever written to results/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.claims import Claim, Column, Design, Figure, Metric, Operand, PaperSpec, Table
from experiments.records import CellKey, Record

CARD = {
    "name": "MNIST",
    "n": 70000,
    "sha256": "c" * 64,
    "licence": "CC BY-SA 3.0",
    "real": True,
    "source": "official files",
    "note": "",
}


def record(
    ablation: str,
    seed: int,
    metrics: dict[str, float],
    *,
    data: str = "mnist",
    state: str = "done",
    profile: str = "small",
    error: str | None = None,
    path: Path = Path("/nowhere"),
) -> Record:
    """A record with a plausible manifest."""
    signature = f"{ablation}-{data}-{seed}"
    manifest = {
        "mlflow_run_id": f"run-{signature}",
        "commit": "a" * 40,
        "command": f"fivefold reproduce toy --only {ablation} --data {data} --seed {seed} --profile {profile}",
        "hardware": {"cpu": "Test CPU", "cores": 2, "ram_gib": 4.0, "gpu": None},
        "versions": {"torch": "2.15.0"},
        "data_cards": [CARD],
    }
    return Record(
        CellKey("toy", ablation, data, seed, profile),
        signature,
        state,  # type: ignore[arg-type]
        path,
        metrics if state == "done" else {},
        manifest,
        {"finished": f"2026-01-01T00:00:0{seed}+00:00", "weights_sha256": "d" * 64, "seconds": 1.5},
        error,
    )


def records(values: dict[str, list[float]], metric: str = "test/acc", **options: Any) -> list[Record]:
    """One record per seed for {ablation: its values}."""
    return [record(a, seed, {metric: v}, **options) for a, row in values.items() for seed, v in enumerate(row)]


def metrics() -> dict[str, Metric]:
    return {
        "test/acc": Metric("test/acc", "higher", "points", "test accuracy"),
        "test/loss": Metric("test/loss", "lower", "nats", "test loss"),
        "val/acc": Metric("val/acc", "higher", "points", "validation accuracy"),
        "noise/*/acc": Metric("noise/*/acc", "higher", "points", "accuracy under *"),
        "cost/params": Metric("cost/params", "lower", "parameters", "parameters"),
        "cost/multiplications": Metric("cost/multiplications", "lower", "multiplications", "multiplications"),
    }


def operand(ablation: str, metric: str = "test/acc") -> Operand:
    return Operand(metric, "mnist", ablation)


def claim(identity: str = "c", kind: str = "comparison", operands: tuple = (), **options: Any) -> Claim:
    options = {"design": Design(), "scale": "full", **options}
    chosen = operands or (operand("a"), operand("b"))
    return Claim(identity, "a beats b", "[test]", kind, chosen, **options)  # type: ignore[arg-type]


def paper(*claims: Claim, tables: tuple[Table, ...] = (), figures: tuple[Figure, ...] = ()) -> PaperSpec:
    return PaperSpec("toy", 3, "A toy paper", "0000.00000", metrics(), tables, figures, claims)


def table(*rows: str, columns: tuple[str, ...] = ("test/acc", "cost/params")) -> Table:
    return Table("main", "A table of 100% & more_things", rows, tuple(Column(c, "mnist") for c in columns), "toy")
