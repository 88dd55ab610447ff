"""What a person mistypes or lacks is one message with the nearest valid name and exit code 2, never a traceback."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import factory
import pytest
from rich.console import Console

from experiments import cli
from experiments.cell import CONF
from experiments.claims import load_paper
from experiments.graph import plan
from experiments.summary import from_shell, print_verdicts


@pytest.fixture
def fivefold(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: returns its exit code and what it said, on both channels."""
    monkeypatch.setattr(cli, "console", Console(width=160, emoji=False))

    def run(*arguments: str) -> tuple[int, str]:
        cli.console.file = sys.stdout
        monkeypatch.setattr(sys, "argv", ["fivefold", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        heard = capsys.readouterr()
        return int(left.value.code or 0), heard.out + heard.err

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("reproduce 3 --data mnits", "unknown data set 'mnits' (nearest valid: 'mnist')"),
        ("reproduce 2 --instead faces=lwf", "unknown data set 'lwf' (nearest valid: 'lfw')"),
        ("plan 2 --instead lfw", "--instead takes OTHER=NAME, such as faces=lfw; got 'lfw'"),
        ("plan 2 --instead face=lfw", "no claim is of data set 'face' (nearest valid: 'faces')"),
        ("reproduce all --instead faces=lfw", "--instead is of one paper's data: name that paper"),
        ("plan 3 --data mnist --data cifar-10", "unknown data set 'cifar-10' (nearest valid: 'cifar10')"),
        ("plan 3 --profile smal", "unknown profile 'smal' (nearest valid: 'small')"),
        ("report --profile smal", "unknown profile 'smal' (nearest valid: 'small')"),
        ("explain A1.mnist --profile smal", "unknown profile 'smal' (nearest valid: 'small')"),
        ("explain A1.mnits", "there is no claim 'A1.mnits' (nearest valid: 'A1.mnist')"),
        ("plan 3 --trainer gpus", "unknown trainer 'gpus' (nearest valid: 'gpu')"),
        ("reproduce 3 --trainer tpu", "unknown trainer 'tpu'"),
        ("plan 1 --model nemotron_15", "unknown model 'nemotron_15' (nearest valid: 'nemotron_15b')"),
        ("reproduce 1 --model GPT-2B", "unknown model 'GPT-2B' (nearest valid: 'gpt_2b')"),
        ("plan 3 --model nano", "tropical_cnn has no other models to choose from"),
        ("plan 3 --profile gpu", "unknown profile 'gpu'"),
        ("plan tropical_cn", "there is no paper 'tropical_cn' (nearest valid: 'tropical_cnn')"),
        ("plan 3 --only net00", "unknown ablation 'net00' (nearest valid: 'net0"),
        ("plan 3 --only [/x]", "unknown ablation '[/x]'"),
        ("explain [/x]", "there is no claim '[/x]'"),
        ("plan [bold]3", "there is no paper '[bold]3'"),
        ("data mnits", "unknown data set 'mnits' (nearest valid: 'mnist')"),
        ("verify 0000", "no run under"),
        ("diff 0000 [/x]", "no run under"),
        ("sweep 3 --space layer_mx", "no search space 'layer_mx' for tropical_cnn (nearest valid: 'layer_mix')"),
    ],
)
def test_what_is_mistyped_is_one_message(fivefold, arguments: str, words: str) -> None:
    code, said = fivefold(*arguments.split())
    assert code == 2
    assert said.startswith("fivefold: ")
    assert words in said
    assert "Traceback" not in said


def test_missing_data_are_one_message(fivefold, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("DATA_ROOT", str(home / "empty"))
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local")
    one_cell = ("reproduce", "3", "--profile", "smoke", "--only", "net0", "--data", "mnist", "--seed", "0")
    code, said = fivefold(*one_cell)
    assert code == 2
    assert "fivefold: MNIST could not be had" in said
    assert "Ways out: " in said
    assert "Traceback" not in said
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "lokal")
    for arguments in (one_cell, ("data",), ("data", "mnist", "--check")):
        code, said = fivefold(*arguments)
        assert code == 2
        assert "fivefold: FIVEFOLD_DATA_SOURCES: unknown way 'lokal'; did you mean 'local'?" in said


def test_looking_for_data_writes_nothing(fivefold, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("DATA_ROOT", str(home / "empty"))
    monkeypatch.delenv("FIVEFOLD_DATA_SOURCES", raising=False)
    code, said = fivefold("data", "--check")
    assert code == 1
    assert "not here" in said
    assert list(home.iterdir()) == []


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "app", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_ctrl_c_is_not_an_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stop)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130


def test_explain_shows_what_stands_in_square_brackets(fivefold) -> None:
    code, said = fivefold("explain", "A1.mnist", "--profile", "smoke")
    assert code == 0
    assert "[abstract]; nets and recipe from [code]" in said


@pytest.mark.parametrize("trainer", sorted(file.stem for file in (CONF / "trainer").glob("*.yaml")))
def test_every_trainer_can_be_chosen_and_names_the_same_cells(home: Path, trainer: str) -> None:
    selection = cli._selection("smoke", 1, only=["scratch_10"], data=["python_stdlib"], trainer=trainer)
    assert selection.trainer == trainer
    found = [plan(load_paper("moe_upcycling"), s, home) for s in (selection, replace(selection, trainer="cpu"))]
    signatures = [[node.cell.signature for node in each.nodes] for each in found]
    assert signatures[0] == signatures[1]
    assert found[0].nodes[0].cell.config["trainer"]["accelerator"] == ("cpu" if trainer.endswith("cpu") else "gpu")


def test_a_model_is_planned_without_its_weights_and_before_its_data_are_here(
    fivefold, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(home / "empty"))
    monkeypatch.setenv("FIVEFOLD_DATA_SOURCES", "local")
    asked = ("plan", "1", "--profile", "paper", "--model", "nemotron_15b", "--only", "e8g8t8_10", "--seed", "0")
    code, said = fivefold(*asked, "--trainer", "fsdp")  # 333 GB of weights, had they been made
    assert code == 0
    assert "wikitext is not on this machine" in said
    assert re.search(r"dense +wikitext +1 +15\.6B", said)
    assert re.search(r"e8g8t8_10 +wikitext +1 +83\.3B", said)
    assert "83.3 billion parameters, of which a token meets 15.6 billion" in said
    assert "94.1 billion FLOPs per training token of 4096" in said
    assert re.search(r"Divided among 2, 4, 8 devices that is [\d.e+]+, [\d.e+]+, [\d.e+]+ GB on each", said)
    assert re.search(r"2 cells to run on 1 processes: about [\d,]+ days", said)


def test_verdicts_are_shown_to_the_letter(tmp_path: Path) -> None:
    console = Console(record=True, width=160, emoji=False)
    verdict = {"id": "A[1]", "verdict": "not assessable", "reason": "[/x] failed: shape [2, 3], see [code] :smile:"}
    print_verdicts(console, factory.paper(), [verdict], tmp_path)
    said = console.export_text()
    assert "A[1]" in said
    assert "[/x] failed: shape [2, 3], see [code] :smile:" in said


def test_commands_are_shown_as_they_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert from_shell("fivefold plan 3") == ".venv/bin/fivefold plan 3"
    for name in ("fivefold", "python"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert from_shell("fivefold plan 3") == "fivefold plan 3"
    assert from_shell("python -m x") == ".venv/bin/python -m x"  # a python on PATH need not be this one
