"""`fivefold deblur-judge`: how close anyone's restored photographs are to the sharp ones, and what MTCNN finds in them.

Legend: H height, W width.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from datamodules.face_photos import SUFFIXES, Refused, read_photo
from experiments.deblur.faces import VIEW
from experiments.deblur.files import Outcome, check_outputs, collect, each_of
from experiments.errors import UserError
from experiments.store import write_atomically
from lit_modules.face_judge import FaceJudge
from lit_modules.ops.detection import FaceScores, indicators, join_scores, recovery, score_faces
from lit_modules.ops.image_quality import psnr, ssim

SHARP, BLURRED, RESTORED = "sharp", "blurred", "restored"
UNLIKE = "sizes differ"
LABELS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM (%)",
    "detected_0.7": "found, p 0.7 (%)",
    "detected_0.9": "found, p 0.9 (%)",
    "detected_0.99": "found, p 0.99 (%)",
    "prob": "mean probability (%)",
    "iou": "mean IoU (%)",
    "landmark_error": "landmark error (% of eye distance)",
    "landmark_n": "faces behind it",
    "false_positives": "boxes elsewhere, per image",
}
IN_PERCENT = ("detected_0.7", "detected_0.9", "detected_0.99", "prob", "iou", "landmark_error")
RECOVERED = IN_PERCENT[:-1]


class Judgement:
    """Rows per image, and the faces found in each version."""

    def __init__(self, versions: Sequence[str]) -> None:
        self.versions = versions
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, list[FaceScores]] = {version: [] for version in versions}

    def add(self, name: str, pixels: Mapping[str, np.ndarray], judge: FaceJudge) -> None:
        """Take in one photograph's versions, uint8 (H, W, 3), which are all of one size."""
        images = {v: torch.from_numpy(p.copy()).permute(2, 0, 1)[None] for v, p in pixels.items()}
        found = {version: judge.detect(_view(image)) for version, image in images.items()}
        row: dict[str, Any] = {"photograph": name}
        sharp = images[SHARP].float() / 255
        for version, image in images.items():
            if version != SHARP:
                row[f"psnr/{version}"] = float(psnr(image.float() / 255, sharp))
                row[f"ssim/{version}"] = 100 * float(ssim(image.float() / 255, sharp))
            scores = score_faces(found[version], found[SHARP])
            self.scores[version].append(scores)
            row[f"faces/{version}"] = len(found[version][0])
            for measure in ("prob", "iou", "landmark_error", "false_positives"):
                row[f"{measure}/{version}"] = float(getattr(scores, f"{measure}_B")[0])
        self.rows.append(row)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return measure -> version -> mean; None where there is nothing to average. Percent, dB and counts as in `LABELS`."""
        found: dict[str, dict[str, float | None]] = {measure: {} for measure in LABELS}
        for measure in ("psnr", "ssim"):
            for version in self.versions[1:]:
                values = [row[f"{measure}/{version}"] for row in self.rows]
                finite = [value for value in values if math.isfinite(value)]
                found[measure][version] = float(np.mean(finite)) if finite else None
        for version, scores in self.scores.items():
            for measure, value in indicators(join_scores(scores)).items():
                if measure in found:
                    found[measure][version] = None if value is None else value * (100 if measure in IN_PERCENT else 1)
        return found

    def csv(self) -> str:
        """Return a row per image; what is missing is empty."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in row.items()} for row in self.rows)
        return file.getvalue()

    def table(self) -> Table:
        """Return the summary as a table that is Markdown too."""
        last = ["gain", "recovered"] if RESTORED in self.versions else []
        table = Table(box=MARKDOWN, header_style="")
        for name in ("", *self.versions, *last):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for measure, values in self.summary().items():
            cells = [_shown(values.get(version)) for version in self.versions]
            blurred, restored = values.get(BLURRED), values.get(RESTORED)
            if last:
                gain = None if blurred is None or restored is None or measure == "landmark_n" else restored - blurred
                back = recovery(values.get(SHARP), blurred, restored) if measure in RECOVERED else None
                cells += [_shown(gain), "-" if back is None else f"{100 * back:.0f} %"]
            table.add_row(LABELS[measure], *cells)
        return table

    def remarks(self) -> str:
        """Return what the table leaves open."""
        counted = sum(int(part.counted_B.sum()) for part in self.scores[SHARP])
        equal = sum(math.isinf(row[f"psnr/{version}"]) for version in self.versions[1:] for row in self.rows)
        left_out = f" {equal} images equal the sharp one and are left out of the mean PSNR." if equal else ""
        return (
            f"{len(self.rows)} photographs; MTCNN's indicators are of the {counted} in whose sharp version it finds a face, "
            "against the most probable one there. PSNR is of 8 bits; SSIM has a Gaussian window of 11 pixels, sigma 1.5, each "
            f"channel by itself.{left_out}"
        )


def judge_folders(folders: Sequence[Path], target: Path, force: bool, console: Console) -> tuple[Outcome, Judgement]:
    """Compare photographs that have one name in all folders, up to the suffix, and write a row for each.

    Args:
        folders: the sharp ones, the blurred ones, and perhaps the restored ones.
        target: the CSV.
    Raises:
        UserError: no folder, or two photographs of one name in one; none that all have; a target that exists.
    """
    versions = (SHARP, BLURRED, RESTORED)[: len(folders)]
    named = {version: _by_name(folder) for version, folder in zip(versions, folders, strict=True)}
    check_outputs([file for files in named.values() for file in files.values()], [target], force)
    everywhere = sorted(set.intersection(*(set(files) for files in named.values())))
    if not everywhere:
        raise UserError(
            f"no photograph has one name in all of {', '.join(map(str, folders))}; names are without suffixes"
        )
    judgement, judge = Judgement(versions), FaceJudge()

    def work(name: str, tick: Callable[[float], None]) -> None:
        pixels = {version: read_photo(files[name].read_bytes()).pixels_HW3 for version, files in named.items()}
        sizes = {version: f"{p.shape[1]} x {p.shape[0]}" for version, p in pixels.items()}
        if len(set(sizes.values())) > 1:
            raise Refused(UNLIKE, ", ".join(f"{version} {size}" for version, size in sizes.items()))
        judgement.add(name, pixels, judge)

    outcome = each_of(everywhere, work, str, console)
    for name in sorted(set().union(*named.values()) - set(everywhere)):
        lacking = [str(folder) for folder, files in zip(folders, named.values(), strict=True) if name not in files]
        outcome.failed.append((name, f"not in {', '.join(lacking)}"))
    if judgement.rows:
        write_atomically(target, judgement.csv())
    return outcome, judgement


def _by_name(folder: Path) -> dict[str, Path]:
    """The photographs of a folder by their path below it without suffixes, for methods write other formats than they read."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    for each in collect([str(folder)], folder):
        name = each.name
        while name.suffix.lower() in SUFFIXES:
            name = name.with_suffix("")
        if other := found.get(name.as_posix()):
            raise UserError(
                f"{other} and {each.file} have one name, {name}: one photograph must be the only one of its name"
            )
        found[name.as_posix()] = each.file
    return found


def _view(image_1CHW: torch.Tensor) -> torch.Tensor:
    """What the detector looks at: a large photograph shrunk until no side is beyond that of `VIEW`, its faces with it."""
    H, W = image_1CHW.shape[-2:]
    if (scale := VIEW[1] / max(H, W)) >= 1:
        return image_1CHW
    picture = Image.fromarray(image_1CHW[0].permute(1, 2, 0).numpy())
    smaller = picture.resize((max(1, round(scale * W)), max(1, round(scale * H))), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(smaller)).permute(2, 0, 1)[None]


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
