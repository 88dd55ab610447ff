"""What planning has worked out before, kept under runs/.cache and trusted only for the very same input.

Composing a configuration, and importing and building what it names, takes seconds and depends on nothing but files; so each
answer is kept beside the digest of all that it was made from. An answer to anything else is worked out again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from experiments.sources_digest import ROOT

INPUTS_OF_MACHINE = ("${oc.env", "${now:", "${hydra:")  # what a configuration could read that is in no file


def recall(kind: str, name: str, inputs: str) -> Any:
    """Return what was kept under this name for these inputs, or None."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(_file(kind, name).read_text())
        return kept["value"] if kept["inputs"] == inputs else None
    return None


def keep(kind: str, name: str, inputs: str, value: Any) -> None:
    """Keep a value of plain containers in the place of what was there; nothing is kept that JSON would change, or where
    nothing can be written.
    """
    text, file = json.dumps({"name": name, "inputs": inputs, "value": value}), _file(kind, name)
    making = file.with_name(f".{file.stem}.{os.getpid()}.tmp")
    with suppress(OSError):
        if json.loads(text)["value"] == value:
            file.parent.mkdir(parents=True, exist_ok=True)
            making.write_text(text)  # not flushed to disk: what is lost in a crash is worked out again
            making.replace(file)


def _file(kind: str, name: str) -> Path:
    home = Path(os.environ.get("FIVEFOLD_HOME", ROOT)).resolve()
    return home / "runs" / ".cache" / kind / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.json"


def digest_of_conf(conf: Path, paper: str, ablation: str) -> str | None:
    """Return a digest of all files that this ablation's configuration can be composed of, and of what composes them; None
    where it would also depend on the machine.

    Of the ablations those count that it, or one of those, names anywhere; of all other groups every file that is not another
    paper's.
    """
    texts, wanted, waiting = _texts(conf, paper), set[str](), [ablation]
    folder = f"ablation/{paper}/"
    while waiting:
        name = waiting.pop()
        if name not in wanted and f"{folder}{name}.yaml" in texts:
            wanted.add(name)
            waiting += re.findall(r"\w+", texts[f"{folder}{name}.yaml"])
    taken = [n for n in texts if not n.startswith(folder) or n.removeprefix(folder).removesuffix(".yaml") in wanted]
    if any(word in texts[name] for name in taken for word in INPUTS_OF_MACHINE):
        return None
    return hashlib.sha256(json.dumps([_versions(), [(name, texts[name]) for name in taken]]).encode()).hexdigest()


@cache
def _texts(conf: Path, paper: str) -> dict[str, str]:
    """The files of conf/ but those of other papers, as this process first sees them, by their path."""
    others = {folder.name for folder in (conf / "ablation").iterdir()} - {paper}
    paths = {file.relative_to(conf): file for file in sorted(conf.rglob("*.yaml"))}
    return {path.as_posix(): file.read_text() for path, file in paths.items() if not others & set(path.parts)}


@cache
def _versions() -> str:
    from importlib.metadata import version

    code = (Path(__file__).with_name("cell.py")).read_text()
    return json.dumps([version("hydra-core"), version("omegaconf"), code])
