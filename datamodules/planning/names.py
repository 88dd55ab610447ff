"""Which data sets are models to plan for, and what they are: without torch, for commands that only list them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from datamodules.sources import DataCard

MODELS = ("vgg19", "resnet50", "inception", "bert", "t5", "gpt2", "moe")  # families of workloads
PROFILES = ("bert-48-profile", "made-up-models", "this-machine")  # that come from no graph of `workloads`


def is_workload(name: str) -> bool:
    """Whether a data set's name is that of a model to plan for."""
    return name in PROFILES or name.split("-")[0] in MODELS


def workload_sha256(name: str) -> str:
    """Return the sha256 of the code that makes a workload: graphs are traced from it, whatever machine traces them."""
    folder = Path(__file__).parent
    stems = (
        "graph",
        "trace",
        "recorder",
        "assemble",
        "decompose",
        "simplify",
        "flops",
        "vocabulary",
        "stages",
        "pipeline_env",
    )
    files = [folder / f"{stem}.py" for stem in stems] + sorted(
        [*folder.glob("workloads*.py"), *folder.glob("profiles/*.yaml")]
    )
    code = "".join(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0" for file in files)
    return hashlib.sha256(f"{name}\0{code}".encode()).hexdigest()


KINDS = {
    "bert-48-profile": "published V100 profile of BERT-48's layers",
    "made-up-models": "rows of times and sizes drawn at random",
    "this-machine": "small models whose training steps are run and timed",
}


def workload_card(name: str) -> DataCard:
    """Return what a workload is: a model's architecture at its published sizes, whose weights nobody needs to plan."""
    kind = KINDS.get(name, "graph of a model's training step at its published sizes, traced")
    real = name not in ("made-up-models", "this-machine")
    return DataCard(name, 0, workload_sha256(name), "Apache-2.0", real, "datamodules/planning", kind)
