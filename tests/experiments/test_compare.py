"""compare and export-runs say what the runs say: differences with their intervals, rows that read back as they were."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from experiments.cli import app
from experiments.compare import compare, difference, side
from experiments.errors import UserError
from experiments.export_runs import all_runs, columns_of, export, finished, rows_of
from experiments.stats import t_estimate
from experiments.store import write_json

PAPER = "tropical_cnn"


def _run(
    runs: Path, ablation: str, seed: int, score: float, data: str = "mnist", profile: str = "small", **changed
) -> str:
    signature = f"{ablation}{data}{profile}{seed}{changed.pop('again', '')}".encode().hex()[:40]
    folder = runs / signature
    folder.mkdir(parents=True)
    key = {"paper": PAPER, "ablation": ablation, "data": data, "seed": seed, "profile": profile, "model": ""}
    write_json(folder / "manifest.json", {**key, "commit": "c" * 40, "command": "fivefold", "created": "2026"})
    config = {"seed": seed, "net": {"layer1": ablation, "width": 4}, "datamodule": {"seed": seed, "name": data}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if changed.pop("done", True):
        when = changed.pop("finished", "2026-01-01")
        write_json(folder / "done.json", {"seconds": 1.5, "finished": when, "weights_sha256": "w"})
        write_json(
            folder / "metrics.json", {"test/acc": score, "cost/params": 2150.0, "train/seconds": 1.5 + seed, **changed}
        )
    return signature


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, (a, b) in enumerate([(91.0, 94.0), (92.0, 95.5), (90.0, 93.0), (91.5, 95.0)]):
        _run(tmp_path / "runs", "net0", seed, a)
        _run(tmp_path / "runs", "net1", seed, b)
    _run(tmp_path / "runs", "net2", 0, 90.0, done=False)
    return tmp_path / "runs"


def _shown(runs: Path, *names: str, **options) -> str:
    out = io.StringIO()
    compare(Console(file=out, width=200), names, runs, **options)
    return out.getvalue()


def test_differences_are_paired_by_seed_with_their_interval(runs: Path) -> None:
    sides = [side(name, finished(runs), runs, "", "") for name in ("net0", "net1")]
    expected = t_estimate([3.0, 3.5, 3.0, 3.5])
    assert expected.ci_low is not None
    text = difference(*sides, "test/acc", "points")
    assert text == f"{expected.mean:+.2f} ({expected.ci_low:+.2f} to {expected.ci_high:+.2f}) *"
    assert difference(sides[1], sides[0], "test/acc", "points").startswith(f"{-expected.mean:+.2f} (")
    assert text in _shown(runs, "net0", "net1")


def test_other_data_are_not_paired(runs: Path) -> None:
    for seed in range(4):
        _run(runs, "net1", seed, 40.0 + seed % 2, data="cifar10")
    found = finished(runs)
    other = side("net1@cifar10", found, runs, "", "")
    text = difference(side("net0", found, runs, "", ""), other, "test/acc", "points")
    from experiments.stats import welch

    gap, _ = welch([40.0, 41.0, 40.0, 41.0], [91.0, 92.0, 90.0, 91.5])
    assert text.startswith(f"{gap.mean:+.2f} ({gap.ci_low:+.2f} to")


def test_settings_that_differ_are_shown_and_seeds_are_not(runs: Path) -> None:
    lines = _shown(runs, "net0", "net1").splitlines()
    (setting,) = [line for line in lines if line.startswith("net.layer1")]
    assert setting.split() == ["net.layer1", "net0", "net1"]
    assert not any(line.startswith(("net.width", "seed ", "datamodule.seed")) for line in lines)
    (cost,) = [line for line in lines if line.startswith("train/seconds")]
    assert cost.split() == ["train/seconds", "3", "3"]


def test_a_name_can_be_a_run_and_metrics_can_be_chosen(runs: Path) -> None:
    signature = next(r.signature for r in finished(runs) if r.key.ablation == "net1" and r.key.seed == 2)
    text = _shown(runs, "net0", signature[:30], metrics=["cost/*"])
    assert "net1 seed 2" in text
    assert "cost/params (parameters)" in text
    assert "(no interval)" in text
    assert "test/acc" not in text


def test_of_runs_made_again_the_latest_counts(runs: Path) -> None:
    _run(runs, "net0", 0, 99.0, again="x", finished="2026-02-02")
    assert side("net0", finished(runs), runs, "", "").values("test/acc")[0] == 99.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("net0",), "two or more"),
        (("net0", "nte1"), "did you mean 'net1'|net1"),
        (("net0", "net2"), "'net2' is no ablation with finished runs"),
        (("net0", "net1@cifar10"), "no finished runs on 'cifar10'.*mnist"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(runs: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _shown(runs, *names)


def test_an_ablation_on_several_data_sets_wants_to_be_told_which(runs: Path) -> None:
    _run(runs, "net1", 0, 40.0, data="cifar10")
    with pytest.raises(UserError, match=r"more than one data set: cifar10, mnist.*net1@cifar10"):
        _shown(runs, "net0", "net1")
    assert "net1 on mnist" in _shown(runs, "net0", "net1", data="mnist")


def test_where_there_are_no_runs_it_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished runs"):
        _shown(tmp_path, "net0", "net1")


def test_every_format_reads_back_as_the_runs_were(runs: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    _run(runs, "net3", 0, 50.0, **{"noise/salt_0.05/acc": 12.5})
    records = finished(runs)
    rows = rows_of(records)
    for kind in ("csv", "parquet", "json"):
        assert export(records, tmp_path / f"out.{kind}") == (9, len(columns_of(rows)))
    (frame, listed) = (
        pq.read_table(tmp_path / "out.parquet").to_pylist(),
        json.loads((tmp_path / "out.json").read_text()),
    )
    with open(tmp_path / "out.csv") as file:
        text = list(csv.DictReader(file))
    for row, a, b, c in zip(rows, frame, listed, text, strict=True):
        assert {k: v for k, v in a.items() if v is not None} == row
        assert b == row
        assert {k: v for k, v in c.items() if v} == {k: str(v) for k, v in row.items()}
        assert ("metric.noise/salt_0.05/acc" in row) == (row["ablation"] == "net3")
        assert math.isfinite(row["metric.test/acc"])
    assert list(frame[0])[:5] == ["paper", "ablation", "data", "seed", "profile"]


def test_settings_of_several_types_become_text_in_parquet(runs: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for record, value in zip(finished(runs), (True, 1, 2.5, "x", None), strict=False):
        config = yaml.safe_load((record.path / "config.yaml").read_text()) | {"odd": value}
        (record.path / "config.yaml").write_text(yaml.safe_dump(config))
    export(finished(runs), tmp_path / "out.parquet")
    column = pq.read_table(tmp_path / "out.parquet").column("config.odd").to_pylist()
    assert column[:5] == ["True", "1", "2.5", "x", None]


def test_runs_that_are_not_finished_are_rows_on_request(runs: Path) -> None:
    assert len(all_runs(runs)) == len(finished(runs)) + 1
    (run,) = [row for row in rows_of(all_runs(runs)) if row["ablation"] == "net2"]
    assert run["state"] == "not run"
    assert not any(name.startswith("metric.") for name in run)


def test_the_commands_say_what_they_did(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_HOME", str(runs.parent))
    target = runs.parent / "all.csv"
    done = CliRunner().invoke(app, ["export-runs", str(target), "--paper", "3"])
    assert done.exit_code == 0, done.output
    assert "8 runs" in done.output
    again = CliRunner().invoke(app, ["export-runs", str(target)])
    assert isinstance(again.exception, UserError)
    assert "--force" in str(again.exception)
    wrong = CliRunner().invoke(app, ["export-runs", str(runs.parent / "all.xlsx")])
    assert isinstance(wrong.exception, UserError)
    assert not (runs.parent / "all.xlsx").exists()
    assert CliRunner().invoke(app, ["compare", "net0", "net1"]).exit_code == 0
