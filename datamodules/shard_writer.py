"""Writing token shards: Arrow files by `datasets`' own writer, one in memory at a time, with the two JSON files it reads."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import sources
from datamodules.text import SPLITS, Documents
from datamodules.tokenise import BpeTokenizer, Tokenizer, make_tokenizer, token_dtype

COLUMN = "tokens"


class SplitWriter:
    """Takes the documents of one split and writes them as shards, each followed by the separator.

    Args:
        folder: where the files go; made here.
        tokenizer: turns documents into tokens.
        block: tokens in a row.
        shard_tokens: tokens in a file, a multiple of `block`.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, block: int, shard_tokens: int) -> None:
        folder.mkdir()
        self.folder, self.tokenizer, self.block = folder, tokenizer, block
        self.dtype = token_dtype(tokenizer.vocab)
        self.documents = self.size = self.tokens = self.unfaithful = self.shards = 0
        self._buffer = np.empty(shard_tokens, self.dtype)
        self._filled = 0

    def add(self, document: bytes) -> None:
        """Append a document and a separator."""
        tokens_T = np.append(self.tokenizer.encode(document), self.dtype.type(self.tokenizer.separator))
        self.documents, self.size, self.tokens = (
            self.documents + 1,
            self.size + len(document),
            self.tokens + len(tokens_T),
        )
        self.unfaithful += self.tokenizer.unfaithful(document)
        while len(tokens_T):
            taken = tokens_T[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled, tokens_T = self._filled + len(taken), tokens_T[len(taken) :]
            if self._filled == len(self._buffer):
                self._flush()

    def finish(self, about: dict[str, Any]) -> None:
        """Write what is left, give the files their names, and describe them; `about` goes into the manifest."""
        if self._filled or not self.shards:  # with no tokens at all, one file without rows, so that `datasets` opens it
            self._flush()
        names = [f"data-{at:05d}-of-{self.shards:05d}.arrow" for at in range(self.shards)]
        files = []
        for at, name in enumerate(names):
            file = self._part(at).rename(self.folder / name)
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            files.append({"name": name, "size": file.stat().st_size, "sha256": sha256})
        counts = {"documents": self.documents, "bytes": self.size, "tokens": self.tokens, "unfaithful": self.unfaithful}
        manifest = about | {"dtype": self.dtype.name, "block": self.block} | counts | {"files": files}
        self._describe(names, hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16])
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=2))

    def _part(self, at: int) -> Path:
        return self.folder / f"part-{at:05d}"

    def _flush(self) -> None:
        import pyarrow
        from datasets.arrow_writer import ArrowWriter

        values = self._buffer[: self._filled]
        offsets = np.append(np.arange(0, self._filled, self.block), self._filled).astype(np.int32)
        features = self._features()
        rows = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values))
        table = pyarrow.Table.from_arrays([rows], schema=features.arrow_schema)
        writer = ArrowWriter(features=features, path=str(self._part(self.shards)))
        writer.write_table(table, writer_batch_size=max(1, len(rows)))  # one batch, so that a file is one row of tokens
        writer.finalize()
        self._filled, self.shards = 0, self.shards + 1

    def _features(self) -> Any:
        from datasets import Features, Sequence, Value

        return Features({COLUMN: Sequence(Value(self.dtype.name))})

    def _describe(self, names: list[str], fingerprint: str) -> None:
        """The files that `datasets.load_from_disk` looks for."""
        from datasets import DatasetInfo

        DatasetInfo(features=self._features()).write_to_directory(str(self.folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self.folder / "state.json").write_text(json.dumps(state, indent=2))


def write_shards(
    documents: Documents, spec: str, final: Path, format_version: int, block: int, shard_tokens: int, progress: bool
) -> None:
    """Make train/, val/ and test/ in `final`, whose name appears only when all is written. The caller holds a lock.

    Args:
        documents: of the corpus.
        spec: of the tokeniser.
        final: the folder to make; it must not exist.
        format_version, block, shard_tokens: how, as in `datamodules.shards`.
        progress: show a bar.
    """
    with sources._empty_folder(final.with_name(f".making-{final.name}")) as folder, _bar(documents, progress) as step:
        tokenizer = make_tokenizer(spec, documents.split("train"))
        if isinstance(tokenizer, BpeTokenizer):
            tokenizer.save(folder)
        writers = {split: SplitWriter(folder / split, tokenizer, block, shard_tokens) for split in SPLITS}
        for split, document in documents:
            writers[split].add(document)
            step(len(document))
        about = {
            "format": format_version,
            "corpus": documents.corpus.name,
            "card": documents.card.to_dict(),
            "tokenizer": spec,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab": tokenizer.vocab,
            "separator": tokenizer.separator,
            "python": platform.python_version(),
        }
        for split in SPLITS:
            writers[split].finish(about | {"split": split})
        folder.rename(final)


@contextmanager
def _bar(documents: Documents, progress: bool) -> Iterator[Any]:
    from rich.progress import Progress

    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task(f"tokens of {documents.card.name}", total=None)
        yield lambda size: bar.advance(task, size)
