"""Every data set by name: images and texts that are fetched, and functions whose values are generated."""

from __future__ import annotations

import hashlib
from pathlib import Path

from datamodules import text
from datamodules.sources import DataCard, data_sha256, load_images
from lit_modules.ops import targets


def content_sha256(name: str) -> str:
    """Return the sha256 that says what a data set holds, without loading it: of its arrays, or of the code that makes it.

    Raises:
        ValueError: unknown name, nearest one included.
    """
    if name in targets.FAMILIES:
        return generated_card(name).sha256
    return text.content_sha256(name) if text.is_corpus(name) else data_sha256(name)


def card_of(name: str, fetch: bool = True) -> DataCard:
    """Return what a data set is; it is on this machine afterwards.

    Args:
        name: of a set of images in `datamodules.sources`, of a corpus in `datamodules.text`, or of a function in
            `lit_modules.ops.targets`.
        fetch: False to use only what is on this machine.
    Raises:
        ValueError: unknown name, nearest one included.
        DataUnavailable: nothing led to the data.
    """
    if name in targets.FAMILIES:
        return generated_card(name)
    return text.text_card(name, fetch) if text.is_corpus(name) else load_images(name, fetch=fetch).card


def generated_card(name: str) -> DataCard:
    """Return the card of a function's values: none of them real, as many as are asked for."""
    code = hashlib.sha256(Path(targets.__file__).read_bytes()).hexdigest()
    return DataCard(name, 0, code, "Apache-2.0", False, "lit_modules/ops/targets.py", "random points, computed values")
