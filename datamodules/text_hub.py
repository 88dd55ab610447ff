"""Reader of the Hugging Face hub's data sets, through the `datasets` library."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock

from datamodules import sources
from datamodules.fetch import NotThisWay
from datamodules.text import SPLITS, Corpus, Tally, split_of
from datamodules.text_sources import Found, Reader

HUB_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}


class Hub(Reader):
    """A data set of the Hugging Face hub, loaded once and kept as it was then, so that it is one content for good."""

    def local(self, corpus: Corpus) -> str:
        record = self._record(corpus)
        return f"{record['source']}, kept since"

    def official(self, corpus: Corpus) -> str:
        dataset, config, column = _hub_parts(corpus.where)
        home = self._home(corpus, probe=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        datasets = _datasets()
        with FileLock(home.with_name(f".{home.name}.lock")):
            with suppress(NotThisWay):
                return self.local(corpus)  # another process has loaded it meanwhile
            loaded = datasets.load_dataset(dataset, config, cache_dir=str(sources.cache_root() / "huggingface"))
            kept = {HUB_SPLITS[split]: rows for split, rows in loaded.items() if split in HUB_SPLITS}
            if "train" not in kept:
                raise NotThisWay(f"{dataset} has no train split, only {', '.join(loaded)}")
            if column not in kept["train"].column_names:
                raise NotThisWay(f"{dataset} has no column '{column}', only {', '.join(kept['train'].column_names)}")
            making = home.with_name(f".making-{home.name}")
            with _without_bars(datasets), sources._empty_folder(making) as folder:
                for split in sorted(kept):
                    kept[split].select_columns([column]).save_to_disk(str(folder / split))
                sha256, documents, size = _hub_measure(corpus, folder)
                record = {"sha256": sha256, "documents": documents, "size": size, "source": "official download"}
                (folder / "record.json").write_text(json.dumps(record))
                folder.rename(home)
        return str(record["source"])

    def documents(self, corpus: Corpus) -> Found:
        self._record(corpus)
        return _hub_documents(corpus, self._home(corpus))

    def measure(self, corpus: Corpus) -> tuple[str, int, int]:
        record = self._record(corpus)
        return record["sha256"], record["documents"], record["size"]

    def _home(self, corpus: Corpus, probe: bool = False) -> Path:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "_", corpus.where)
        return sources.cache_root(probe=probe).absolute() / "text" / "hub" / slug

    def _record(self, corpus: Corpus) -> dict[str, Any]:
        file = self._home(corpus) / "record.json"
        if not file.is_file():
            raise NotThisWay(f"no copy of it in {file.parent}")
        return dict(json.loads(file.read_text()))


def _hub_parts(where: str) -> tuple[str, str | None, str]:
    """DATASET[:CONFIG][:COLUMN] as (dataset, config, column)."""
    dataset, config, column = (*where.split(":"), "", "")[:3]
    return dataset, config or None, column or "text"


def _datasets() -> Any:
    """The library, told before it is imported to count nothing and to keep its files in our cache; a user's word stands."""
    home = sources.cache_root() / "huggingface"
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE"):
        os.environ.setdefault(name, str(home / name.split("_")[1].lower()))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    import datasets

    return datasets


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """No bars for the copy, which takes no time beside the download's."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _hub_measure(corpus: Corpus, folder: Path) -> tuple[str, int, int]:
    tally = Tally()
    for split, document in _hub_documents(corpus, folder):
        tally.add(split or "", document)
    return tally.digest.hexdigest(), tally.documents, tally.size


def _hub_documents(corpus: Corpus, folder: Path) -> Found:
    """Rows as documents; those of WikiText are lines, put together again into articles.

    Splits that the data set lacks are taken from its training documents by hash.
    """
    column = _hub_parts(corpus.where)[2]
    given = [split for split in SPLITS if (folder / split).is_dir()]
    for split in given:
        rows = _datasets().load_from_disk(str(folder / split))
        texts = (text for batch in rows.iter(1000) for text in batch[column] if text)
        for text in _articles(texts) if corpus.name == "wikitext" else texts:
            document = text.encode()
            wanted = split_of(document)
            yield (wanted if split == "train" and wanted not in given else split), document


def _articles(lines: Iterator[str]) -> Iterator[str]:
    number = 0

    def article(line: str) -> int:
        nonlocal number
        number += bool(re.fullmatch(r" = [^=].* = \n?", line))  # " = = Section = = " has more of them
        return number

    return ("".join(group) for _, group in groupby(lines, key=article))


READER = Hub()
