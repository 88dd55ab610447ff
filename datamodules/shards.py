"""Token shards: a corpus's documents as one long row of tokens, in files that Hugging Face `datasets` reads as well.

A folder per corpus and tokeniser holds train/, val/ and test/, each in the on-disk format of `Dataset.save_to_disk`: Arrow
files whose rows are blocks of 4096 tokens (the last may be shorter), and beside them our manifest.json:

    from datasets import load_from_disk
    rows = load_from_disk("…/tokens/python_stdlib-bytes-0123456789ab/train")
    rows[0]["tokens"][:10]

Here they are read memory-mapped and without a copy, see `TokenShards`.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from datamodules import sources
from datamodules.shard_writer import write_shards
from datamodules.sources import DataCard, DataUnavailable
from datamodules.text import SPLITS, content_sha256, corpus, load_documents
from datamodules.tokenise import FILE, BpeTokenizer, ByteTokenizer, Tokenizer, parse_spec
from datamodules.tokenise import bytes_per_token as _bytes_per_token

FORMAT = 1  # of the shards and of how they are made; a new one makes them anew
BLOCK = 4096  # tokens in a row
SHARD_TOKENS = 2**22
VERIFY_UP_TO = 2**28  # bytes that are hashed whenever shards are asked for, in a fraction of a second


class ShardError(RuntimeError):
    """Shards that are not whole; the message names the file and the way out."""


def build_shards(name: str, tokenizer: str = "bytes", fetch: bool = True, progress: bool = False) -> Path:
    """Return the folder of a corpus's shards (train/, val/, test/), made the first time; several processes may ask at once.

    Shards that exist are checked: their sizes, and up to 256 MiB their hashes too.

    Args:
        name: of the corpus.
        tokenizer: "bytes" or "bpe:VOCAB".
        fetch: False to use only what is on this machine.
        progress: show a bar while making them.
    Raises:
        ValueError: an unknown corpus or tokeniser.
        DataUnavailable: nothing led to the corpus.
        ShardError: shards that exist are not whole.
    """
    parse_spec(tokenizer)
    chosen = corpus(name)
    try:
        final = shards_folder(name, tokenizer)
    except DataUnavailable:  # a corpus that is not pinned has no hash before it is here
        load_documents(chosen, fetch)
        final = shards_folder(name, tokenizer)
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{final.name}.lock")):
            if not final.is_dir():  # another process may have made them meanwhile
                write_shards(load_documents(chosen, fetch), tokenizer, final, FORMAT, BLOCK, SHARD_TOKENS, progress)
    for split in SPLITS:
        shards = TokenShards(final / split)
        if shards.size <= VERIFY_UP_TO:
            shards.verify()
    return final


def shards_folder(name: str, tokenizer: str) -> Path:
    """Return where the shards of a corpus and tokeniser lie: the name says which, and a digest of all they depend on."""
    parts = (content_sha256(name), tokenizer, FORMAT, BLOCK, SHARD_TOKENS)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    words = (re.sub(r"[^A-Za-z0-9_.]+", "_", word).strip("_") for word in (name, tokenizer))
    return sources.cache_root().absolute() / "tokens" / "-".join((*words, digest[:12]))


def shards_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokeniser that made the shards in `folder`.

    Raises:
        ShardError: its tokenizer.json is missing or altered.
    """
    manifest = TokenShards(folder / "train").manifest
    vocab = parse_spec(manifest["tokenizer"])
    if vocab is None:
        return ByteTokenizer()
    file = folder / FILE
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"
    if found != manifest["tokenizer_sha256"]:
        raise _broken(file, f"is {'missing' if found == 'none' else 'altered'}", folder)
    return BpeTokenizer.load(folder, vocab)


def describe_shards(folder: Path | str) -> str:
    """Return a table for people of what a folder of shards holds, a line per split."""
    folder = Path(folder)
    lines: list[str] = []
    for split in SPLITS:
        shards = TokenShards(folder / split)
        made = shards.manifest
        if not lines:
            lines.append(f"{shards.card.name} as {made['tokenizer']} tokens ({made['dtype']}) in {folder}")
        ratio = f", {shards.bytes_per_token:.3f} bytes per token" if len(shards) else ""
        lines.append(
            f"  {split:5} {made['documents']:>9,} documents {made['bytes']:>13,} bytes {len(shards):>13,} tokens "
            f"in {len(made['files'])} shards{ratio}"
        )
    return "\n".join(lines)


class TokenShards:
    """The tokens of one split, memory-mapped.

    Args:
        folder: one of train/, val/, test/.
    Raises:
        ShardError: a file is missing, or its size is not the manifest's.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        self.size = sum(entry["size"] for entry in self.manifest["files"])
        self._parts: list[np.ndarray] = []
        for entry in self.manifest["files"]:
            self._parts += self._open(entry)
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)]).tolist()
        if len(self) != self.manifest["tokens"]:
            raise self._broken("manifest.json", f"says {self.manifest['tokens']} tokens where {len(self)} are")

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself."""
        return TokenShards, (self.folder,)

    @property
    def card(self) -> DataCard:
        """What the corpus was when the shards were made, and where it came from."""
        return DataCard(**self.manifest["card"])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, see `datamodules.tokenise.bytes_per_token`."""
        return _bytes_per_token(self.manifest["bytes"], self.manifest["documents"], len(self))

    def window(self, start: int, length: int) -> np.ndarray:
        """Return tokens [start, start + length), uint16 or uint32 (length,), read-only: a view, but a copy across files.

        Raises:
            IndexError: not all of them exist.
        """
        stop = start + length
        if start < 0 or length < 0 or stop > len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        if not length:
            return np.empty(0, self.manifest["dtype"])
        at = bisect_right(self._starts, start) - 1
        low = start - self._starts[at]
        if stop <= self._starts[at + 1]:
            return self._parts[at][low : low + length]
        pieces = []
        while start < stop:
            piece = self._parts[at][start - self._starts[at] : stop - self._starts[at]]
            pieces.append(piece)
            start, at = start + len(piece), at + 1
        joined = np.concatenate(pieces)
        joined.flags.writeable = False
        return joined

    def verify(self) -> None:
        """Hash every shard file.

        Raises:
            ShardError: one is not as it was written.
        """
        for entry in self.manifest["files"]:
            with open(self.folder / entry["name"], "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise self._broken(entry["name"], "is altered: its sha256 is not the manifest's")

    def _read_manifest(self) -> dict[str, Any]:
        file = self.folder / "manifest.json"
        if not file.is_file():
            raise self._broken("manifest.json", "is missing")
        try:
            manifest = json.loads(file.read_text())
            if manifest["format"] != FORMAT:
                raise self._broken("manifest.json", f"is of format {manifest['format']}, this program's is {FORMAT}")
            return dict(manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken("manifest.json", f"is corrupt ({error})") from error

    def _open(self, entry: dict[str, Any]) -> list[np.ndarray]:
        import pyarrow

        file = self.folder / entry["name"]
        if not file.is_file():
            raise self._broken(entry["name"], "is missing")
        if (size := file.stat().st_size) != entry["size"]:
            raise self._broken(entry["name"], f"holds {size} bytes where {entry['size']} were written")
        dtype = np.dtype(self.manifest["dtype"])
        try:
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
            chunks = [chunk.flatten() for chunk in table.column("tokens").chunks]
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            raise self._broken(entry["name"], f"is corrupt ({error})") from error
        if any(chunk.type != pyarrow.from_numpy_dtype(dtype) or chunk.null_count for chunk in chunks):
            raise self._broken(entry["name"], f"does not hold {dtype} tokens")
        # By the buffer, since Arrow's own `to_numpy` imports pandas, which takes a second or two.
        return [
            np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize)
            for chunk in chunks
            if len(chunk)
        ]

    def _broken(self, name: str, what: str) -> ShardError:
        return _broken(self.folder / name, what, self.folder.parent)


def _broken(file: Path, what: str, folder: Path) -> ShardError:
    return ShardError(f"{file} {what}. Delete the folder {folder}; it is made again when it is next asked for.")
