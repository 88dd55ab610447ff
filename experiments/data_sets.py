"""Every data set by name: what it holds, before any of it is loaded, and what it is."""

from __future__ import annotations

from datamodules.sources import DATASETS, DataCard, data_sha256


def content_sha256(name: str) -> str:
    """Return the sha256 that says what a data set holds: pinned, of its files, or of the code that makes it.

    Raises:
        ValueError: unknown name, nearest one included.
        DataUnavailable: a set that is not pinned is not on this machine.
    """
    if name in DATASETS:
        return data_sha256(name)
    from datamodules import faces, text
    from datamodules.planning import names

    if names.is_workload(name):
        return names.workload_sha256(name)

    if text.is_corpus(name):
        return text.content_sha256(name)
    if faces.is_faces(name):
        return faces.content_sha256(name)
    from datamodules import catalogue  # generated data need torch, whose import takes seconds

    return catalogue.content_sha256(name)


def card_of(name: str, fetch: bool = True) -> DataCard:
    """Return what a data set is; it is on this machine afterwards.

    Args:
        name: of images to classify, faces, a text, a function whose values are computed, or a model to plan for.
        fetch: False to use only what is on this machine.
    Raises:
        ValueError: unknown name, nearest one included.
        DataUnavailable: nothing led to the data.
    """
    from datamodules import catalogue, faces
    from datamodules.planning import names

    if names.is_workload(name):
        return names.workload_card(name)
    return faces.face_card(name, fetch) if faces.is_faces(name) else catalogue.card_of(name, fetch)


def named_by_content(name: str) -> bool:
    """Whether a data set is hashed by the content found here, so that it must be here before anything is planned."""
    from datamodules import faces, text

    return text.is_corpus(name) or (faces.is_faces(name) and name != faces.PROCEDURAL)
