"""Tokenisers: bytes as they are, and byte-level BPE trained on a corpus's training documents.

Both turn a document (bytes) into tokens without a separator; who joins documents puts `separator` after each.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

END = "<|endoftext|>"
SUBSTITUTE = 0x1A  # ASCII's own character "in place of a character that is invalid", one byte like the NUL it replaces
LEAST_BPE = 257  # every byte, and the separator
FILE = "tokenizer.json"


class UnknownTokenizer(ValueError):
    """A tokeniser that does not exist; the message says which do."""


class Tokenizer(Protocol):
    """What shards need of a tokeniser."""

    spec: str
    vocab: int
    separator: int

    @property
    def sha256(self) -> str:
        """Says what the tokeniser does."""
        ...

    def encode(self, document: bytes) -> np.ndarray:
        """Return the document's tokens, uint16 or uint32 (T,)."""
        ...

    def decode(self, tokens_T: np.ndarray) -> bytes:
        """Return the text of tokens."""
        ...

    def unfaithful(self, document: bytes) -> bool:
        """Return whether decoding the document's tokens would not give it back."""
        ...


class ByteTokenizer:
    """A token is a byte, 0 to 255; byte 0 is the separator of documents, so that the vocabulary stays 256.

    Text holds no NUL. A document that does anyway has each replaced by 0x1A (SUBSTITUTE), so that what follows is never
    taken for a new document and the length is kept; shards count such documents.
    """

    spec = "bytes"
    vocab = 256
    separator = 0

    @property
    def sha256(self) -> str:
        """The sha256 of the rule."""
        return hashlib.sha256(f"bytes; separator {self.separator}; NUL becomes {SUBSTITUTE}".encode()).hexdigest()

    def encode(self, document: bytes) -> np.ndarray:
        """Return the document's bytes, uint16 (T,)."""
        return np.frombuffer(document.replace(b"\0", bytes([SUBSTITUTE])), np.uint8).astype(np.uint16)

    def decode(self, tokens_T: np.ndarray) -> bytes:
        """Return the text of tokens; separators come back as NUL.

        Raises:
            ValueError: a token beyond 255.
        """
        tokens_T = np.asarray(tokens_T)
        if tokens_T.size and not 0 <= int(tokens_T.min()) <= int(tokens_T.max()) < self.vocab:
            raise ValueError(f"tokens are bytes, 0 to 255, got {int(tokens_T.min())} to {int(tokens_T.max())}")
        return tokens_T.astype(np.uint8).tobytes()

    def unfaithful(self, document: bytes) -> bool:
        """Return whether the document holds a NUL."""
        return b"\0" in document


class BpeTokenizer:
    """Byte-level BPE of the `tokenizers` library: GPT-2's pre-tokeniser, every byte in the alphabet, one special token.

    Documents are read as UTF-8; what is not becomes U+FFFD. "<|endoftext|>" inside a document is ordinary text.

    Args:
        text: the content of a tokenizer.json.
        vocab: the size that was asked for; a small corpus may fill less of it.
    """

    def __init__(self, text: str, vocab: int) -> None:
        self._library = _tokenizers().Tokenizer.from_str(text)
        self._library.encode_special_tokens = True  # or a document could hold a separator
        self.text, self.vocab, self.spec = text, vocab, f"bpe:{vocab}"
        self.separator = int(self._library.token_to_id(END))

    @classmethod
    def train(cls, documents: Iterable[bytes], vocab: int) -> BpeTokenizer:
        """Learn the merges from documents; the same documents give the same tokenizer.json.

        Raises:
            ValueError: a vocabulary that does not hold every byte and the separator.
        """
        _check_vocab(vocab)
        library = _tokenizers()
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator((_text(document) for document in documents), trainer)
        return cls(model.to_str(), vocab)

    @classmethod
    def load(cls, folder: Path, vocab: int) -> BpeTokenizer:
        """Read a folder's tokenizer.json."""
        return cls((folder / FILE).read_text(encoding="utf-8"), vocab)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, which `tokenizers` and `transformers` read too."""
        (folder / FILE).write_text(self.text, encoding="utf-8")

    @property
    def sha256(self) -> str:
        """The sha256 of tokenizer.json."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def encode(self, document: bytes) -> np.ndarray:
        """Return the document's tokens, uint16 (T,), or uint32 of a vocabulary beyond 65,536."""
        [encoded] = self._library.encode_batch_fast([_text(document)], add_special_tokens=False)
        return np.asarray(encoded.ids, dtype=token_dtype(self.vocab))

    def decode(self, tokens_T: np.ndarray) -> bytes:
        """Return the text of tokens, UTF-8; separators come back as "<|endoftext|>"."""
        return str(self._library.decode(np.asarray(tokens_T).tolist(), skip_special_tokens=False)).encode()

    def unfaithful(self, document: bytes) -> bool:
        """Return whether the document is not UTF-8."""
        return _text(document).encode() != document


def token_dtype(vocab: int) -> np.dtype:
    """Return the smallest of uint16 and uint32 that holds tokens below `vocab`."""
    return np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)


def parse_spec(spec: str) -> int | None:
    """Return the vocabulary of "bpe:VOCAB", or None for "bytes".

    Raises:
        UnknownTokenizer: neither of them.
        ValueError: a vocabulary that does not hold every byte and the separator.
    """
    if spec == ByteTokenizer.spec:
        return None
    kind, _, size = spec.partition(":")
    if kind != "bpe" or not size.isdigit():
        near = difflib.get_close_matches(spec, ["bytes", "bpe:4096"], n=1, cutoff=0.3)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UnknownTokenizer(f"unknown tokenizer '{spec}'{hint} known: bytes, bpe:VOCAB such as bpe:4096")
    _check_vocab(int(size))
    return int(size)


def vocab_of(spec: str) -> int:
    """Return the vocabulary that a net needs for "bytes" or "bpe:VOCAB"."""
    return parse_spec(spec) or ByteTokenizer.vocab


def make_tokenizer(spec: str, train_documents: Iterator[bytes]) -> Tokenizer:
    """Return the tokeniser of a spec, trained on these documents if it must be."""
    vocab = parse_spec(spec)
    return ByteTokenizer() if vocab is None else BpeTokenizer.train(train_documents, vocab)


def bytes_per_token(size: int, documents: int, tokens: int) -> float:
    """Return bytes of text per token, so that bits per byte = nats per token / ln 2 / this.

    A separator counts as one byte with every tokeniser, so bits per byte compare between them; of bytes it is exactly 1.
    """
    return (size + documents) / tokens


def _check_vocab(vocab: int) -> None:
    if vocab < LEAST_BPE:
        raise ValueError(f"a byte-level vocabulary holds at least {LEAST_BPE} tokens, got {vocab}")


def _text(document: bytes) -> str:
    return document.decode("utf-8", errors="replace")


def _tokenizers() -> Any:
    # Its threads and the fork of loading processes do not go together, and it says so at length. A user's word stands.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers
