"""A dense checkpoint as something to read tensor by tensor under our names; nothing is held that is not asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from experiments.errors import UserError
from experiments.upcycle.hosts import completed, source_shapes
from experiments.upcycle.names import BUFFERS, from_llama_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Files(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files under the names they have there; each access reads one from disk.

    Raises:
        UserError: no such files, files that the index names and that are not there, or keys that the index and the files
            do not agree on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            listed: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).exists():
            listed = {}
        else:
            other = " (weights in .bin files: save them as safetensors first)" if list(folder.glob("*.bin")) else ""
            raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{other}")
        self.names = sorted(set(listed.values())) or [SINGLE]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.where: dict[str, str] = {}
        for name in self.names:
            if not (folder / name).is_file():
                raise UserError(f"{folder / INDEX} names {name}, which is not there")
            self._look_into(name)
        wrong = [key for key, name in listed.items() if self.where.get(key) != name]
        if wrong:
            raise UserError(f"{folder / INDEX} lists keys that its files do not hold: {', '.join(wrong[:10])}")

    def _look_into(self, name: str) -> None:
        with safe_open(self.folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118, not a dict
                part = file.get_slice(key)
                self.shapes[key], self.where[key] = tuple(part.get_shape()), name
                self.dtypes[key] = part.get_dtype()

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self.folder / self.where[key], "pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def sha256(self) -> str:
        """Return the hash over the names and contents of all files."""
        whole = hashlib.sha256()
        for name in self.names:
            whole.update(name.encode() + b"\0")
            with open(self.folder / name, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()


@dataclass(frozen=True)
class Source(Mapping[str, Tensor]):
    """A dense parent: a mapping from our names to tensors, read one by one.

    Attributes:
        name: what to call it in messages and receipts.
        config: its configuration, with defaults written out.
        tensors: Hugging Face's names to tensors.
        keys_of: our names to Hugging Face's, in a model's order.
        sha256: of the weights.
        tokenizer: a folder with the tokeniser's files, or None.
        warnings: what was noticed while reading.
    """

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    keys_of: dict[str, str]
    sha256: str
    tokenizer: Path | None = None
    warnings: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[self.keys_of[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json.

    Raises:
        UserError: no such folder, no config.json, or one that is not JSON.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is not a Hugging Face checkpoint: it has no config.json")
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def open_source(folder: Path) -> Source:
    """Open a dense Hugging Face directory; only headers and the hash are read.

    Raises:
        UserError: what is missing or does not fit, every key of it named.
    """
    config = completed(read_config(folder))
    files = Files(folder)
    return make_source(str(folder), config, files, files.shapes, files.sha256(), folder)


def make_source(
    name: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    sha256: str,
    tokenizer: Path | None,
) -> Source:
    """Return a source whose keys and shapes are exactly those that its configuration asks for.

    Args:
        config: as `completed` returns it.
        tensors, shapes: by Hugging Face's names.
    Raises:
        UserError: keys that are missing, of no use or of another shape; all of them in one message.
    """
    theirs = from_llama_names(shapes)
    found = {ours: key for key, ours in theirs.items()}
    wanted = source_shapes(config)
    warnings = tuple(
        f"{key} is not used: it follows from the configuration" for key in shapes if BUFFERS.fullmatch(key)
    )
    if config["tie_word_embeddings"] and "head.weight" in found:
        if not torch.equal(tensors[found["head.weight"]], tensors[found["embedding.weight"]]):
            raise UserError(
                f"{name}: the configuration ties the head to the embedding, but lm_head.weight differs from it"
            )
        del found["head.weight"]
        warnings += ("lm_head.weight is not used: the configuration ties it to the embedding, which it equals",)
    problems = [f"  missing: {key}" for key in wanted if key not in found]
    problems += [f"  not asked for by config.json: {found[key]}" for key in found if key not in wanted]
    problems += [
        f"  {found[key]} has shape {tuple(shapes[found[key]])}, config.json asks for {shape}"
        for key, shape in wanted.items()
        if key in found and tuple(shapes[found[key]]) != shape
    ]
    if problems:
        shown = "\n".join(problems[:30]) + (f"\n  and {len(problems) - 30} more" if problems[30:] else "")
        raise UserError(f"{name}: weights and config.json do not match:\n{shown}")
    keys_of = {key: found[key] for key in wanted}
    return Source(name, config, tensors, keys_of, sha256, tokenizer, warnings, wanted)
