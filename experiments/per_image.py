"""What a run measured image by image: images.csv in its folder, of which its metrics are the means."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from experiments.records import Record

FILE = (
    "images.csv"  # a row per image of a test set: columns set, index, and one for each measure, empty where it has none
)


def image_values(record: Record, metric: str) -> Mapping[int, float]:
    """Return a metric's value on each test image, by the image's index; images without one are left out.

    Args:
        record: of a finished run.
        metric: <set>/<measure>; a set's name may have parts of its own, such as strength/0.25.
    """
    path = record.path / FILE
    return _table(path, path.stat().st_mtime_ns).get(metric, {}) if path.exists() else {}


@lru_cache(maxsize=64)
def _table(path: Path, _: int) -> Mapping[str, Mapping[int, float]]:
    """The finite values of a file by metric, each by image."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with open(path, newline="") as handle:
        for row in csv.DictReader(handle):
            name, image = row.pop("set"), int(row.pop("index"))
            for measure, text in row.items():
                if text and math.isfinite(value := float(text)):
                    found[f"{name}/{measure}"][image] = value
    return found
