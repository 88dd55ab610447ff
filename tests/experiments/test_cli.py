"""What a person mistypes or lacks is one message with the nearest valid name and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import factory
import pytest
from rich.console import Console

from experiments import cli
from experiments.cell import CONF
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
        ("plan 3 --data mnist --data cifar-10", "unknown data set 'cifar-10' (nearest valid: 'cifar10')"),
        ("plan 3 --profile smal", "unknown profile 'smal' (nearest valid: 'small')"),
        ("report --profile smal", "unknown profile 'smal' (nearest valid: 'small')"),
        ("explain A1.mnist --profile smal", "unknown profile 'smal' (nearest valid: 'small')"),
        ("explain A1.mnits", "there is no claim 'A1.mnits' (nearest valid: 'A1.mnist')"),
        ("plan 3 --trainer gpus", "unknown trainer 'gpus' (nearest valid: 'gpu')"),
        ("reproduce 3 --trainer tpu", "unknown trainer 'tpu'"),
        ("plan tropical_cn", "there is no paper 'tropical_cn' (nearest valid: 'tropical_cnn')"),
        ("plan 3 --only net00", "unknown ablation 'net00' (nearest valid: 'net0"),
        ("plan 3 --only [/x]", "unknown ablation '[/x]'"),
        ("explain [/x]", "there is no claim '[/x]'"),
        ("plan [bold]3", "there is no paper '[bold]3'"),
        ("data mnits", "unknown data set 'mnits' (nearest valid: 'mnist')"),
        ("verify 0000", "no run under"),
        ("diff 0000 [/x]", "no run under"),
        ("sweep 3", "python -m sweeps.grid tropical_cnn NAME"),
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
def test_every_trainer_can_be_chosen_and_names_the_same_cells(fivefold, trainer: str) -> None:
    assert cli._selection("small", None, trainer=trainer).trainer == trainer
    arguments = ("plan", "3", "--profile", "smoke", "--only", "net0", "--data", "mnist")
    assert fivefold(*arguments, "--trainer", trainer) == fivefold(*arguments)


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
