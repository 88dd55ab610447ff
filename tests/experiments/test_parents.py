"""A cell that starts from another's weights: its signature, what is refused, and who waits for whom. Nothing is trained."""

from __future__ import annotations

import io
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from datamodules import catalogue, text
from experiments import graph, reproduce, run
from experiments.cell import CONF, Cell, _data_sha256, resolve
from experiments.claims import load_paper
from experiments.executors import Finished, Job
from experiments.graph import Selection, keys_for, plan
from experiments.records import CellKey
from experiments.reproduce import Places, Reproduction
from experiments.schema import ConfigError
from experiments.store import Index, cell_lock, read_json, write_json

SPEC = load_paper("moe_upcycling")
CHILD = CellKey("moe_upcycling", "e8g1t1_10", "python_stdlib", 0, "smoke")
HEAD = "# @package _global_\n# a test\ndefaults:\n  - /ablation/moe_upcycling/dense_10\n  - _self_\n"


def _conf(folder: Path, **bodies: str) -> Path:
    """A copy of the configuration with more ablations, each a difference from dense_10, whose parent is dense."""
    conf = shutil.copytree(CONF, folder / "conf")
    for name, body in bodies.items():
        (conf / f"ablation/moe_upcycling/{name}.yaml").write_text(HEAD + body)
    return conf


def _parent(name: str) -> str:
    return f"parent: {{ablation: {name}}}\n"


def _edited(folder: Path, ablation: str, change: Callable[[str], str]) -> Path:
    conf = _conf(folder)
    file = conf / f"ablation/moe_upcycling/{ablation}.yaml"
    file.write_text(change(file.read_text()))
    return conf


def test_a_parent_is_the_cell_of_the_same_data_seed_and_profile() -> None:
    child = resolve(replace(CHILD, seed=3))
    assert child.parent is not None
    assert child.parent.key == replace(child.key, ablation="dense")
    assert child.parent.signature == resolve(replace(CHILD, ablation="dense", seed=3)).signature
    assert child.parent.parent is None
    assert resolve(replace(CHILD, ablation="scratch_10")).parent is None


def test_a_signature_changes_with_the_parents_configuration_and_not_otherwise(tmp_path: Path) -> None:
    base = resolve(CHILD)
    rate = _edited(tmp_path / "rate", "dense", lambda body: body + "optim: {optimizer: {lr: 0.004}}\n")
    other = resolve(CHILD, rate)
    assert other.hashed == base.hashed  # the child's own configuration is the same
    assert other.signature != base.signature
    assert (
        resolve(replace(CHILD, ablation="scratch_10"), rate).signature
        == resolve(replace(CHILD, ablation="scratch_10")).signature
    )
    comment = _edited(tmp_path / "comment", "dense", lambda body: body.replace("# The dense parent", "# The parent"))
    sibling = _edited(tmp_path / "sibling", "e8g1t2_10", lambda body: body + "module: {balance: 0.5}\n")
    assert resolve(CHILD, comment).signature == resolve(CHILD, sibling).signature == base.signature
    assert resolve(CHILD, trainer="ddp").signature == base.signature
    assert resolve(replace(CHILD, seed=1)).signature != base.signature


def test_a_signature_changes_with_a_grandparent_and_with_who_the_parent_is(tmp_path: Path) -> None:
    key = replace(CHILD, ablation="third")
    rate = "optim: {optimizer: {lr: 0.004}}\n"
    cases = {
        "plain": _conf(tmp_path / "a", second="", third=_parent("second")),
        "older": _conf(tmp_path / "b", second="", third=_parent("second")),
        "other": _conf(tmp_path / "c", second="", third=_parent("dense")),
        "same": _conf(tmp_path / "d", second="", third=_parent("second"), fourth=rate),
    }
    file = cases["older"] / "ablation/moe_upcycling/dense.yaml"
    file.write_text(file.read_text() + rate)
    signatures = {name: resolve(key, conf).signature for name, conf in cases.items()}
    assert signatures["plain"] == signatures["same"]
    assert len(set(signatures.values())) == 3


def test_a_signature_changes_with_the_content_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolve(CHILD).signature
    sha = text.content_sha256("python_stdlib")
    assert _data_sha256("python_stdlib") == sha == catalogue.content_sha256("python_stdlib")
    monkeypatch.setattr(text, "content_sha256", lambda name: "0" * 64)
    assert resolve(CHILD).signature != before


def test_the_catalogue_knows_texts_images_and_functions_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    card = catalogue.card_of("python_stdlib", fetch=False)
    assert card.name.startswith("Python standard library sources")
    assert (card.real, card.sha256) == (True, text.content_sha256("python_stdlib"))
    assert catalogue.card_of("sine_1d").real is False
    assert catalogue.content_sha256("sine_1d") == catalogue.card_of("sine_1d").sha256
    asked: list[tuple] = []
    monkeypatch.setattr(catalogue.text, "text_card", lambda *given: asked.append(given) or card)
    catalogue.card_of("eltec_eng", fetch=False)
    assert asked == [("eltec_eng", False)]
    with pytest.raises(ValueError, match="python_stdlib"):
        catalogue.card_of("python_stdlibb")


@pytest.mark.parametrize(
    ("bodies", "start", "chain"),
    [
        ({"a": _parent("a")}, "a", "a <- a"),
        ({"a": _parent("b"), "b": _parent("a")}, "a", "a <- b <- a"),
        ({"a": _parent("b"), "b": _parent("c"), "c": _parent("b")}, "a", "a <- b <- c <- b"),
    ],
)
def test_an_ablation_cannot_descend_from_itself(bodies: dict, start: str, chain: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{chain}: an ablation cannot descend from itself"):
        resolve(replace(CHILD, ablation=start), _conf(tmp_path, **bodies))


def test_an_unknown_parent_is_refused_with_the_nearest_also_a_generation_up(tmp_path: Path) -> None:
    conf = _conf(tmp_path, near=_parent("dens"), far=_parent("near"))
    for name in ("near", "far"):
        with pytest.raises(ConfigError, match=r"unknown ablation 'dens' \(nearest valid: 'dense'\)"):
            resolve(replace(CHILD, ablation=name), conf)


def _with(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (graph, reproduce):
        monkeypatch.setattr(module, "resolve", partial(resolve, conf=conf))
    monkeypatch.setattr(graph, "ablations", lambda paper: [f.stem for f in (conf / "ablation" / paper).glob("*.yaml")])


def test_parents_come_before_their_children_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(_conf(tmp_path, second="", third=_parent("second")), monkeypatch)
    asked = Selection("smoke", seed=(4, 7), only=("third", "scratch_10", "second"))
    keys = keys_for(SPEC, asked)
    assert [key.seed for key in keys] == [4] * 4 + [7] * 4
    names = [key.ablation for key in keys[:4]]
    assert sorted(names) == ["dense", "scratch_10", "second", "third"]  # each once, the parents unasked
    assert names.index("dense") < names.index("second") < names.index("third")
    assert {key.data for key in keys} == {"python_stdlib"}  # of the paper's first claim
    assert [k.ablation for k in keys_for(SPEC, Selection("smoke", only=("dense",)))] == ["dense"]


@pytest.mark.parametrize("profile", ["smoke", "small", "gpu", "paper"])
def test_every_cell_of_a_profile_comes_after_its_parent(profile: str) -> None:
    spec = SPEC.in_profile(profile)
    order = [(key.ablation, key.data) for key in keys_for(spec, Selection(profile, seed=(0,)))]
    assert len(order) == len(set(order))
    assert set(spec.required(profile)) <= set(order)
    for at, (ablation, data) in enumerate(order):
        parent = resolve(CellKey(SPEC.key, ablation, data, 0, profile)).config["parent"]
        assert parent is None or (parent["ablation"], data) in order[:at]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("scale: papr", ["parent.inherit.scale", "'papr'"]),
        ("reinit: 2.0", ["parent.inherit.reinit", "2.0"]),
        ("permut: true", ["parent.inherit.permut", "unknown key", "'permute'"]),
        ("permute: 1", ["parent.inherit.permute", "true or false"]),
    ],
)
def test_what_carries_weights_over_is_built_before_anything_runs(
    body: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = _conf(tmp_path, odd="")
    file = conf / "ablation/moe_upcycling/odd.yaml"
    file.write_text(HEAD.replace("dense_10", "e8g1t1_10") + f"parent: {{inherit: {{{body}}}}}\n")
    _with(conf, monkeypatch)
    with pytest.raises(ConfigError) as error:
        plan(SPEC, Selection("smoke", only=("odd",)), tmp_path / "runs")
    for word in words:
        assert word in str(error.value)


class _Pool:
    """Finishes one job at a time, as it is told to: "done" unless `outcomes` has another word for the ablation."""

    def __init__(self, runs: Path, outcomes: dict[str, list[str]], meanwhile: Callable[[str], None]) -> None:
        self.runs, self.outcomes, self.meanwhile = runs, outcomes, meanwhile
        self.queue: list[Cell] = []
        self.idle = 0
        self.log: list[str] = []  # "+ablation" submitted, "-ablation outcome" over

    def submit(self, job: Job) -> str:
        self.log.append(f"+{job.cell.key.ablation}")
        self.queue.append(job.cell)
        return job.cell.signature

    def poll(self, timeout_s: float) -> list[Finished]:
        if not self.queue:
            self.idle += 1
            assert self.idle < 50, f"nobody is started any more: {self.log}"
            self.meanwhile("idle")
            return []
        cell = self.queue.pop(0)
        name = cell.key.ablation
        outcome = (self.outcomes.get(name) or ["done"]).pop(0)
        folder = self.runs / cell.signature
        if outcome != "busy":
            word = {"done": "done.json", "failed": "failed.json"}[outcome]
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "manifest.json", {**vars(cell.key), "signature": cell.signature})
            write_json(folder / word, {"seconds": 1.0, "error": "FloatingPointError: nan"})
        self.log.append(f"-{name} {outcome}")
        return [Finished(cell.signature, outcome)]  # type: ignore[arg-type]

    def close(self) -> None:
        pass


def _executed(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    only: tuple[str, ...],
    outcomes: dict[str, list[str]] | None = None,
    meanwhile: Callable[[str], None] = lambda _: None,
):
    """Run a selection with the pool above: what it did, what failed, and what was said."""
    pool = _Pool(folder / "runs", outcomes or {}, meanwhile)
    monkeypatch.setattr(reproduce, "LocalPool", lambda jobs: pool)
    for name in ("_fetch_data", "_end_parents"):
        monkeypatch.setattr(Reproduction, name, lambda *_: None)
    monkeypatch.setattr(Reproduction, "_parents", lambda *_: defaultdict(lambda: ("", "")))
    console = Console(file=io.StringIO(), width=200)
    asked = Selection("smoke", only=only)
    made = Reproduction(SPEC, asked, Places(folder / "runs", folder / "results"), console, jobs=1)
    failed = made._execute(plan(SPEC, asked, folder / "runs"), jobs=1)
    return pool.log, sorted(node.cell.key.ablation for node in failed), console.file.getvalue()


def _records(folder: Path, only: tuple[str, ...]) -> dict:
    index = Index.scan(folder / "runs")
    nodes = plan(SPEC, Selection("smoke", only=only), folder / "runs").nodes
    return {n.cell.key.ablation: index.record(n.cell.key, n.cell.signature) for n in nodes}


def test_heirs_start_when_their_parent_is_done_and_others_at_once(tmp_path: Path, monkeypatch) -> None:
    _with(_conf(tmp_path, second="", third=_parent("second")), monkeypatch)
    log, failed, _ = _executed(tmp_path, monkeypatch, ("third", "e8g1t1_10", "scratch_10"))
    assert failed == []
    assert set(log[:2]) == {"+dense", "+scratch_10"}
    for parent, child in (("dense", "second"), ("dense", "e8g1t1_10"), ("second", "third")):
        assert log.index(f"-{parent} done") < log.index(f"+{child}")
    assert sorted(word for word in log if word[0] == "+") == sorted(
        f"+{name}" for name in ("dense", "second", "third", "e8g1t1_10", "scratch_10")
    )
    again, failed, _ = _executed(tmp_path, monkeypatch, ("third", "e8g1t1_10", "e8g1t2_10"))
    assert (again, failed) == (["+e8g1t2_10", "-e8g1t2_10 done"], [])  # the parent is done: nobody waits


def test_heirs_of_a_failed_parent_are_failed_with_the_reason_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    _with(_conf(tmp_path, second="", third=_parent("second")), monkeypatch)
    only = ("third", "e8g1t1_10", "scratch_10")
    log, failed, said = _executed(tmp_path, monkeypatch, only, {"dense": ["failed"]})
    assert failed == ["dense", "e8g1t1_10", "second", "third"]
    assert sorted(word for word in log if word[0] == "+") == ["+dense", "+scratch_10"]
    records = _records(tmp_path, only)
    assert records["scratch_10"].state == "done"
    assert records["dense"].error == "FloatingPointError: nan"
    for heir, parent in (("e8g1t1_10", "dense"), ("second", "dense"), ("third", "second")):
        assert records[heir].state == "failed"
        assert records[heir].error == f"its parent failed: moe_upcycling/{parent} on python_stdlib, seed 0 (smoke)"
        assert records[heir].manifest["ablation"] == heir
    assert said.count(" failed moe_upcycling/") == 4
    mended, failed, _ = _executed(tmp_path, monkeypatch, only)
    assert failed == []
    assert [word for word in mended if word[0] == "+"].index("+dense") == 0
    assert "+third" in mended


def test_heirs_wait_for_a_parent_that_another_command_runs(tmp_path: Path, monkeypatch) -> None:
    parent = resolve(replace(CHILD, ablation="dense"))
    folder = tmp_path / "runs" / parent.signature
    steps: list[str] = []

    def elsewhere(_: str) -> None:
        steps.append("looked")
        if len(steps) == 3:
            write_json(folder / "manifest.json", {**vars(parent.key), "signature": parent.signature})
            write_json(folder / "done.json", {"seconds": 1.0})

    folder.mkdir(parents=True)
    with cell_lock(folder):
        log, failed, _ = _executed(tmp_path, monkeypatch, ("e8g1t1_10",), {"dense": ["busy"]}, elsewhere)
    assert failed == []
    assert log == ["+dense", "-dense busy", "+e8g1t1_10", "-e8g1t1_10 done"]
    assert len(steps) >= 3


def test_a_parent_that_another_command_lets_go_of_is_run_here(tmp_path: Path, monkeypatch) -> None:
    log, failed, _ = _executed(tmp_path, monkeypatch, ("e8g1t1_10",), {"dense": ["busy", "done"]})
    assert failed == []
    assert log == ["+dense", "-dense busy", "+dense", "-dense done", "+e8g1t1_10", "-e8g1t1_10 done"]
    lost, failed, _ = _executed(tmp_path / "x", monkeypatch, ("e8g1t1_10",), {"dense": ["busy", "failed"]})
    assert failed == ["dense", "e8g1t1_10"]
    assert "+e8g1t1_10" not in lost
    left = resolve(CHILD).signature
    assert "its parent failed" in json.loads((tmp_path / "x" / "runs" / left / "failed.json").read_text())["error"]


def test_a_parent_that_fails_inside_its_childs_run_is_named_in_the_childs_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = resolve(CHILD)
    assert child.parent is not None
    parent = child.parent.signature

    def execute(ran: Cell, *_: object) -> None:
        raise ValueError("no memory" if ran.signature == parent else "the child must not start")

    monkeypatch.setattr(run, "_execute", execute)
    with pytest.raises(run.ParentFailed, match=r"dense .*no memory"):
        run.run_cell(child, tmp_path)
    parents, childs = (read_json(tmp_path / c.signature / "failed.json")["error"] for c in (child.parent, child))
    assert parents == "ValueError: no memory"
    assert "its parent" in childs
    assert "no memory" in childs
