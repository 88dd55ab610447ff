"""The README says what is true: its table is the committed one, its example files and code work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from experiments.cell import CONF, _compose, resolve
from experiments.cli import app
from experiments.records import CellKey

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def test_its_tables_are_the_committed_ones() -> None:
    shown = re.findall(r"<!-- results:begin (\S+) -->\n(.*?)<!-- results:end -->", TEXT, re.S)
    assert shown
    for file, block in shown:
        table = [line for line in (ROOT / file).read_text().splitlines() if line.startswith("|")]
        assert block.strip().splitlines() == table, f"README.md shows another {file}"


def test_every_file_it_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_every_command_it_names_exists() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"fivefold ([a-z][\w-]*)", TEXT))
    assert named
    assert named <= commands.keys()
    targets = set(re.findall(r"^([a-z-]+?)(?:-%)?:", (ROOT / "Makefile").read_text(), re.M))
    asked = {
        re.sub(r"-\d$", "", name) for name in re.findall(r"make ([a-z0-9-]+)", " ".join(re.findall(r"`[^`]*`", TEXT)))
    }
    assert asked
    assert asked <= targets


def test_its_ablation_file_composes_to_what_it_says(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "ablation/tropical_cnn/net1_width12.yaml").write_text(example)
    try:
        cell = resolve(CellKey("tropical_cnn", "net1_width12", "mnist", 0, "small"), conf)
    finally:
        _compose.cache_clear()
    assert cell.config["net"]["width"] == 12
    assert cell.config["net"]["layer1"] == "MinP-S"


def test_its_code_runs() -> None:
    example, blur = blocks("python")
    names: dict = {}
    exec(blur, names)
    assert names["blurred"].shape == names["sharp"].shape
    assert torch.allclose(names["kernels"].sum((1, 2)), torch.ones(4), atol=1e-6)
    names = {}
    exec(example, names)
    logits = names["net"](torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in names["net"].parameters())


@pytest.mark.parametrize("word", ["reproduced", "not reproduced", "inconclusive", "not assessable"])
def test_it_explains_every_verdict(word: str) -> None:
    assert f"| {word} |" in TEXT
