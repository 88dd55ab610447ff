"""Figures about deblurred faces: the faces themselves with what MTCNN finds in them, and what is found as blur grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from experiments.claims import Figure, PaperSpec
from experiments.figure_style import Estimates, half_widths, plt, series_style
from experiments.records import Record

PICTURES = "pictures.npz"
FACES = 5  # rows of the gallery
BOX, POINT, PATH = "#00e05a", "#ffd400", "#38b6ff"
Pictures = Mapping[str, np.ndarray]


def gallery(spec: PaperSpec, figure: Figure, estimates: Estimates, records: Sequence[Record]) -> Canvas | None:
    """Test faces of the first seed: kernel, blurred, restored by each row, sharp; and what MTCNN finds in each."""
    shown = [(name, found) for name in figure.rows if (found := _pictures(records, name, figure.data)) is not None]
    if not shown:
        return None
    first = shown[0][1]
    count = min(FACES, len(first["sharp"]))
    columns = [("motion", None, "kernels"), ("blurred", first, "blurred")]
    columns += [(name, found, "restored") for name, found in shown] + [("sharp", first, "sharp")]
    canvas, grid = plt.subplots(
        count, len(columns), figsize=(1.02 * len(columns), 1.06 * count + 0.3), squeeze=False,
        gridspec_kw={"wspace": 0.03, "hspace": 0.03},
    )  # fmt: skip
    for row, axes_row in enumerate(grid):
        for axes, (title, found, version) in zip(axes_row, columns, strict=True):
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=7.5)
            if found is None:
                axes.imshow(_cut_out(first["kernels"][row]), cmap="gray", interpolation="none")
            else:
                axes.imshow(found[version][row], interpolation="none")
                _mark(axes, found.get(f"faces/{version}"), row)
    return canvas


def strength(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """A percentage that MTCNN reaches, against the strength of the blur: sharp, blurred, and restored by each row."""
    head, measure = "strength/", figure.metric
    edges = sorted({float(m.split("/")[1]) for _, d, m in estimates if d == figure.data and m.startswith(head)})
    canvas, axes = plt.subplots(figsize=(3.5, 3.1))
    lines = [(version, figure.rows[0], version) for version in ("sharp", "blurred")]
    lines += [(name, name, "restored") for name in figure.rows]
    labels, drawn = [label for label, _, _ in lines], False
    for label, name, version in lines:
        found = [(e, estimates.get((name, figure.data, f"{head}{e:g}/{measure}/{version}"))) for e in edges]
        known = [(edge, row) for edge, row in found if row is not None]
        if known:
            drawn = True
            rows = [row for _, row in known]
            axes.errorbar(
                [edge for edge, _ in known], [row.mean for row in rows], yerr=half_widths(rows), capsize=2,
                label=label, **series_style(labels, label),
            )  # fmt: skip
    if not drawn:
        plt.close(canvas)
        return None
    axes.set_xlabel("blur from (face widths)")
    axes.set_xticks(edges)
    axes.set_ylim(-4, 104)  # shares: an interval that leaves the scale is cut off
    axes.set_ylabel(spec.metric(f"strength/{edges[0]:g}/{measure}/restored").label.split(",")[0] + " (%)")
    axes.set_title(figure.title)
    canvas.legend(loc="outside lower center", ncols=3, frameon=False)
    return canvas


MOTIONS = ("training", "near_linear", "deblurgan")  # rows of `blur`
MOTIONS_SHOWN = 8
SIDE = 64  # of the image that kernels are drawn for


def blur(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas:
    """What the pictures are blurred with: the first kernels of each law, on one scale, with the path of the camera."""
    from datamodules.blur import kernel_extent, motion_kernels, preset, trajectories
    from datamodules.counter_random import key_of

    canvas, grid = plt.subplots(
        len(MOTIONS), MOTIONS_SHOWN, figsize=(7.1, 0.94 * len(MOTIONS) + 0.2), squeeze=False,
        gridspec_kw={"wspace": 0.06, "hspace": 0.12},
    )  # fmt: skip
    keys_B = key_of(0, "figure", torch.arange(MOTIONS_SHOWN))
    reach = 0.17 * SIDE
    for name, axes_row in zip(MOTIONS, grid, strict=True):
        law = preset(name)
        kernels_BKK, paths_BM2 = motion_kernels(law, keys_B, SIDE), trajectories(law, keys_B, SIDE)
        extents = (kernel_extent(kernels_BKK) / SIDE).tolist()
        for axes, kernel_KK, path_M2, extent in zip(axes_row, kernels_BKK, paths_BM2, extents, strict=True):
            half = kernel_KK.shape[-1] / 2
            brightest = float(kernel_KK.max())
            axes.set_facecolor("black")
            axes.imshow(kernel_KK.sqrt(), cmap="gray", vmin=0, vmax=brightest**0.5, extent=(-half, half, half, -half))
            axes.plot(*path_M2.T.numpy(), color=PATH, linewidth=0.6)
            axes.set(xlim=(-reach, reach), ylim=(reach, -reach), xticks=[], yticks=[])
            axes.text(0.04, 0.05, f"{100 * extent:.0f} %", transform=axes.transAxes, fontsize=6, color="white")
        axes_row[0].set_ylabel(name.replace("_", "-"), fontsize=8)
    return canvas


def _pictures(records: Sequence[Record], ablation: str, data: str) -> Pictures | None:
    """What the first seed of an ablation kept."""
    mine = [r for r in records if (r.key.ablation, r.key.data) == (ablation, data) and r.state == "done"]
    for record in sorted(mine, key=lambda r: r.key.seed)[:1]:
        if (record.path / PICTURES).exists():
            with np.load(record.path / PICTURES, allow_pickle=False) as opened:
                return {name: opened[name] for name in opened.files}
    return None


def _cut_out(kernel_KK: np.ndarray) -> np.ndarray:
    """The middle of a kernel, as much as holds it all, at least 9 pixels."""
    centre = len(kernel_KK) // 2
    rows, columns = np.nonzero(kernel_KK > kernel_KK.max() / 200)
    reach = max(4, int(max(abs(rows - centre).max(), abs(columns - centre).max())) + 1)
    low, high = max(0, centre - reach), min(len(kernel_KK), centre + reach + 1)
    return kernel_KK[low:high, low:high]


def _mark(axes: Any, faces_N15: np.ndarray | None, row: int) -> None:
    """The most probable face of an image; its confidence is cut off, not rounded: 0.9996 is not certain."""
    if faces_N15 is None:
        return
    prob, box, points = faces_N15[row, 0], faces_N15[row, 1:5], faces_N15[row, 5:].reshape(5, 2)
    if np.isnan(prob):
        text = "no face"
    else:
        text = f"{np.floor(1000 * prob) / 1000:.3f}"
        size = box[2] - box[0], box[3] - box[1]
        axes.add_patch(Rectangle((box[0], box[1]), *size, fill=False, edgecolor=BOX, linewidth=0.8))
        axes.plot(points[:, 0], points[:, 1], ".", color=POINT, markersize=2)
    axes.text(
        0.03, 0.03, text, transform=axes.transAxes, fontsize=6, color="white", va="bottom",
        bbox={"facecolor": "black", "alpha": 0.65, "pad": 0.8, "linewidth": 0},
    )  # fmt: skip
