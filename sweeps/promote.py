"""The best configuration as an ablation file, ready to be reproduced, claimed about and searched from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.cell import CONF, ablations, resolve
from experiments.errors import UserError
from experiments.records import CellKey
from experiments.store import write_atomically
from sweeps.finals import Final
from sweeps.space import Space

LINES = 30  # of an ablation file, at most
WIDTH = 116


def ablation_text(space: Space, final: Final, header: str) -> str:
    """Return the YAML of an ablation: its parent's name and what the search changed."""
    changed = space.chosen(final.values) if final.values is not None else {}
    tree: dict[str, Any] = {}
    for path, value in {**space.report.settings, **changed}.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    lines = ["# @package _global_", *(f"# {line}" for line in textwrap.wrap(header, WIDTH))]
    lines += ["defaults:", f"  - /ablation/{space.paper}/{space.ablation}", "  - _self_", ""]
    for name, body in tree.items():
        lines.append(yaml.safe_dump({name: body}, default_flow_style=None, width=1000, sort_keys=False).rstrip())
    return "\n".join(lines) + "\n"


def header_of(space: Space, final: Final, study: str) -> str:
    """Return the words above a promoted ablation."""
    score = f"{space.objectives[0].metric} {final.tuning:.5g} there" if final.tuning is not None else "not scored there"
    return (
        f"Chosen by the sweep {space.name} (study {study}, profile {space.profile}, seeds "
        f"{', '.join(map(str, space.seeds))}; {score}). Feeds no claim."
    )


def promote(space: Space, final: Final, name: str, study: str, conf: Path = CONF) -> Path:
    """Write conf/ablation/<paper>/<name>.yaml and return it: it resolves to the very configuration that was chosen.

    Raises:
        UserError: a name that is taken or none, or a choice that does not fit in an ablation file.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--promote '{name}': an ablation's name is small letters, digits and _")
    file = conf / "ablation" / space.paper / f"{name}.yaml"
    if name in ablations(space.paper, conf):
        raise UserError(f"--promote '{name}': there is an ablation of this name already; choose another")
    text = ablation_text(space, final, header_of(space, final, study))
    if len(text.splitlines()) > LINES:
        raise UserError(
            f"--promote '{name}': {len(text.splitlines())} lines are more than the {LINES} of an ablation file"
        )
    write_atomically(file, text)
    try:
        _check(space, final, name, conf)
    except Exception:
        file.unlink()
        raise
    return file


def _check(space: Space, final: Final, name: str, conf: Path) -> None:
    seed = space.report.seeds[0]
    wanted: Mapping[str, Any] = space.cell(final.values, seed, space.report.settings).hashed
    found = resolve(CellKey(space.paper, name, space.data, seed, space.profile), conf).hashed
    if found != wanted:
        differ = sorted(key for key in wanted if found.get(key) != wanted[key])
        raise UserError(f"--promote '{name}': as a file the choice comes out otherwise in {', '.join(differ)}")
