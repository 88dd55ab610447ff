"""What planning keeps is used for the very same input and for nothing else."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import cell, memo, prices, sources_digest
from experiments.cell import CONF, resolve
from experiments.claims import load_paper
from experiments.graph import Selection, plan
from experiments.records import CellKey

KEY = CellKey("moe_upcycling", "e8g8t8_10", "python_stdlib", 0, "smoke")


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONF, tmp_path / "conf"))


def _digest(conf: Path, paper: str = KEY.paper, ablation: str = KEY.ablation) -> str | None:
    memo._texts.cache_clear()
    return memo.digest_of_conf(conf, paper, ablation)


def test_what_is_kept_is_for_its_inputs_only(home: Path) -> None:
    assert memo.recall("kind", "name", "a") is None
    memo.keep("kind", "name", "a", {"x": [1, None, 0.5]})
    assert memo.recall("kind", "name", "a") == {"x": [1, None, 0.5]}
    assert memo.recall("kind", "name", "b") is None
    assert memo.recall("kind", "other", "a") is None
    memo.keep("kind", "name", "b", 2)  # in its place
    assert memo.recall("kind", "name", "a") is None
    (file,) = home.rglob("*.json")
    assert home / "runs" in file.parents
    for damaged in ("", "[]", '{"inputs": "b"}', '{"inputs": "b", "value'):
        file.write_text(damaged)
        assert memo.recall("kind", "name", "b") is None


def test_what_json_would_change_is_not_kept(home: Path) -> None:
    for value in ({1: 2}, (1, 2), float("nan")):
        memo.keep("kind", "name", "a", value)
        assert memo.recall("kind", "name", "a") is None


@pytest.mark.parametrize(
    "file",
    [
        "config.yaml",
        "paper/moe_upcycling.yaml",
        "data/python_stdlib.yaml",
        "profile/moe_upcycling/smoke.yaml",
        "model/moe_upcycling/nano.yaml",
        "optim/moe_upcycling/reset.yaml",
        "trainer/cpu.yaml",
        "ablation/moe_upcycling/e8g8t8_10.yaml",
        "ablation/moe_upcycling/e8g1t1_10.yaml",  # what it is a difference from
        "ablation/moe_upcycling/dense.yaml",  # its parent
    ],
)
def test_every_file_that_a_configuration_comes_from_counts(file: str, conf: Path) -> None:
    before = _digest(conf)
    (conf / file).write_text((conf / file).read_text() + "\n# a word\n")
    assert _digest(conf) != before


@pytest.mark.parametrize("file", ["ablation/moe_upcycling/scratch_10.yaml", "ablation/tropical_cnn/net0.yaml"])
def test_a_file_that_it_does_not_come_from_does_not(file: str, conf: Path) -> None:
    before = _digest(conf)
    (conf / file).write_text("x: 1\n")
    assert _digest(conf) == before


def test_a_file_that_comes_or_goes_counts(conf: Path) -> None:
    before = _digest(conf)
    (conf / "data/new.yaml").write_text("x: 1\n")
    assert _digest(conf) != before
    (conf / "data/new.yaml").unlink()
    assert _digest(conf) == before


def test_what_depends_on_the_machine_is_never_kept(conf: Path) -> None:
    (conf / "data/python_stdlib.yaml").write_text("x: ${oc.env:HOME}\n")
    assert _digest(conf) is None


def test_a_configuration_that_was_kept_is_the_composed_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell._template.cache_clear()
    first = resolve(KEY).config
    cell._template.cache_clear()
    monkeypatch.setattr(cell, "_resolved", None)  # would fail if it were composed again
    for seed in (0, 5):
        again = resolve(replace(KEY, seed=seed)).config
        assert list(again) == list(first)
        assert again == {**first, "seed": seed, "datamodule": {**first["datamodule"], "seed": seed}}
    cell._template.cache_clear()


def test_a_price_is_of_the_code_and_the_configuration(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, built = load_paper(KEY.paper), []
    build = prices._dry_build
    monkeypatch.setattr(prices, "_dry_build", lambda config: built.append(1) or build(config))
    asked = Selection("smoke", seed=(0,), only=("scratch_10",))
    first, again = (plan(spec, asked, home / "runs").nodes[0] for _ in range(2))
    assert first.cost == again.cost
    assert len(built) == 1
    monkeypatch.setattr(prices, "digest", lambda files: "of other code")
    assert plan(spec, asked, home / "runs").nodes[0].cost == first.cost
    assert len(built) == 2
    plan(spec, replace(asked, model="micro"), home / "runs")
    assert len(built) == 3


def test_what_cannot_run_is_refused_every_time(home: Path) -> None:
    asked = Selection("smoke", seed=(0,), only=("scratch_10",))
    broken = replace(load_paper(KEY.paper), metrics={})
    config = resolve(KEY).config
    for _ in range(2):
        with pytest.raises(prices.ConfigError, match="nothing logs 'val/nothing'"):
            prices._check_and_price({**config, "selection": {"monitor": "val/nothing"}}, set(), "here")
    assert plan(broken, asked, home / "runs").nodes  # the module's own word for what it logs is enough


def test_the_closure_of_a_process_follows_every_edit(tmp_path: Path) -> None:
    package = tmp_path / "lit_modules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from lit_modules import b\nfrom lit_modules.sub import d\n")
    (package / "b.py").write_text("")

    def found() -> list[str]:
        files = sources_digest.closure(["lit_modules.a.f"], tmp_path)
        return [file.relative_to(package).as_posix() for file in files]

    assert found() == found() == ["__init__.py", "a.py", "b.py"]
    (package / "b.py").write_text("from lit_modules import c\n")
    (package / "c.py").write_text("")
    assert found() == ["__init__.py", "a.py", "b.py", "c.py"]
    time.sleep(0.05)  # a folder's stamp is as fine as the kernel's clock
    (package / "sub").mkdir()  # which a.py has named all along
    (package / "sub" / "__init__.py").write_text("")
    assert found() == ["a.py", "b.py", "c.py", "sub/__init__.py"]
    time.sleep(0.05)
    (package / "sub" / "d.py").write_text("")
    assert found() == ["a.py", "b.py", "c.py", "sub/d.py"]
    (package / "c.py").unlink()
    assert "c.py" not in found()


def test_a_memo_names_what_it_is_of(home: Path) -> None:
    memo.keep("conf", "one|two", "a", 1)
    (file,) = home.rglob("*.json")
    assert json.loads(file.read_text())["name"] == "one|two"
