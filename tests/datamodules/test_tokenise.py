"""Tokenisers give documents back, are a pure function of what they were trained on, and never make up a separator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.tokenise import (
    END,
    BpeTokenizer,
    ByteTokenizer,
    UnknownTokenizer,
    bytes_per_token,
    make_tokenizer,
    parse_spec,
    token_dtype,
    vocab_of,
)

PROJECT = Path(__file__).resolve().parents[2]
CORPUS = [b"def add(left, right):\n    return left + right\n" * 3, "naïve café, 東京 🙂\n".encode() * 5, b"x = 1\n" * 9]


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    """Trained on three small documents."""
    return BpeTokenizer.train(CORPUS, 320)


@given(st.binary())
def test_bytes_come_back_but_for_nul_which_becomes_substitute(document: bytes) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(document)
    assert tokens.dtype == np.uint16
    assert len(tokens) == len(document)
    assert not (tokens == tokenizer.separator).any()
    assert tokenizer.decode(tokens) == document.replace(b"\0", b"\x1a")
    assert tokenizer.unfaithful(document) == (b"\0" in document)


def test_the_byte_vocabulary_stays_256_and_other_tokens_are_refused() -> None:
    assert ByteTokenizer().vocab == vocab_of("bytes") == 256
    assert ByteTokenizer().decode(np.array([65, 0, 66])) == b"A\0B"
    with pytest.raises(ValueError, match="0 to 255, got 3 to 256"):
        ByteTokenizer().decode(np.array([3, 256]))


@given(st.text())
def test_bpe_gives_any_text_back(bpe: BpeTokenizer, document: str) -> None:
    tokens = bpe.encode(document.encode(errors="ignore"))
    assert bpe.decode(tokens) == document.encode(errors="ignore")
    assert not (tokens == bpe.separator).any()
    assert (tokens < bpe.vocab).all()


def test_the_separators_name_in_a_document_is_ordinary_text(bpe: BpeTokenizer) -> None:
    document = f"before {END} after".encode()
    tokens = bpe.encode(document)
    assert not (tokens == bpe.separator).any()
    assert bpe.decode(tokens) == document
    assert bpe.decode(np.array([bpe.separator])) == END.encode()


def test_what_is_not_utf8_becomes_the_replacement_character(bpe: BpeTokenizer) -> None:
    assert bpe.decode(bpe.encode(b"caf\xe9")) == "caf\ufffd".encode()
    assert bpe.unfaithful(b"caf\xe9")
    assert not bpe.unfaithful("café".encode())


def test_bpe_is_the_same_each_time_and_in_another_process(bpe: BpeTokenizer) -> None:
    assert BpeTokenizer.train(CORPUS, 320).text == bpe.text
    code = f"from datamodules.tokenise import BpeTokenizer; print(BpeTokenizer.train({CORPUS!r}, 320).sha256)"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=environment, check=True
    )
    assert done.stdout.strip() == bpe.sha256
    assert BpeTokenizer.train(CORPUS[:2], 320).sha256 != bpe.sha256


def test_bpe_is_saved_and_read_as_it_was(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    again = BpeTokenizer.load(tmp_path, 320)
    assert (again.sha256, again.separator, again.spec) == (bpe.sha256, bpe.separator, "bpe:320")
    assert np.array_equal(again.encode(CORPUS[0]), bpe.encode(CORPUS[0]))


def test_merges_shorten_what_was_trained_on(bpe: BpeTokenizer) -> None:
    size, tokens = len(CORPUS[0]), len(bpe.encode(CORPUS[0]))
    assert tokens < size / 2
    assert bytes_per_token(size, 1, tokens + 1) == (size + 1) / (tokens + 1)
    assert bytes_per_token(1000, 7, 1007) == 1.0  # bytes, a separator after each document


def test_specs_are_checked() -> None:
    assert (parse_spec("bytes"), parse_spec("bpe:4096"), vocab_of("bpe:4096")) == (None, 4096, 4096)
    with pytest.raises(UnknownTokenizer, match="'byte'; did you mean 'bytes'"):
        parse_spec("byte")
    with pytest.raises(UnknownTokenizer, match="unknown tokenizer 'bpe'"):
        make_tokenizer("bpe", iter(CORPUS))
    with pytest.raises(ValueError, match="at least 257 tokens, got 256"):
        parse_spec("bpe:256")


def test_tokens_take_two_bytes_up_to_65536() -> None:
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32
