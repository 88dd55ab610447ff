"""`explain`, `verify`, `diff` and `data`: every way in which a run can be damaged is a word in the answer, not a crash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from datamodules.sources import DataUnavailable
from experiments import inspection
from experiments.cell import Cell, resolve
from experiments.errors import UserError
from experiments.inspection import diff_runs, explain_claim, find_run, show_data, verify_run
from experiments.records import CellKey
from experiments.reproduce import Places
from experiments.run import run_cell, weights_sha256
from experiments.store import write_json

TRAINED = CellKey("tropical_cnn", "net0", "mnist", 0, "smoke")
CONSTRUCTION = CellKey("min_max_plus", "cone1", "sine_1d", 0, "smoke")
STATE = {"net.weight": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=250, emoji=False)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "runs", tmp_path / "results")


def _folder(places: Places, cell: Cell, **manifest: Any) -> Path:
    """A finished run that was never trained: STATE is what it says it ended with."""
    folder = places.runs / cell.signature
    card = {"name": "MNIST", "sha256": "c" * 64}
    identity = {**vars(cell.key), "commit": "a" * 40, "created": "then", "data_cards": [card], **manifest}
    write_json(folder / "manifest.json", identity)
    write_json(folder / "metrics.json", {"test/acc": 90.0})
    write_json(folder / "done.json", {"weights_sha256": weights_sha256(STATE), "seconds": 1.0, "finished": "then"})
    (folder / "config.yaml").write_text(yaml.safe_dump(cell.hashed, sort_keys=False))
    torch.save({"state_dict": STATE}, folder / "last.ckpt")
    return folder


def _verify(console: Console, places: Places, run: str, rerun: bool = False) -> tuple[bool, str]:
    return verify_run(console, run, places, rerun), console.export_text()


def test_a_whole_run_is_all_right(console: Console, places: Places) -> None:
    cell = resolve(TRAINED)
    _folder(places, cell)
    good, said = _verify(console, places, cell.signature[:8])
    assert good
    assert "DIFFERS" not in said
    assert said.count("\nok ") == 3


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "half", "no state", "other weights"])
def test_damaged_weights_differ_and_do_not_crash(console: Console, places: Places, damage: str) -> None:
    cell = resolve(TRAINED)
    file = _folder(places, cell) / "last.ckpt"
    raw = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage in ("empty", "text", "half"):
        file.write_bytes({"empty": b"", "text": b"not a checkpoint", "half": raw[: len(raw) // 2]}[damage])
    else:
        torch.save({} if damage == "no state" else {"state_dict": {"net.weight": torch.zeros(2, 3)}}, file)
    good, said = _verify(console, places, cell.signature)
    assert not good
    word = {"missing": "is missing", "other weights": weights_sha256({"net.weight": torch.zeros(2, 3)})[:16]}
    line = next(line for line in said.splitlines() if "weights on disk" in line)
    assert line.startswith("DIFFERS")
    assert word.get(damage, "is damaged") in line


@pytest.mark.parametrize("damage", ["missing", "not yaml"])
def test_a_damaged_configuration_differs(console: Console, places: Places, damage: str) -> None:
    cell = resolve(TRAINED)
    file = _folder(places, cell) / "config.yaml"
    file.unlink() if damage == "missing" else file.write_text("a: [1, }")
    good, said = _verify(console, places, cell.signature)
    assert not good
    assert "stored configuration: config.yaml is missing or damaged" in said


def test_a_construction_is_built_again_since_nothing_was_trained(console: Console, places: Places) -> None:
    """It has no checkpoint; its weights are those of the net as it was built, and running it again gives them too."""
    cell = resolve(CONSTRUCTION)
    assert cell.config["budget"]["max_epochs"] == 0
    record = run_cell(cell, places.runs)
    assert not (record.path / "last.ckpt").exists()
    good, said = _verify(console, places, cell.signature, rerun=True)
    assert good, said
    assert "nothing was trained" in said
    assert "agree to the last digit" in said
    write_json(record.path / "done.json", record.done | {"weights_sha256": "0" * 64})
    good, said = _verify(console, places, cell.signature)
    assert not good
    assert "DIFFERS     weights: " in said


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (replace(TRAINED, ablation="net0_gone"), "unknown ablation 'net0_gone' (nearest valid: 'net0"),
        (replace(TRAINED, profile="huge"), "unknown profile 'huge'"),
        (replace(TRAINED, data="mnist_gone"), "unknown data 'mnist_gone' (nearest valid: 'mnist')"),
    ],
)
def test_a_run_whose_cell_is_no_more_says_so(console: Console, places: Places, key: CellKey, words: str) -> None:
    _folder(places, resolve(TRAINED), **vars(key))
    good, said = _verify(console, places, resolve(TRAINED).signature, rerun=True)
    assert not good
    assert "can no longer be composed: " in said
    assert words in said
    assert "ok          weights on disk" in said
    assert "not checked running it again: there is no such cell any more" in said


def test_another_signature_is_told_with_the_command_that_runs_the_cell_as_it_is(
    console: Console, places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cell = resolve(TRAINED)
    _folder(places, cell).rename(places.runs / ("0" * 20))
    monkeypatch.setenv("PATH", str(tmp_path))
    good, said = _verify(console, places, "000")
    assert not good
    assert f"today's signature {cell.signature}" in said
    assert f": .venv/bin/{cell.command}\n" in said


def test_a_second_run_that_fails_differs_and_missing_data_is_told(
    console: Console, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = resolve(TRAINED)
    _folder(places, cell)

    def fails(error: Exception) -> Any:
        def run(*_: object) -> None:
            raise error

        return run

    monkeypatch.setattr("experiments.run.run_cell", fails(RuntimeError("out of [memory]\nsecond line")))
    good, said = _verify(console, places, cell.signature, rerun=True)
    assert not good
    assert "DIFFERS     running it again: it failed (RuntimeError: out of [memory])" in said
    monkeypatch.setattr("experiments.run.run_cell", fails(DataUnavailable("no way")))
    with pytest.raises(DataUnavailable):
        verify_run(console, cell.signature, places, True)


def test_a_damaged_folder_hides_no_other_run(places: Places) -> None:
    cell = resolve(TRAINED)
    _folder(places, cell)
    for name, text in (("broken", "{"), ("empty", '{"paper": "x"}')):
        (places.runs / name).mkdir()
        (places.runs / name / "manifest.json").write_text(text)
    assert find_run(cell.signature[:6], places.runs).key == TRAINED
    with pytest.raises(UserError, match="no run under"):
        find_run("broken", places.runs)


def test_two_runs_that_differ_in_code_alone_are_told_so(console: Console, places: Places) -> None:
    cell = resolve(TRAINED)
    _folder(places, cell).rename(places.runs / ("1" * 20))
    folder = _folder(places, cell, commit="b" * 40, created="later")
    done = json.loads((folder / "done.json").read_text())
    write_json(folder / "done.json", done | {"finished": "later"})
    diff_runs(console, "111", cell.signature, places)
    said = console.export_text()
    assert "Code: it differs" in said
    assert f"commits {'a' * 12}, {'b' * 12}" in said
    assert "manifest.commit" in said
    assert "created" not in said
    assert "finished" not in said


def test_what_is_not_told_of_the_code_is_not_claimed(console: Console, places: Places) -> None:
    one, other = resolve(TRAINED), resolve(replace(TRAINED, seed=1))
    _folder(places, one)
    _folder(places, other)
    diff_runs(console, one.signature, other.signature, places)
    said = console.export_text()
    assert "Code: not told" in said
    assert "config.seed" in said
    diff_runs(console, one.signature, one.signature, places)
    assert "agree in configuration, code, data" in console.export_text()


def test_square_brackets_of_claims_are_shown(console: Console, places: Places) -> None:
    explain_claim(console, "A1.mnist", places, "smoke", None)
    said = console.export_text()
    assert "[abstract]; nets and recipe from [code]" in said


def test_data_are_listed_by_name_generated_ones_too(
    console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "[none]"))
    monkeypatch.delenv("FIVEFOLD_DATA_SOURCES", raising=False)
    assert show_data(console, ["sine_1d"], check=True)
    assert "synthetic" in console.export_text()
    assert not show_data(console, ["mnist"], check=True)
    said = console.export_text()
    assert "not here" in said
    assert "[none]" in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_foreign_is_read_as_markup(console: Console) -> None:
    inspection._Checks(console).add("name", True, "[/x] and [bold]")
    assert "[/x] and [bold]" in console.export_text()
