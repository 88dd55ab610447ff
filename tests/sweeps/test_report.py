"""The report of a search: its files, its pictures, the front, the best as an ablation, and the verdict on fresh seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.cell import CONF, resolve
from experiments.errors import UserError
from experiments.records import CellKey, Record
from experiments.sweep_results import sweep_sections
from sweeps import finals
from sweeps.figures import Point, front
from sweeps.finals import Final
from sweeps.promote import promote
from sweeps.report import importances, write_report
from sweeps.space import DEFAULT, WINNER
from sweeps.tables import best_table, counts, points
from tests.sweeps.toys import Train, run_toy, space

TWO = [{"metric": "val/acc", "direction": "higher"}, {"metric": "cost/multiplications", "direction": "lower"}]
ARMS = {"narrow": {"fix": {"width": 4}, "tuned": True}, "slow": {"fix": {"rate": 0.001, "width": 4}}}


def _finished(made: Any, folder: Path, total: int = 10) -> tuple[dict[str, Any], list[Final]]:
    """A search, its tuned arms and its finals, all of toys."""
    url, runs, train = f"sqlite:///{folder / 'optuna.db'}", folder / "runs", Train()
    studies = {"": run_toy(made, runs, url, total)}
    for name, arm in made.arms.items():
        if arm.tuned:
            studies[name] = run_toy(made.arm(name), runs, url, total, arm=name)
    contenders = finals.contenders(made, studies)
    for final in contenders:
        for cell in finals.cells_of(made, final):
            train(cell, runs)
    return studies, [finals.with_records(made, final, runs) for final in contenders]


def test_the_report_holds_every_trial_and_the_same_trials_give_the_same_bytes(tmp_path: Path) -> None:
    made = space(pruner={"name": "wilcoxon", "p_threshold": 0.26}, arms=ARMS)
    studies, contenders = _finished(made, tmp_path, 14)
    summary = write_report(made, studies, contenders, tmp_path / "a")
    write_report(made, studies, contenders, tmp_path / "b")
    folder = tmp_path / "a" / "tropical_cnn" / "sweeps" / "toy"
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "b" / "tropical_cnn" / "sweeps" / "toy" / file).read_bytes()
    names = {str(file) for file in files}
    assert {"trials.csv", "summary.json", "best.yaml", "table_final.md", "table_best.tex"} <= names
    assert {f"figures/{n}.svg" for n in ("history", "importance", "slice", "parallel")} <= names
    rows = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert len(rows) == 28
    for row in rows:
        seeds = [float(row[f"val/acc, seed {s}"]) for s in made.seeds if row[f"val/acc, seed {s}"]]
        if row["state"] == "complete":
            assert float(row["val/acc"]) == pytest.approx(sum(seeds) / 3, abs=1e-4)
        else:
            assert row["state"] == "cut"
            assert row["val/acc"] == ""
            assert len(seeds) == 2
        assert row["width"] == "4" or row["arm"] == "search"
    search = summary["trials"]["search"]
    assert search["complete"] + search["cut"] == 14
    assert search["cut"] > 0


def test_pictures_are_whole_svg_and_say_nothing_of_the_day(tmp_path: Path) -> None:
    made = space(objectives=TWO)
    studies, contenders = _finished(made, tmp_path)
    write_report(made, studies, contenders, tmp_path)
    drawn = list((tmp_path / "tropical_cnn" / "sweeps" / "toy" / "figures").glob("*.svg"))
    assert {f.stem for f in drawn} >= {"history", "pareto", "slice", "parallel"}
    for file in drawn:
        assert ET.fromstring(file.read_text()).tag.endswith("svg")
        assert "<dc:date>" not in file.read_text()


def test_files_of_an_earlier_report_go(tmp_path: Path) -> None:
    made = space()
    studies, contenders = _finished(made, tmp_path, 4)
    old = tmp_path / "tropical_cnn" / "sweeps" / "toy" / "figures" / "pareto.svg"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    write_report(made, studies, contenders, tmp_path)
    assert not old.exists()


def test_the_page_reads_back_what_was_written(tmp_path: Path) -> None:
    made = space(arms=ARMS)
    studies, contenders = _finished(made, tmp_path, 6)
    summary = write_report(made, studies, contenders, tmp_path)
    (section,) = sweep_sections(tmp_path, "tropical_cnn")
    assert [t.id for t in section.tables] == ["final", "best", "importance"]
    assert [row[0].text for row in section.tables[0].rows] == [WINNER, DEFAULT, "narrow", "slow"]
    assert [f.name for f in section.figures] == [f["name"] for f in summary["figures"]]
    assert all(f.path.is_file() for f in section.figures)
    assert [v["id"] for v in section.verdicts] == ["toy.default", "toy.narrow", "toy.slow"]
    assert "never on test data" in section.about
    assert yaml.safe_load(section.best)["optim"]["optimizer"]["lr"] == studies[""].best_trial.params["rate"]
    assert sweep_sections(tmp_path, "min_max_plus") == []


def test_the_front_is_what_nothing_beats() -> None:
    made = space(objectives=TWO)
    scores = [(90.0, 10.0), (91.0, 20.0), (89.0, 15.0), (91.0, 20.0), (92.0, 30.0), (90.0, 11.0), (80.0, 5.0)]
    found = front(made, [Point(i, {}, s, False) for i, s in enumerate(scores)])
    assert [p.scores for p in found] == [(80.0, 5.0), (90.0, 10.0), (91.0, 20.0), (92.0, 30.0)]
    assert [p.number for p in found] == [6, 0, 1, 4]  # of equal ones the first


def test_the_winner_of_several_objectives_is_the_best_by_the_first(tmp_path: Path) -> None:
    made = space(objectives=TWO)
    studies, contenders = _finished(made, tmp_path)
    best = max(studies[""].trials, key=lambda t: t.values[0])
    assert contenders[0].values == {"rate": best.params["rate"], "width": best.params["width"]}
    assert contenders[0].values in [p.params for p in front(made, points(studies[""], made))]


def test_importance_finds_what_matters(tmp_path: Path) -> None:
    made = space(sampler={"name": "random", "seed": 1})
    studies, _ = _finished(made, tmp_path, 30)
    for method, shares in importances(studies[""], made).items():
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3), method
        assert shares["rate"] > shares["width"], method


def test_the_best_settings_are_told_once_however_often_they_were_drawn(tmp_path: Path) -> None:
    few = {
        "rate": {"path": "optim.optimizer.lr", "choices": [0.01, 0.1]},
        "width": {"path": "net.width", "choices": [4, 8]},
    }
    made = space(parameters=few, sampler={"name": "random", "seed": 1})
    studies, _ = _finished(made, tmp_path, 12)
    rows = [[cell.text for cell in row] for row in best_table(made, studies[""]).rows]
    settings = [tuple(row[1:3]) for row in rows]
    assert len(settings) == len(set(settings)) <= 4 < counts(studies[""])["complete"]
    firsts = {t.number: tuple(t.params.values()) for t in reversed(studies[""].trials)}
    for row in rows:
        assert all(firsts[n] != firsts[int(row[0])] for n in range(int(row[0]))), "a later trial than the first"


@pytest.mark.parametrize("order", [["width", "rate"], ["rate", "width"]])
def test_parameters_of_equal_importance_come_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    made = space(sampler={"name": "random", "seed": 1})
    studies, _ = _finished(made, tmp_path, 4)
    monkeypatch.setattr("optuna.importance.get_param_importances", lambda *_, **__: dict.fromkeys(order, 0.5))
    assert [list(shares) for shares in importances(studies[""], made).values()] == [["rate", "width"]] * 2


def test_contenders_are_the_winner_the_default_and_the_arms_on_seeds_that_no_trial_used(tmp_path: Path) -> None:
    made = space(arms=ARMS)
    studies, contenders = _finished(made, tmp_path, 6)
    assert [f.arm for f in contenders] == [WINNER, DEFAULT, "narrow", "slow"]
    assert contenders[1].values is None
    assert contenders[2].values == {"rate": studies["narrow"].best_trial.params["rate"], "width": 4}
    assert contenders[3].values == {"rate": 0.001, "width": 4}
    for final in contenders:
        assert [r.key.seed for r in final.records] == [0, 1, 2]
        assert all(r.state == "done" for r in final.records)


def _made_up(arm: str, values: list[float], profile: str = "small") -> Final:
    records = [
        Record(CellKey("tropical_cnn", arm, "mnist", seed, profile), f"{arm}{seed}", "done", Path(), {"test/acc": v})
        for seed, v in enumerate(values)
    ]
    return Final(arm, None, tuple(records))


@pytest.mark.parametrize(
    ("winner", "word"),
    [
        ([92.0, 92.1, 91.9, 92.2, 92.0, 91.8], "reproduced"),
        ([88.0, 88.1, 87.9, 88.2, 88.0, 87.8], "not reproduced"),
        ([90.9, 89.0, 90.6, 89.2, 90.5, 89.9], "inconclusive"),
    ],
)
def test_the_verdict_is_on_whether_the_winner_is_better_at_all(winner: list[float], word: str) -> None:
    made = dataclasses.replace(
        space(report={"metric": "test/acc", "direction": "higher", "seeds": list(range(6))}), profile="small"
    )
    default = [90.0, 90.1, 89.8, 90.2, 90.0, 89.9]
    (verdict,) = finals.verdicts(made, [_made_up(WINNER, winner), _made_up(DEFAULT, default)])
    assert verdict.verdict == word
    assert verdict.n == 6
    assert verdict.estimate == pytest.approx(sum(winner) / 6 - sum(default) / 6)


def test_a_smoke_search_decides_nothing_and_too_few_seeds_decide_nothing() -> None:
    values = [92.0, 92.1, 91.9], [90.0, 90.1, 89.8]
    smoke = [_made_up(arm, v, "smoke") for arm, v in zip((WINNER, DEFAULT), values, strict=True)]
    assert [v.verdict for v in finals.verdicts(space(), smoke)] == ["not assessable"]
    unfinished = dataclasses.replace(smoke[1], records=(dataclasses.replace(smoke[1].records[0], state="failed"),))
    assert [v.verdict for v in finals.verdicts(space(), [smoke[0], unfinished])] == ["failed"]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of the configuration that a test may write to."""
    return Path(shutil.copytree(CONF, tmp_path / "conf"))


def test_a_promoted_winner_is_the_very_configuration_that_was_chosen(conf: Path) -> None:
    made = space(set={"net.init": "normal:{sigma}"}, parameters={**_parameters(), "sigma": {"choices": ["0.1", "1.0"]}})
    final = Final(WINNER, {"rate": 0.0123, "width": 8, "sigma": "0.1"}, (), "", 91.5)
    file = promote(made, final, "net1_found", "tropical_cnn.toy.smoke.1234", conf)
    text = file.read_text()
    assert len(text.splitlines()) <= 30
    assert max(map(len, text.splitlines())) <= 128
    assert "Chosen by the sweep toy" in text
    found = resolve(CellKey("tropical_cnn", "net1_found", "mnist", 0, "smoke"), conf)
    assert found.hashed == made.cell(final.values, 0, {}).hashed
    assert found.config["net"]["init"] == "normal:0.1"
    with pytest.raises(UserError, match="there is an ablation of this name"):
        promote(made, final, "net1_found", "s", conf)


def _parameters() -> dict[str, Any]:
    return {
        "rate": {"path": "optim.optimizer.lr", "low": 0.001, "high": 0.1, "log": True},
        "width": {"path": "net.width", "choices": [4, 8]},
    }


@pytest.mark.parametrize("name", ["Net", "a b", "../up", "1st"])
def test_a_name_that_is_none_is_refused_and_nothing_is_written(conf: Path, name: str) -> None:
    before = sorted(conf.rglob("*"))
    with pytest.raises(UserError, match="an ablation's name is"):
        promote(space(), Final(WINNER, {"rate": 0.01, "width": 4}, ()), name, "s", conf)
    assert sorted(conf.rglob("*")) == before


def test_trials_that_repeat_are_counted(tmp_path: Path) -> None:
    made = space(
        parameters={"rate": {"path": "optim.optimizer.lr", "choices": [0.01, 0.02]}}, sampler={"name": "random"}
    )
    study = run_toy(made, tmp_path / "runs", f"sqlite:///{tmp_path / 'o.db'}", 9)
    assert counts(study) == {"complete": 9, "cut": 0, "failed": 0, "repeated": 7, "rejected": 0}
    studies = {"": study}
    text = json.dumps(write_report(made, studies, finals.contenders(made, studies), tmp_path))
    assert "7 were cells that an earlier trial had run" in text
