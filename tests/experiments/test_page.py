"""The page says how each verdict came about, carries over what it has, and shows searches from their folders."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from factory import claim, metrics, operand, paper, records, table

from experiments import page
from experiments.claims import Design, Figure
from experiments.page_explain import explained
from experiments.page_sweeps import sweeps_of
from experiments.verdict import judge

FIGURES = (Figure("f", "forest", "Forest", "mnist", ("a", "b"), "b"), Figure("v", "verdicts", "Verdicts"))
REPORT = Path(__file__).resolve().parents[2] / "results" / "report.html"


def _paper(*claims, **options):
    spec = paper(*(claims or (claim("c1"),)), tables=(table("a", "b", columns=("test/acc",)),), figures=FIGURES)
    return dataclasses.replace(spec, **options)


def _write(path: Path, *specs) -> str:
    found = records({"a": [95.0, 95.1, 95.2, 95.3, 95.4, 95.6], "b": [92.0, 92.2, 92.1, 92.3, 92.4, 92.1]})
    page.write_html([(spec, found, judge(spec, found, "small")) for spec in specs], path)
    return path.read_text()


def test_a_page_names_its_papers_with_their_verdicts(tmp_path: Path) -> None:
    text = _write(tmp_path / "report.html", _paper(), _paper(key="other", number=1, title="One & two"))
    assert text.index(">1. One &amp; two<") < text.index(">3. A toy paper<")
    entry = page.entry("toy", 3, re.search(r'<section id="toy".*?</section>', text, re.S).group(), False)  # type: ignore[union-attr]
    assert entry.title == "A toy paper"
    assert entry.words == {"reproduced": 1}
    for part in ("claims", "figures", "tables", "data"):
        assert f'href="#{part}-of-toy"' in text
        assert f'id="{part}-of-toy"' in text


def test_sections_whose_runs_are_not_at_hand_stay_with_their_styles_and_doors(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    before = _write(file, _paper(key="other", number=1))
    after = _write(file, _paper())
    kept, doors, styles = page.kept(file)
    assert set(kept) == {(1, "other"), (3, "toy")}
    assert kept[1, "other"] in before
    assert doors["other"] == page.doors_of(before)["other"]
    drawings = "".join(svg for paper in doors.values() for svg in paper["drawings"].values())
    assert set(re.findall(r'class="(s[0-9a-f]{6})"', drawings)) == set(styles)
    assert all(name in doors["toy"]["drawings"] for name in ("f", "v"))
    assert "<svg" not in after
    assert _write(file) == after
    assert _write(file, _paper(), _paper(key="other", number=1)) == after


def test_drawings_of_an_earlier_page_are_packed_too() -> None:
    svg = '<svg role="img"><path d="M0 0"/></svg>'
    figure = '<figure class="drawing broad" id="figure-toy-f-1">{}</figure><figure class="table" id="t">x</figure>'
    text, drawings = page.without_drawings("toy", figure.format(svg))
    assert text == figure.format("")
    assert drawings == {"f-1": svg}
    assert page.without_drawings("toy", text) == (text, {})


def test_a_claim_opens_its_runs_and_the_numbers_it_weighs(tmp_path: Path) -> None:
    doors = page.doors_of(_write(tmp_path / "report.html", _paper()))["toy"]
    (found,) = doors["claims"].values()
    assert found["groups"] == ["a|mnist", "b|mnist"]
    assert found["numbers"] == ["a|mnist|test/acc", "b|mnist|test/acc"]
    assert doors["numbers"]["a|mnist|test/acc"]["values"] == [95.0, 95.1, 95.2, 95.3, 95.4, 95.6]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "test accuracy (points, higher is better) of a on mnist, against b on mnist"),
        ({"operands": (operand("a"),), "against": 90.0}, "against the number 90"),
        ({"kind": "trend", "operands": (operand("a"), operand("b"))}, "the slope of test accuracy"),
        ({"kind": "ordering", "operands": (operand("a"), operand("b"))}, "a on mnist, each against b on mnist"),
        ({"kind": "ordering", "pattern": "any"}, "in at least one pair"),
        ({"kind": "value", "operands": (operand("a"),), "reported": 95.0, "margin": 1.0}, "within 1 points"),
        ({"kind": "identity"}, "if it holds in every run"),
        ({"margin": 1.5}, "above 1.5 points"),
        ({"relative": True, "margin": 2.0}, "in percent of the second side"),
        ({"scale": "reduced"}, "smaller than the paper's"),
        ({"match": {"cost/params": 0.05}}, "agree in parameters to within 5%"),
        ({"design": Design(8, False, 0.01, "sign_flip")}, "8 seeds, unpaired; a sign-flip test at 0.01"),
        ({"beyond": "it needs 1,000 GPUs"}, "No profile of the suite can put this question"),
    ],
)
def test_every_kind_of_claim_is_explained(changed: dict, said: str) -> None:
    identity = changed.pop("kind", "comparison")
    spec = paper(claim("c", identity, **changed))
    found = records({"a": [95.0, 96.0], "b": [92.0, 91.0]})
    sentences = explained(spec, judge(spec, found, "small"))["c"]
    assert said in " ".join(sentences)
    assert metrics()["test/acc"].direction == "higher"


def _sweep(folder: Path, **changed) -> None:
    cell = {"text": "lr 0.1", "door": None, "reason": ""}
    model = {"id": "best", "title": "Best", "header": ["trial"], "rows": [[cell]], "notes": ["A note."], "left": [0]}
    summary = {
        "paper": "toy", "space": "mix", "title": "A mix of layers", "profile": "small", "current": True,
        "objectives": [{"metric": "val/acc", "direction": "higher"}], "seeds": [100, 101], "optuna": "5.0",
        "sampler": {"name": "tpe"}, "pruner": {"name": "none"}, "counts": "8 trials.", "tables": [model], "verdicts": [],
        "figures": [{"name": "history", "title": "History", "file": "figures/history.svg"}],
    }  # fmt: skip
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "history.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "trials.csv").write_text("trial\n")
    (folder / "summary.json").write_text(json.dumps(summary | changed))


def test_searches_are_shown_from_their_folders(tmp_path: Path) -> None:
    _sweep(tmp_path / "toy" / "sweeps" / "mix")
    (found,) = sweeps_of("toy", tmp_path)
    assert found.figures == [("History", "toy/sweeps/mix/figures/history.svg")]
    assert found.files == [("trials.csv", "toy/sweeps/mix/trials.csv"), ("summary.json", "toy/sweeps/mix/summary.json")]
    text = _write(tmp_path / "report.html", _paper())
    assert 'id="sweeps-of-toy"' in text
    assert 'href="#sweeps-of-toy"' in text
    assert 'src="toy/sweeps/mix/figures/history.svg"' in text
    assert "lr 0.1" in text


def test_a_search_in_the_middle_of_being_written_does_not_stop_the_page(tmp_path: Path) -> None:
    _sweep(tmp_path / "toy" / "sweeps" / "mix")
    (tmp_path / "toy" / "sweeps" / "mix" / "summary.json").write_text('{"paper": "to')
    assert sweeps_of("toy", tmp_path) == []
    assert "sweeps-of-toy" not in _write(tmp_path / "report.html", _paper())


def test_a_search_of_other_code_says_so(tmp_path: Path) -> None:
    _sweep(tmp_path / "toy" / "sweeps" / "mix", current=False)
    (found,) = sweeps_of("toy", tmp_path)
    assert "have changed since" in found.about


@pytest.mark.skipif(not REPORT.exists(), reason="results/report.html is not there")
def test_the_committed_page_stays_small() -> None:
    assert REPORT.stat().st_size < 1_000_000
