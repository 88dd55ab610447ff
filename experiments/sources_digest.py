"""Which source files a cell depends on, and their digest: comments and docstrings do not count, code does."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parent.parent
FOLLOWED = ("lit_modules", "datamodules")  # what is computed; experiments/ only decides where and when
ALWAYS = ("experiments.run",)  # builds the Trainer


def closure(targets: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Return the files under `root` that the modules of `targets` import, directly or not, in sorted order.

    Args:
        targets: dotted names such as "lit_modules.nets.cnn.LeNet5"; names outside the project are ignored.
        root: the folder that holds the packages.
    """
    asked = (tuple(targets), root)
    known = _CLOSURES.get(asked)
    if known is None or known != {path: _stamp(path) for path in known}:
        files = _walk(*asked)
        known = _CLOSURES[asked] = {path: _stamp(path) for path in (*files, *_folders(root))}
    return [path for path in known if path.suffix == ".py"]


Stamp: TypeAlias = tuple[int, int]

# The answers of this process, with the stamp of each file, and of each folder that a file could come to lie in.
_CLOSURES: dict[tuple[tuple[str, ...], Path], dict[Path, Stamp | None]] = {}


def _stamp(path: Path) -> Stamp | None:
    """When a path was last changed, in nanoseconds, and its size: clocks are coarser than two edits of a test."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def _folders(root: Path) -> list[Path]:
    packages = [root / name for name in FOLLOWED]
    inner = [folder for package in packages for folder in package.rglob("*/") if folder.name != "__pycache__"]
    return [root, *packages, *(folder for folder in inner if folder.is_dir())]


def _walk(targets: Iterable[str], root: Path) -> list[Path]:
    waiting = [file for name in (*targets, *ALWAYS) if (file := _file_of(name, root))]
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in _imports(file, _stamp(file)):
            if name.split(".")[0] in FOLLOWED and (imported := _file_of(name, root)):
                waiting.append(imported)
    return sorted(found)


def digest(files: Iterable[Path], root: Path = ROOT) -> str:
    """Return the sha256 over the code of `files`, each under its path relative to `root`."""
    return _digest(tuple((file, _stamp(file)) for file in files), root)


@cache
def _digest(files: tuple[tuple[Path, Stamp | None], ...], root: Path) -> str:
    whole = hashlib.sha256()
    for file, stamp in files:
        whole.update(f"{file.relative_to(root).as_posix()}\0{_code(file, stamp)}\0".encode())
    return whole.hexdigest()


def _file_of(name: str, root: Path) -> Path | None:
    """The file of the longest prefix of a dotted name that is a module of the project."""
    parts = name.split(".")
    while parts:
        base = root.joinpath(*parts)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        parts.pop()
    return None


@cache
def _imports(file: Path, _stamp: Stamp | None) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            raise ValueError(f"{file}: relative imports are not followed; write the full module name")
    return tuple(names)


@cache
def _code(file: Path, _stamp: Stamp | None) -> str:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        is_scope = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_scope and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return ast.unparse(tree)
