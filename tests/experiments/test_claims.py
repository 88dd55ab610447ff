"""A claims file is read strictly: what is unknown, missing or decides on test is refused with the way out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from experiments.cell import ablations, resolve
from experiments.claims import KNOWN_PAPERS, PAPERS, PROFILES, ClaimError, available_papers, load_paper
from experiments.records import CellKey
from lit_modules.ops.noise import NOISE_SUITE
from lit_modules.tropical_cnn import condition_name

MINIMAL = {
    "number": 3,
    "title": "T",
    "arxiv": "0",
    "metrics": {"test/acc": {"direction": "higher", "unit": "points", "label": "accuracy"}},
    "tables": [],
    "figures": [],
    "claims": [
        {
            "id": "c",
            "text": "a beats b",
            "source": "s",
            "kind": "comparison",
            "operands": [
                {"metric": "test/acc", "data": "mnist", "ablation": "a"},
                {"metric": "test/acc", "data": "mnist", "ablation": "b"},
            ],
        }
    ],
}


def _load(tmp_path: Path, content: dict):
    folder = tmp_path / "papers" / "toy"
    folder.mkdir(parents=True)
    (folder / "claims.yaml").write_text(yaml.safe_dump(content))
    return load_paper("toy", tmp_path / "papers")


def test_a_minimal_file_is_read(tmp_path: Path) -> None:
    spec = _load(tmp_path, MINIMAL)
    assert spec.required("small") == [("a", "mnist"), ("b", "mnist")]
    assert spec.claims[0].design.seeds == 6
    assert spec.claims[0].reported is None


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["claims", 0, "kindd"], "comparison", ["unknown key 'kindd'", "'kind'"]),
        (["claims", 0, "kind"], "comparision", ["'comparision'", "'comparison'"]),
        (["claims", 0, "operands", 0, "metric"], "test/ac", ["unknown metric 'test/ac'", "'test/acc'"]),
        (["claims", 0, "match"], {"cost/param": 0.1}, ["unknown metric 'cost/param'"]),
        (["claims", 0, "profiles"], ["smal"], ["unknown profile 'smal'", "'small'"]),
        (["claims", 0, "operands"], [MINIMAL["claims"][0]["operands"][0]], ["has 2 operands, got 1"]),
        (
            ["claims", 0, "operands", 0],
            {"metric": "test/acc", "data": "mnist", "best_of": ["a"], "by": "test/acc"},
            ["never on test", "test/acc"],
        ),
        (["claims", 0, "operands", 0], {"metric": "test/acc", "data": "mnist"}, ["either an ablation or best_of"]),
        (["metrics", "test/acc", "direction"], "up", ["unknown value 'up'"]),
        (["metrics", "test/acc", "direction"], "none", ["no better direction"]),
        (["claims", 0, "margin"], "large", ["expected float", "'large'"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, path: list, value: object, words: list[str]) -> None:
    content = copy.deepcopy(MINIMAL)
    node = content
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(ClaimError) as error:
        _load(tmp_path, content)
    for word in words:
        assert word in str(error.value)


def test_ids_are_unique(tmp_path: Path) -> None:
    content = copy.deepcopy(MINIMAL)
    content["claims"].append(content["claims"][0])
    with pytest.raises(ClaimError, match="used twice: c"):
        _load(tmp_path, content)


@pytest.mark.parametrize("key", sorted(available_papers().values()))
def test_every_cell_that_a_paper_needs_exists(key: str) -> None:
    spec = load_paper(key)
    assert KNOWN_PAPERS[spec.number] == key
    known = set(ablations(key))
    for profile in PROFILES:
        for ablation, data in spec.required(profile):
            assert ablation in known
            resolve(CellKey(key, ablation, data, 0, profile))


def test_every_metric_that_a_claim_reads_is_one_that_the_module_logs() -> None:
    spec = load_paper("tropical_cnn")
    logged = {"test/acc", "test/loss", "val/acc", "published/test_acc", "train/samples", "train/seconds"}
    logged |= {f"noise/{condition_name(kind, level)}/acc" for kind, level in NOISE_SUITE}
    logged |= {f"cost/{name}" for name in ("params", "multiplications", "additions", "comparisons")}
    read = {o.metric for c in spec.claims for o in c.operands} | {m for c in spec.claims for m in c.match}
    read |= {o.by for c in spec.claims for o in c.operands if o.by} | {c.metric for t in spec.tables for c in t.columns}
    assert read <= logged


def test_mixed_orderings_cover_the_whole_noise_suite() -> None:
    spec = load_paper("tropical_cnn")
    conditions = [f"noise/{condition_name(kind, level)}/acc" for kind, level in NOISE_SUITE]
    for name in ("A2.linear.mnist", "A2.relu.mnist"):
        (claim,) = [c for c in spec.claims if c.id == name]
        assert [o.metric for o in claim.operands[::2]] == conditions == [o.metric for o in claim.operands[1::2]]


@pytest.mark.parametrize("paper", ["tropical_cnn", "min_max_plus"])
def test_no_number_is_put_into_the_papers_mouth(paper: str) -> None:
    assert all(claim.reported is None for claim in load_paper(paper).claims)
    page = (PAPERS / paper / "README.md").read_text()
    assert page.count("## Deviations") == page.count("## Journal") == 1
