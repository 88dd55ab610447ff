"""Traced graphs kept in files, one per workload, arguments, torch version and source of the front end."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from datamodules import sources
from datamodules.planning.graph import Graph, GraphError

FRONT_END = "assemble decompose flops graph opaque recorder simplify trace workloads*"


def kept(stem: str, arguments: Mapping[str, Any], make: Callable[[], Graph], folder: Path | None = None) -> Graph:
    """Return a graph from its file, or make and write it; a damaged file is made again.

    Args:
        stem: first part of the file's name.
        arguments: all that decides the graph besides the code, JSON values.
        folder: where files are; None for plan_graphs beside the data sets.
    """
    folder = folder or sources.cache_root() / "plan_graphs"
    key = json.dumps([stem, arguments, _versions()], sort_keys=True)
    file = folder / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json.gz"
    if (there := _read(file)) is not None:
        return there
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if (there := _read(file)) is None:  # another process may have made it meanwhile
            there = make()
            there.save(file)
    return there


def _read(file: Path) -> Graph | None:
    try:
        return Graph.load(file)
    except FileNotFoundError:
        return None
    except GraphError as error:
        print(f"{error}; making it again", file=sys.stderr)
        return None


@cache
def _versions() -> str:
    """Of torch, whose operators are recorded, and of the code that records them."""
    import torch

    here = Path(__file__).parent
    files = sorted({f for stem in FRONT_END.split() for f in here.glob(f"{stem}.py")})
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    return f"{torch.__version__} {digest}"
