"""Commands of paper 2's tools: `fivefold deblur | deblur-export | deblur-synth | deblur-judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(emoji=False)
TABLE = 140  # columns: a Markdown table is not to be cut off where a terminal ends

InOut = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PHOTOS... OUT", help="Files, folders or quoted patterns; then a folder, or a file for one."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="A run's folder or the start of its signature, a best.ckpt, an ablation such as naf, or an .onnx file; default "
        "the best finished run of naf_full.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace outputs that exist; an input never is.")]


@app.command()
def deblur(
    paths: InOut = None,
    weights: Weights = None,
    whole: Annotated[
        bool, typer.Option("--whole/--faces", help="Restore whole photographs, or the faces that MTCNN finds.")
    ] = False,
    strength: Annotated[float, typer.Option(help="From 0, the photograph as it is, to 1, as restored.")] = 1.0,
    shrink: Annotated[
        float | None,
        typer.Option(
            help="With --whole, restore at 1/F of the size; default what brings the largest face to the net's."
        ),
    ] = None,
    largest: Annotated[
        float, typer.Option(help="With --faces, let larger faces be restored at up to so many times the net's size.")
    ] = 1.0,
    tile: Annotated[
        int | None,
        typer.Option(help="Side in pixels of what is restored at once; default the size the net was trained on."),
    ] = None,
    overlap: Annotated[int | None, typer.Option(help="What neighbouring tiles share; default half a tile.")] = None,
    sure: Annotated[float, typer.Option(help="MTCNN's probability from which on a face is one.")] = 0.7,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also write OUTPUT.compare.png: before, after, difference.")
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write OUTPUT.faces.png: MTCNN's faces before and after.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")] = "auto",
    force: Force = False,
    card: Annotated[bool, typer.Option("--card", help="Only say what the generator is and is not for.")] = False,
) -> None:
    """Take motion blur off faces in photographs, or off whole photographs.

    Photographs keep their size, names, format, EXIF, colour profile and alpha, and come out upright. Around faces no pixel
    changes, but for what JPEG and other lossy formats do to all when they are written, at quality 95. A photograph without a
    face is copied as it is and noted. What cannot be read is noted, and the exit status is then 1. Restored detail may be
    invented: not for identification, see --card.
    """
    from experiments.deblur.restore import Options, plan, ready, restore_all
    from experiments.deblur.weights import device_of, load

    runs = _runs()
    if card:
        console.print(load(weights, runs, device_of("cpu")).facts.card, markup=False, highlight=False, soft_wrap=True)
        return
    words, out = _in_and_out(paths)
    options = Options(
        whole=whole,
        strength=strength,
        shrink=shrink,
        largest=largest,
        tile=tile,
        overlap=overlap,
        sure=sure,
        compare=compare,
        overlay=overlay,
        force=force,
    )
    jobs = plan(words, out, options)
    ready(out)
    restorer = load(weights, runs, device_of(device))
    console.print(
        f"restored by {restorer.facts.name}, on {restorer.device}", markup=False, highlight=False, soft_wrap=True
    )
    outcome = restore_all(jobs, restorer, restorer.facts.size, options, console)
    raise typer.Exit(outcome.show(console, "photographs written"))


@app.command("deblur-export")
def deblur_export(
    run: Annotated[str, typer.Argument(help="A run: see --weights of `fivefold deblur`.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx")],
    force: Force = False,
) -> None:
    """Write a generator as an ONNX file for any batch, height and width, checked against PyTorch (the extra 'onnx')."""
    from experiments.deblur.onnx_export import OPSET, TOLERANCE, export

    facts, differences = export(run, target, _runs(), force)
    for shape, off in differences:
        console.print(f"{shape:>16}: differs from PyTorch by at most {off:.2g}", highlight=False)
    size = target.stat().st_size / 2**20
    console.print(
        f"{target}: {facts.name}; {size:.2f} MiB, opset {OPSET}, every difference at most {TOLERANCE:g}; facts, model card "
        "and licences inside",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command("deblur-synth")
def deblur_synth(
    paths: InOut = None,
    preset: Annotated[
        str, typer.Option(help="A law of motion, such as near_linear, mild, severe, deblurgan.")
    ] = "near_linear",
    seed: Annotated[int, typer.Option(help="Another seed blurs every photograph otherwise.")] = 0,
    camera: Annotated[
        str, typer.Option(help="ideal; sensor (noise); light (blur of light, noise); night (and saturation).")
    ] = "sensor",
    of: Annotated[
        str, typer.Option(help="What extents are shares of: the picture's shorter side, or its face's aligned square.")
    ] = "picture",
    force: Force = False,
) -> None:
    """Make blurred and sharp pairs of sharp photographs, with their kernels as PNG and a CSV of how each was made."""
    from experiments.deblur.restore import ready
    from experiments.deblur.synth import Law, synthesise

    words, out = _in_and_out(paths)
    ready(out)
    outcome = synthesise(words, out, Law(preset, camera, of, seed), force, console)  # type: ignore[arg-type]
    raise typer.Exit(outcome.show(console, f"pairs written to {out}"))


@app.command("deblur-judge")
def deblur_judge(
    sharp: Annotated[Path, typer.Argument(help="A folder of sharp photographs.")],
    blurred: Annotated[Path, typer.Argument(help="A folder of their blurred versions, of the same names.")],
    restored: Annotated[Path | None, typer.Argument(help="A folder of what any method made of these.")] = None,
    csv: Annotated[Path, typer.Option(help="Where a row per photograph is written.")] = Path("deblur-judge.csv"),
    force: Force = False,
) -> None:
    """Measure PSNR, SSIM and what MTCNN finds, of any method's photographs; print a Markdown table, write a CSV."""
    from experiments.deblur.judge import judge_folders

    folders = [folder for folder in (sharp, blurred, restored) if folder is not None]
    outcome, judgement = judge_folders(folders, csv, force, console)
    if judgement.rows:
        Console(width=max(TABLE, console.width)).print(judgement.table())
        console.print(judgement.remarks(), soft_wrap=True, highlight=False)
    raise typer.Exit(outcome.show(console, f"photographs judged, see {csv}"))


def _in_and_out(paths: list[str] | None) -> tuple[list[str], Path]:
    from experiments.errors import UserError

    if paths is None or len(paths) < 2:
        raise UserError(
            f"give photographs and, last, where to write to: PHOTOS... OUT; got {' '.join(paths or ['nothing'])}"
        )
    return paths[:-1], Path(paths[-1])


def _runs() -> Path:
    from experiments.reproduce import Places

    return Places.default().runs
