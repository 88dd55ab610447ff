"""A claims file is read strictly: what is unknown, missing or decides on test is refused with the way out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from experiments.cell import ablations, profiles, resolve
from experiments.claims import KNOWN_PAPERS, PAPERS, PROFILES, ClaimError, PaperSpec, available_papers, load_paper
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
        (["claims", 0, "relative"], "yes", ["claims[0].c.relative", "expected bool", "'yes'"]),
        (["claims", 0, "beyond"], True, ["expected str", "True"]),
        (["data_in"], {"papr": {"mnist": "cifar10"}}, ["data_in: unknown profile 'papr'", "'paper'"]),
        (["figures"], [{"id": "f", "kind": "survivl", "title": "T"}], ["'survivl'", "nearest valid: 'survival'"]),
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
    for profile in profiles(key):
        for ablation, data in spec.in_profile(profile).required(profile):
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


@pytest.mark.parametrize(
    "change", [{"kind": "value", "reported": 1.0}, {"kind": "identity", "against": 1.0}, {"against": 1.0}]
)
def test_only_a_difference_between_runs_can_be_relative(tmp_path: Path, change: dict) -> None:
    content = copy.deepcopy(MINIMAL)
    one = {"operands": content["claims"][0]["operands"][:1]}
    content["claims"][0] |= {**one, **change, "relative": True}
    with pytest.raises(ClaimError, match="c: only differences between runs are relative"):
        _load(tmp_path, content)


def test_a_profile_takes_other_data_everywhere(tmp_path: Path) -> None:
    content = copy.deepcopy(MINIMAL)
    content["claims"].append(copy.deepcopy(content["claims"][0]) | {"id": "d"})
    content["claims"][1]["operands"][0]["data"] = "cifar10"
    content["tables"] = [
        {"id": "t", "title": "T", "rows": ["x"], "columns": [{"metric": "test/acc", "data": "mnist"}], "source": ""}
    ]
    content["figures"] = [
        {"id": "f", "kind": "forest", "title": "T", "data": "mnist", "rows": ["y"], "metric": "test/acc"}
    ]
    content["data_in"] = {"paper": {"mnist": "fashion_mnist"}}
    spec = _load(tmp_path, content)
    assert spec.in_profile("small") is spec
    other = spec.in_profile("paper")
    assert other.required("paper") == [(n, "fashion_mnist") for n in "ab"] + [("a", "cifar10"), ("x", "fashion_mnist")]
    assert (other.figures[0].data, other.figures[0].metric) == ("fashion_mnist", "test/acc")
    assert spec.required("paper")[0] == ("a", "mnist")  # the one that was read has not changed
    assert other.metrics == spec.metrics
    chosen = spec.on_data({"cifar10": "fashion_mnist"})
    assert chosen.required("paper") == [("a", "mnist"), ("b", "mnist"), ("a", "fashion_mnist"), ("x", "mnist")]
    with pytest.raises(ClaimError, match=r"no claim is of data set 'mnits'.*nearest valid: 'mnist'"):
        spec.on_data({"mnits": "fashion_mnist"})


MOE = load_paper("moe_upcycling")


def test_what_paper_1_reports_is_worked_out_from_what_its_text_prints() -> None:
    """Training losses of section 3.7, validation losses and MMLU of Table 1; nothing else is put into its mouth."""
    table = {"dense": (1.377, 65.3), "e8g8t8": (1.320, 66.2), "e8g1t2": (1.306, 67.6)}
    expected = {
        "C2.coarse": 1.5,
        "C4.coarse": 100 * (1 - 1.35757 / 1.38031),
        "C5.tenth": 1.1,
        "C16.granular": 100 * (1 - table["e8g8t8"][0] / table["dense"][0]),
        "C16.coarse": 100 * (1 - table["e8g1t2"][0] / table["dense"][0]),
        "C16.mmlu": table["e8g1t2"][1] - table["dense"][1],
    }
    reported = {claim.id: claim.reported for claim in MOE.claims if claim.reported is not None}
    assert reported == {name: pytest.approx(value, abs=0.05) for name, value in expected.items()}
    page = (PAPERS / "moe_upcycling" / "README.md").read_text()
    assert page.count("## Deviations") == page.count("## Journal") == 1


def test_differences_in_a_loss_are_relative_and_what_needs_a_cluster_is_beyond() -> None:
    for claim in MOE.claims:
        losses = {o.metric for o in claim.operands} <= {"test/loss", "val_at/020"}
        assert claim.relative == losses, claim.id
        assert bool(claim.beyond) == claim.id.startswith("C16."), claim.id
        assert claim.scale == ("full" if claim.kind == "identity" else "reduced"), claim.id


@pytest.mark.parametrize("profile", PROFILES)
def test_arms_that_are_compared_at_equal_tokens_have_equal_tokens(profile: str) -> None:
    """Before anything runs: `match: {train/tokens: 0.0}` would make a claim not assessable for ever."""
    for claim in (spec := MOE.in_profile(profile)).claims_of(profile):
        assert isinstance(spec, PaperSpec)
        if claim.match.get("train/tokens") != 0.0:
            continue
        sides = [claim.operands] if claim.pattern == "all" else claim.pairs
        for side in sides:
            budgets = [resolve(CellKey(MOE.key, o.ablation or "", o.data, 0, profile)).config["budget"] for o in side]
            assert len({b["max_epochs"] * b["train_samples"] for b in budgets}) == 1, claim.id
