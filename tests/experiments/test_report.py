"""Result files keep their schema, the same inputs give the same bytes, and every number has its door."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from factory import claim, operand, paper, record, table

from experiments import figures, page, report, tables
from experiments.claims import Figure
from experiments.verdict import VERDICTS, estimates, judge

CONDITIONS = [f"noise/{kind}/acc" for kind in ("gaussian_0.1", "gaussian_0.5", "salt_0.05")]
FIGURES = (
    Figure("f", "forest", "Forest", "mnist", ("a", "b"), "b"),
    Figure("n", "noise", "Noise", "mnist", ("a", "b")),
    Figure("p", "pareto", "Pareto", "mnist", ("a", "b")),
    Figure("d", "difference", "Difference", "mnist", ("a",), "b"),
    Figure("v", "verdicts", "Verdicts"),
)


def _records(tmp_path: Path):
    found = []
    for name, base in (("a", 95.0), ("b", 92.0)):
        for seed in range(6):
            folder = tmp_path / "runs" / f"{name}{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(f"net: {name}\nseed: {seed}\ndatamodule: {{seed: {seed}}}\n")
            values = {"test/acc": base + 0.1 * seed, "cost/params": 2150.0, "cost/multiplications": 100.0 * base}
            values |= dict.fromkeys(CONDITIONS, base - 10 - seed)
            found.append(record(name, seed, values, path=folder))
    found.append(record("c", 0, {}, state="failed", error="E"))
    return found


@pytest.fixture
def made(tmp_path: Path):
    found = _records(tmp_path)
    spec = paper(
        claim("c1"),
        claim("c2", operands=(operand("a"), operand("c"))),
        tables=(table("a", "b", "c", "d"),),
        figures=FIGURES,
    )
    verdicts = judge(spec, found, "small")
    report.write_paper(spec, found, verdicts, tmp_path / "results" / "toy")
    page.write_html([(spec, found, verdicts)], tmp_path / "results" / "report.html")
    return spec, found, verdicts, tmp_path / "results"


def test_verdicts_json_has_the_agreed_keys(made) -> None:
    _, _, verdicts, results = made
    content = json.loads((results / "toy" / "verdicts.json").read_text())
    assert list(content) == ["paper", "profile", "hardware", "commit", "created", "data", "claims"]
    agreed = {"id", "text", "kind", "verdict", "reason", "metric", "n", "estimate", "ci", "p", "reported", "runs"}
    for entry, verdict in zip(content["claims"], verdicts, strict=True):
        assert agreed <= entry.keys()
        assert entry["verdict"] == verdict.verdict
        assert entry["verdict"] in (*VERDICTS, "failed", "running", "stale", "not run")
    assert content["data"][0]["real"] is True
    assert content["created"] == "2026-01-01T00:00:05+00:00"


def test_estimates_csv_has_the_agreed_columns_and_round_trips(made) -> None:
    spec, found, _, results = made
    with open(results / "toy" / "estimates.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "paper",
        "ablation",
        "data",
        "metric",
        "unit",
        "n",
        "mean",
        "sd",
        "ci_low",
        "ci_high",
        "profile",
        "runs",
    ]
    expected = estimates(spec, found)
    assert [float(r["mean"]) for r in rows] == pytest.approx([e.mean for e in expected])
    assert all(len(r["runs"].split()) == int(r["n"]) for r in rows)


def test_the_same_records_give_the_same_bytes(made, tmp_path: Path) -> None:
    spec, found, verdicts, results = made
    report.write_paper(spec, found[::-1], verdicts, tmp_path / "again")
    first = {f.relative_to(results / "toy"): f.read_bytes() for f in (results / "toy").rglob("*") if f.is_file()}
    second = {f.relative_to(tmp_path / "again"): f.read_bytes() for f in (tmp_path / "again").rglob("*") if f.is_file()}
    assert first == second
    assert {f.suffix for f in first} == {".csv", ".json", ".md", ".tex", ".svg"}


def test_what_no_longer_belongs_is_removed_and_other_files_stay(made) -> None:
    spec, found, verdicts, results = made
    (results / "toy" / "table_old.md").write_text("old")
    (results / "toy" / "figures" / "old.svg").write_text("old")
    (results / "toy" / "tuning.csv").write_text("kept")
    report.write_paper(spec, found, verdicts, results / "toy")
    names = {f.name for f in (results / "toy").rglob("*")}
    assert "old.svg" not in names
    assert "table_old.md" not in names
    assert {"tuning.csv", "table_main.md"} <= names


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.doors: list[str] = []
        self.claims: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        values = dict(attrs)
        self.doors += [values["data-door"]] if "data-door" in values else []
        self.claims += [values["data-claim"]] if "data-claim" in values else []
        self.ids += [values["id"]] if "id" in values else []
        if tag in ("script", "img", "link", "iframe") and (values.get("src") or values.get("href")):
            self.outside.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and str(v).startswith("http")]


def test_the_page_is_one_file_in_which_every_number_opens_its_runs(made) -> None:
    spec, found, _, results = made
    text = (results / "report.html").read_text()
    parsed = _Page()
    parsed.feed(text)
    assert parsed.outside == []
    assert len(parsed.ids) == len(set(parsed.ids))
    doors = page.doors_of(text)["toy"]
    shown = {tables.door(e) for e in estimates(spec, found) if e.metric in ("test/acc", "cost/params")}
    assert set(parsed.doors) == shown
    for name in parsed.doors:
        number = doors["numbers"][name]
        group = doors["groups"][number["group"]]
        assert len(number["values"]) == len(group["runs"]) == 6
        assert all(run["run"].startswith("run-") and run["signature"] for run in group["runs"])
        assert group["command"].startswith("fivefold reproduce")
        assert "--seed" not in group["command"]
        assert "net:" in group["config"]
    assert parsed.claims == ["c1"]
    assert doors["claims"]["c1"]["groups"] == ["a|mnist", "b|mnist"]


def test_missing_and_failed_values_are_words_never_numbers(made) -> None:
    _, _, _, results = made
    lines = (results / "toy" / "table_main.md").read_text().splitlines()
    (failed,) = [line for line in lines if line.startswith("| c ")]
    (absent,) = [line for line in lines if line.startswith("| d ")]
    assert failed.count("failed") == 2
    assert absent.count("—") == 2
    assert not re.search(r"\d", failed + absent)


def test_markdown_is_aligned_and_says_what_data_it_is_from(made) -> None:
    _, _, _, results = made
    text = (results / "toy" / "table_main.md").read_text()
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "MNIST, 70,000 samples in all, real" in text
    assert "2,150" in text
    assert re.search(r"95\.25 ± 0\.\d\d", text)


def test_latex_escapes_what_it_must(made) -> None:
    _, _, _, results = made
    text = (results / "toy" / "table_main.tex").read_text()
    assert r"A table of 100\% \& more\_things" in text
    assert r"95.25 $\pm$ 0.20" in text
    assert not re.search(r"(?<!\\)[%&_](?=more|things)", text)


def test_every_kind_of_figure_is_drawn_and_an_empty_one_is_not(made) -> None:
    spec, found, verdicts, _ = made
    rows = estimates(spec, found)
    for figure in FIGURES:
        svg = figures.draw(spec, figure, rows, verdicts, found)
        assert svg is not None
        assert svg.count("<svg") == 1
        assert figures.draw(spec, figure, rows, verdicts, found) == svg
        assert figures.draw(spec, figure, [], [], []) is None


def test_a_report_is_about_one_profile(made, tmp_path: Path) -> None:
    spec, found, verdicts, _ = made
    mixed = [*found, record("a", 9, {"test/acc": 1.0}, profile="paper")]
    with pytest.raises(ValueError, match="one profile"):
        report.write_paper(spec, mixed, verdicts, tmp_path / "mixed")


def test_the_page_keeps_the_other_papers_it_has(made) -> None:
    spec, found, verdicts, results = made
    file = results / "report.html"
    before = file.read_text()
    other = dataclasses.replace(spec, key="other", number=1, title="Another paper")
    page.write_html([(other, found, verdicts)], file)
    both = file.read_text()
    assert both.index("Paper 1: Another paper") < both.index("Paper 3: A toy paper")
    assert set(_doors(both)) == {"toy", "other"}
    assert _doors(both)["toy"] == _doors(before)["toy"]
    page.write_html([(spec, found, verdicts)], file)
    assert file.read_text() == both


def _doors(text: str) -> dict:
    return page.doors_of(text)
