"""The storeys of the house: who may import whom, and nothing that names a machine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("experiments", "lit_modules", "datamodules", "sweeps")
FILES = sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py"))
FORBIDDEN = {
    "lit_modules/ops": ("lit_modules.nets", "lightning", "datamodules", "experiments", "sweeps"),
    "lit_modules/nets": ("lightning", "datamodules", "experiments", "sweeps"),
    "lit_modules": ("experiments", "sweeps"),
    "datamodules": ("lit_modules.nets", "experiments", "sweeps"),
    "experiments": ("sweeps",),
}
ABOVE_ALL = "experiments/cli.py"  # the command line puts everything together, sweeps included
ONLY_HERE = {"mlflow": ("experiments/tracking",), "optuna": ("sweeps/",)}
HEAVY = ("facenet_pytorch", "tianshou", "albumentations", "ray", "transformers", "skimage", "sklearn")


def _imports(file: Path) -> list[tuple[str, bool]]:
    """Every imported module, and whether at the top of the file."""
    found = []
    tree = ast.parse(file.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in top))
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_go_one_way(file: Path) -> None:
    name = file.relative_to(ROOT).as_posix()
    for module, at_top in _imports(file):
        for room, banned in FORBIDDEN.items():
            if name.startswith(f"{room}/") and name != ABOVE_ALL:
                assert not any(module == b or module.startswith(f"{b}.") for b in banned), f"{name} imports {module}"
        for library, homes in ONLY_HERE.items():
            if module.split(".")[0] == library:
                assert name.startswith(homes), f"{name} imports {library}, which belongs to {homes}"
        if module.split(".")[0] in HEAVY:
            assert not at_top, f"{name} imports {module} at the top: import it inside what needs it"


def test_the_cli_starts_without_the_heavy_libraries() -> None:
    import subprocess
    import sys

    code = (
        "import sys, experiments.cli; print([m for m in ('torch', 'lightning', 'mlflow', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_all_ten_packages_are_dependencies() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {entry.split(">")[0].split("=")[0].strip() for entry in wanted}
    ten = {"lightning", "torch", "torchmetrics", "hydra-core", "mlflow", "optuna", "facenet-pytorch", "albumentations"}
    assert ten | {"tianshou", "pytest"} <= names


def test_the_lock_has_hashes_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    pins = [line for line in lock.splitlines() if "==" in line and not line.startswith((" ", "#"))]
    assert len(pins) > 100
    assert lock.count("--hash=sha256:") >= len(pins)
    assert not (ROOT / "uv.lock").exists()
