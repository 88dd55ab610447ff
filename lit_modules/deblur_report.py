"""What a deblurring method does to test faces, image by image: closeness to the sharp image, and what MTCNN finds.

Legend: B images, C channels, H height, W width. Percent and dB throughout. A mean over nothing is left out, and so are
images from means of PSNR where one version equals the sharp image.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.blur_kernels import kernel_extent
from datamodules.blur_motion import FACE_WIDTH
from lit_modules.face_judge import FaceJudge
from lit_modules.nets.perceptual import perceptual
from lit_modules.ops.detection import THRESHOLDS, Faces, FaceScores, indicators, join_scores, recovery, score_faces
from lit_modules.ops.image_quality import psnr, ssim

VERSIONS = ("blurred", "restored")
STRENGTHS = (0.15, 0.25, 0.35, 0.45)  # edges of the bins of blur strength, in face widths
Restore = Callable[[Tensor], Tensor]


class DeblurReport:
    """Measure restored test faces; the blurred input is always measured beside them.

    For each test set, whose first one is the headline:
    `<set>/psnr/<version>` in dB and `<set>/ssim/<version>` in percent, versions blurred and restored, and `…/gain`, the mean
    difference; `<set>/<features>/<version>`, the distance on a feature network, by its name;
    with a judge also `<set>/detected_<t>/<version>` in percent, `prob` and `iou` in percent, `landmark_error` in percent of
    the distance between the eyes and over how many faces, `false_positives` per image; versions sharp, blurred, restored,
    and `recovery`, the percent of what the blur took that was given back.
    Of the first set: `strength/<edge>/…` the same for blur from that many face widths on up to the next edge, and
    `unblurred/psnr/restored`, what is left of an image that was sharp.
    `speed/images_per_second` in batches, and `speed/latency_ms` of a single image, on the device at hand.
    images.csv in the run's folder has a row per image of each set and of each bin of strength, in columns named like the
    metrics, which are their means; pictures.npz has the first images of the first set.

    Args:
        judge: whether MTCNN looks at the images.
        features: a feature network for a perceptual distance, "none" for none.
        pictures: images kept.
    """

    def __init__(self, judge: bool = True, features: str = "none", pictures: int = 8) -> None:
        self.judge = FaceJudge() if judge else None
        self.features = perceptual(features)
        self.pictures = pictures
        self.names: Sequence[str] = ()

    def start(self, names: Sequence[str]) -> None:
        """Forget everything; `names` are of the test sets, in the order they will come in."""
        self.names = names
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, dict[str, list[FaceScores]]] = {name: {} for name in names}
        self.kept: dict[str, list[np.ndarray]] = {}
        self.clock: list[tuple[int, float]] = []
        self.latency: list[float] = []

    def add(self, number: int, pairs: Any, restored_BCHW: Tensor, restore: Restore) -> None:
        """Take in a batch of a test set.

        Args:
            number: which test set.
            pairs: with blurred and sharp (B, 3, H, W), index (B,) and kernels (B, K, K).
            restored_BCHW: what became of the blurred images, in [0, 1].
            restore: what restores a batch, to be timed and fed sharp images.
        """
        name, images = self.names[number], {"blurred": pairs.blurred, "restored": restored_BCHW}
        columns: dict[str, Tensor] = {"extent": kernel_extent(pairs.kernels) / (FACE_WIDTH * pairs.sharp.shape[-1])}
        for version, x_BCHW in images.items():
            columns[f"psnr/{version}"] = psnr(x_BCHW, pairs.sharp)
            columns[f"ssim/{version}"] = 100 * ssim(x_BCHW, pairs.sharp)
            if self.features is not None:
                columns[f"{self.features.name}/{version}"] = self.features.perceptual_distance(x_BCHW, pairs.sharp)
        if number == 0:
            left_B = psnr(self._timed(restore, pairs.sharp), pairs.sharp).tolist()
            rows = zip(pairs.index.tolist(), left_B, strict=True)
            self.rows += [{"set": "unblurred", "index": int(index), "psnr/restored": left} for index, left in rows]
            self._keep(pairs, restored_BCHW)
        if self.judge is not None:
            sharp, blurred = self.judge.detect_kept(pairs.sharp), self.judge.detect_kept(pairs.blurred)
            found = {"sharp": sharp, "blurred": blurred, "restored": self.judge.detect(restored_BCHW)}
            if number == 0:
                self._keep_faces(found)
            for version, faces in found.items():
                scores = score_faces(faces, sharp)
                self.scores[name].setdefault(version, []).append(scores)
                columns[f"prob/{version}"], columns[f"iou/{version}"] = 100 * scores.prob_B, 100 * scores.iou_B
                for t in THRESHOLDS:
                    found_B = 100 * (scores.prob_B >= t).double()
                    columns[f"detected_{t:g}/{version}"] = found_B.where(scores.counted_B, torch.nan)
        for measure in ("psnr", "ssim", self.features.name if self.features is not None else "ssim"):
            columns[f"{measure}/gain"] = columns[f"{measure}/restored"] - columns[f"{measure}/blurred"]
        for at, index in enumerate(pairs.index.tolist()):
            values = {column: float(value_B[at]) for column, value_B in columns.items()}
            self.rows.append({"set": name, "index": int(index), **values})

    def finish(self, folder: str | Path) -> dict[str, float]:
        """Return all metrics by name, and write images.csv and pictures.npz into `folder`."""
        found: dict[str, float] = {}
        for name in self.names:
            rows = [row for row in self.rows if row["set"] == name]
            scores = {version: join_scores(parts) for version, parts in self.scores[name].items()}
            found |= self._summary(name, rows, scores, torch.ones(len(rows), dtype=torch.bool))
        found |= self._by_strength()
        left = [row["psnr/restored"] for row in self.rows if row["set"] == "unblurred"]
        if finite := [value for value in left if np.isfinite(value)]:
            found["unblurred/psnr/restored"] = float(np.mean(finite))
        if self.clock:
            images, seconds = (sum(column) for column in zip(*self.clock, strict=True))
            found["speed/images_per_second"] = images / seconds
            found["speed/latency_ms"] = 1000 * float(np.median(self.latency))
        self._write(Path(folder))
        return found

    def _summary(
        self, name: str, rows: list[dict[str, Any]], scores: Mapping[str, FaceScores], chosen_B: Tensor
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        measures = ["psnr", "ssim"] + ([self.features.name] if self.features is not None else [])
        picked = [row for row, choose in zip(rows, chosen_B.tolist(), strict=True) if choose]
        for measure in measures:
            values = np.array([[row[f"{measure}/{version}"] for version in VERSIONS] for row in picked]).reshape(-1, 2)
            values = values[np.isfinite(values).all(1)]  # an image that equals the sharp one has no finite PSNR
            means = dict(zip(VERSIONS, values.mean(0).tolist(), strict=True)) if len(values) else {}
            found |= {f"{name}/{measure}/{version}": mean for version, mean in means.items()}
            if means:
                found[f"{name}/{measure}/gain"] = means["restored"] - means["blurred"]
        if scores:
            found |= _judged(
                name, {version: FaceScores(*(c[chosen_B] for c in table)) for version, table in scores.items()}
            )
        return found

    def _by_strength(self) -> dict[str, float]:
        first = self.names[0]
        rows = [row for row in self.rows if row["set"] == first]
        scores = {version: join_scores(parts) for version, parts in self.scores[first].items()}
        extent_B = torch.tensor([row["extent"] for row in rows])
        found: dict[str, float] = {}
        for low, high in zip(STRENGTHS, (*STRENGTHS[1:], float("inf")), strict=True):
            chosen_B = (extent_B >= low) & (extent_B < high)
            if chosen_B.any():
                name = f"strength/{low:g}"
                found |= self._summary(name, rows, scores, chosen_B)
                found[f"{name}/n"] = float(chosen_B.sum())
                picked = [row for row, choose in zip(rows, chosen_B.tolist(), strict=True) if choose]
                self.rows += [{**row, "set": name} for row in picked]
        return found

    def _timed(self, restore: Restore, images_BCHW: Tensor) -> Tensor:
        wait = torch.cuda.synchronize if images_BCHW.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        restored_BCHW = restore(images_BCHW)
        wait()
        self.clock.append((len(images_BCHW), time.perf_counter() - started))
        for image_CHW in images_BCHW[:4]:
            started = time.perf_counter()
            restore(image_CHW[None])
            wait()
            self.latency.append(time.perf_counter() - started)
        return restored_BCHW

    def _keep(self, pairs: Any, restored_BCHW: Tensor) -> None:
        room = self.pictures - sum(len(part) for part in self.kept.get("index", []))
        if room <= 0:
            return
        for name, images in {"blurred": pairs.blurred, "restored": restored_BCHW, "sharp": pairs.sharp}.items():
            bytes_BHWC = (images[:room].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            self.kept.setdefault(name, []).append(bytes_BHWC)
        self.kept.setdefault("kernels", []).append(pairs.kernels[:room].float().cpu().numpy())
        self.kept.setdefault("index", []).append(pairs.index[:room].cpu().numpy())

    def _keep_faces(self, found: Mapping[str, Sequence[Faces]]) -> None:
        """The most probable face of each kept image, (probability, box, points); NaN where there is none."""
        for version, faces in found.items():
            room = self.pictures - sum(len(part) for part in self.kept.get(f"faces/{version}", []))
            rows = [
                torch.cat([f.probs_F[:1], f.boxes_F4[0], f.points_F52[0].flatten()])
                if len(f)
                else torch.full((15,), torch.nan)
                for f in faces[:room]
            ]
            if rows:
                self.kept.setdefault(f"faces/{version}", []).append(torch.stack(rows).numpy())

    def _write(self, folder: Path) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(folder / "images.csv", "w", newline="") as handle:
            table = csv.DictWriter(handle, names, restval="")
            table.writeheader()
            table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows)
        if self.kept:
            arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self.kept.items()}
            np.savez_compressed(folder / "pictures.npz", **arrays)


def _judged(name: str, scores: Mapping[str, FaceScores]) -> dict[str, float]:
    """The judge's indicators of each version, shares in percent, and how much of each was recovered."""
    tables = {version: indicators(table) for version, table in scores.items()}
    found: dict[str, float] = {}
    for indicator in tables["sharp"]:
        factor = 1.0 if indicator in ("false_positives", "landmark_n", "n") else 100.0
        values = {version: table[indicator] for version, table in tables.items()}
        found |= {f"{name}/{indicator}/{v}": factor * value for v, value in values.items() if value is not None}
        if indicator not in ("false_positives", "landmark_n", "n", "landmark_error"):
            back = recovery(values["sharp"], values["blurred"], values["restored"])
            found |= {f"{name}/{indicator}/recovery": 100 * back} if back is not None else {}
    return found
