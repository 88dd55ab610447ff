"""Write a Hugging Face directory shard by shard, under its final name only once it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from experiments.errors import UserError
from experiments.upcycle.source import INDEX

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


@contextmanager
def whole_or_nothing(target: Path, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` that becomes it at the end; after an error it is gone.

    Args:
        target: must not exist, unless `force` says that it may be replaced; it is replaced only at the end.
    Raises:
        UserError: it exists and may not be replaced, or lies in a folder that does not exist.
    """
    if target.exists() and not force:
        raise UserError(f"{target} exists already; give another name, or --force to replace it")
    if not target.absolute().parent.is_dir():
        raise UserError(f"there is no folder {target.absolute().parent} to write into")
    partial = target.absolute().with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = partial.with_suffix(".old")
    if target.exists():
        target.rename(old)
    partial.rename(target.absolute())
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


class Shards:
    """Safetensors files of a known number, and their index. A shard is written at once and then forgotten."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.written = folder, count, 0
        self.where: dict[str, str] = {}
        self.size = 0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard."""
        self.written += 1
        name = f"model-{self.written:05d}-of-{self.count:05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name, {"format": "pt"})
        (self.folder / name).chmod(0o644)  # safetensors makes it readable to its writer only
        self.where |= dict.fromkeys(tensors, name)
        self.size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self) -> None:
        """Write the index.

        Raises:
            AssertionError: not as many shards as announced, whose names would be wrong.
        """
        assert self.written == self.count, f"{self.written} shards of {self.count}"
        index = {"metadata": {"total_size": self.size}, "weight_map": self.where}
        write_json(self.folder / INDEX, index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON to be read by people too."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def copy_tokenizer(source: Path | None, target: Path) -> list[str]:
    """Copy a tokeniser's files and the generation settings; return their names."""
    if source is None:
        return []
    files = sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})
    for file in files:
        shutil.copy2(file, target / file.name)
    return [file.name for file in files]
