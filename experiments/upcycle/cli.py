"""Commands of paper 1's tools: `fivefold upcycle | upcycle-{verify,inspect,export,continue} | price | evaluate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(emoji=False)

Source = Annotated[
    str, typer.Argument(help="A dense Hugging Face directory, or 'smollm2' for the packaged SmolLM2-135M.")
]
E = Annotated[int, typer.Option("--E", min=1, help="Expansion: parameters of the experts against the dense MLP.")]
G = Annotated[int, typer.Option("--G", min=1, help="Granularity: experts are this much narrower than the dense MLP.")]
T = Annotated[int, typer.Option("--T", min=1, help="Experts per token; as much computation as dense where T = G.")]
Order = Annotated[str, typer.Option(help="softmax_topk (the paper's choice) or topk_softmax (Mixtral's).")]
Scale = Annotated[str, typer.Option(help="exact, paper, down_only, none, or a number.")]
Force = Annotated[bool, typer.Option("--force", help="Replace TARGET if it exists, once the new one is whole.")]
Text = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="A text to measure on, not the built-in one.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the router and of all that makes copies differ.")]
Aux = Annotated[float, typer.Option(min=0.0, help="Load-balancing coefficient, ours; config.json gets it over T.")]


@app.command()
def upcycle(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The Hugging Face directory to write.")],
    expansion: E = 8,
    granularity: G = 1,
    top_k: T = 2,
    order: Order = "softmax_topk",
    scale: Scale = "exact",
    init: Annotated[str, typer.Option(help="virtual_group, or random_router (the paper's control).")] = "virtual_group",
    router_std: Annotated[
        float | None, typer.Option(help="Of router weights; default: small enough to start true.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers, such as 0-11,23; default all.")] = None,
    permute: Annotated[bool, typer.Option("--permute", help="Every replica in its own order of hidden units.")] = False,
    reinit: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of expert weights drawn anew.")] = 0.0,
    reinit_rule: Annotated[str, typer.Option(help="qwen2 (entries) or drop_upcycling (whole units).")] = "qwen2",
    noise: Annotated[
        float, typer.Option(min=0.0, help="Noise on half of the entries, relative to their spread.")
    ] = 0.0,
    seed: Seed = 0,
    host: Annotated[
        str | None, typer.Option(help="mixtral, qwen2_moe or qwen3_moe; default by source and order.")
    ] = None,
    aux: Aux = 1e-2,
    measure: Annotated[bool, typer.Option(help="Compare every layer with its parent on a text.")] = True,
    text: Text = None,
    force: Force = False,
) -> None:
    """Make a mixture of experts out of a dense checkpoint; it loads in transformers without remote code."""
    from experiments.upcycle.convert import Options, convert
    from experiments.upcycle.smollm2 import opened

    options = Options(
        expansion=expansion,
        granularity=granularity,
        top_k=top_k,
        order=order,
        scale=_scale(scale),
        init=init,
        router_std=router_std,
        layers=_layers(layers),
        permute=permute,
        reinit=reinit,
        reinit_rule=reinit_rule,
        noise=noise,
        seed=seed,
        host=host,
        balance=aux,
        measure=measure,
        text=text.read_text() if text else None,
    )
    with opened(source) as dense:
        receipt = convert(dense, target, options, force)
    _show_receipt(target, receipt)


@app.command("upcycle-verify")
def upcycle_verify(
    dense: Source,
    moe: Annotated[Path, typer.Argument(help="The mixture's Hugging Face directory.")],
    text: Text = None,
    tolerance: Annotated[float | None, typer.Option(help="Fail where a logit differs by more.")] = None,
) -> None:
    """Run parent and mixture on a text in float32 and print how far their logits are apart."""
    from experiments.upcycle.check import verify

    found = verify(dense, moe, text.read_text() if text else None)
    console.print(
        f"{found.tokens} tokens: logits differ by at most {found.max_logit:.3g}, by {found.mean_logit:.3g} on average "
        f"(the dense model's spread by {found.logit_std:.3g}); same most likely token at {found.same_choice:.1%}; "
        f"loss {found.loss_dense:.4f} dense, {found.loss_moe:.4f} mixture",
        soft_wrap=True,
    )
    if tolerance is not None and not found.max_logit <= tolerance:
        console.print(f"more than {tolerance:g}")
        raise typer.Exit(1)


@app.command("upcycle-inspect")
def upcycle_inspect(
    moe: Annotated[Path, typer.Argument(help="The mixture's Hugging Face directory.")], dense: Source
) -> None:
    """Print how far each layer's experts have moved from their parent and from one another, and the router's spread."""
    from experiments.upcycle.check import inspect_experts

    table = _table("layer", "cosine to parent", "least", "between replicas", "router std")
    for row in inspect_experts(moe, dense):
        replicas = "-" if row.replicas is None else f"{row.replicas:.4f}"
        table.add_row(str(row.layer), f"{row.parent:.4f}", f"{row.parent_least:.4f}", replicas, f"{row.router_std:.3g}")
    console.print(table)


@app.command("upcycle-export")
def upcycle_export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's checkpoint, such as runs/SIGNATURE/best.ckpt.")],
    target: Annotated[Path, typer.Argument(help="The Hugging Face directory to write.")],
    aux: Aux = 1e-2,
    force: Force = False,
) -> None:
    """Write a net trained here as a Hugging Face directory (gated activations only)."""
    from experiments.upcycle.export import export, load_run

    net, context = load_run(checkpoint)
    config = export(net, target, context, aux, force)
    console.print(f"{target}: {config['architectures'][0]}", soft_wrap=True)


@app.command("upcycle-continue")
def upcycle_continue(
    steps: Annotated[int, typer.Option(min=1)] = 30,
    context: Annotated[int, typer.Option(min=2)] = 128,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 5,
    val_windows: Annotated[int, typer.Option(min=1, help="Sequences of the evaluation set.")] = 8,
    lr: Annotated[float, typer.Option(min=0.0)] = 2e-5,
    expansion: E = 4,
    granularity: G = 1,
    top_k: T = 2,
    order: Order = "softmax_topk",
    scale: Scale = "exact",
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Where to write the losses.")] = None,
) -> None:
    """Train SmolLM2 on, dense and upcycled, on the same novels in the same order. A few dozen steps decide nothing."""
    import torch

    from experiments.upcycle.continue_smollm2 import Setting, run

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    setting = Setting(
        *(steps, context, batch, every, val_windows),
        lr=lr,
        expansion=expansion,
        granularity=granularity,
        top_k=top_k,
        order=order,
        scale=_scale(scale),
        seed=seed,
    )
    console.print("arm     step  tokens   train     val  seconds")

    def say(row: Any) -> None:
        train = "     -" if row.train is None else f"{row.train:6.4f}"
        console.print(
            f"{row.arm:5} {row.step:6} {row.tokens:7}  {train}  {row.val:6.4f}  {row.seconds:7.0f}", highlight=False
        )

    run(setting, csv, say)


@app.command()
def price(
    size: Annotated[str, typer.Argument(help="A named size, or 'all'.")],
    expansion: Annotated[int | None, typer.Option("--E", min=1, help="As a mixture with this expansion.")] = None,
    granularity: G = 1,
    top_k: T = 1,
    order: Order = "softmax_topk",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 1024,
    precision: Annotated[str, typer.Option(help="fp32 or bf16-mixed.")] = "bf16-mixed",
) -> None:
    """Print what a named size costs, dense and as a mixture: parameters, FLOPs and memory. Nothing is built."""
    from experiments.upcycle.costs import priced

    table = _table("size", "params", "active", "FLOPs", "train", "W", "grad", "Adam", "seq")
    for name, row in priced(size, expansion, granularity, top_k, order, context, precision):
        counts = (row.params, row.params_active, row.flops_forward, row.flops_training)
        sizes = (row.bytes_weights, row.bytes_gradients, row.bytes_adam, row.bytes_activations)
        table.add_row(
            name, *map(_count, counts), *(f"{value / 2**30:{'.3g' if value >= 2**30 else '.3f'}}" for value in sizes)
        )
    console.print(table)
    console.print(
        f"FLOPs per token of {context}: forward, and with backward (train). GiB of weights (W), gradients, Adam's moments and "
        f"activations of one sequence, {precision}.",
        soft_wrap=True,
    )


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face directory.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks or groups, with commas between.")] = "mmlu",
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task; default all.")] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; default each task's own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    include: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder with own task files.")
    ] = None,
) -> None:
    """Score a checkpoint on tasks of lm-evaluation-harness (the extra 'evaluate')."""
    from experiments.upcycle.evaluate import evaluate as score

    table = _table("task", "metric", "value")
    for task, metrics in score(folder, tasks.split(","), limit, few_shot, batch, device, include).items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric, f"{value:.4f}")
    console.print(table)
    if limit is not None:
        console.print(f"Of {limit} examples per task: not comparable with published scores.")


def _scale(word: str) -> Any:
    try:
        return float(word)
    except ValueError:
        return word


def _layers(word: str | None) -> tuple[int, ...] | None:
    """Read "0-11,23".

    Raises:
        UserError: something else.
    """
    from experiments.errors import UserError

    if word is None:
        return None
    found: list[int] = []
    for part in word.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or "-" not in part)):
            raise UserError(f"--layers is like 0-11,23; got '{word}'")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def _table(first: str, *rest: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in rest:
        table.add_column(name, justify="right")
    return table


def _count(value: float) -> str:
    for unit in ("", "K", "M", "G", "T", "P"):
        if value < 999.5:  # which would be shown as 1e+03
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}E"


def _show_receipt(target: Path, receipt: dict[str, Any]) -> None:
    params, flops, step0 = receipt["parameters"], receipt["flops_per_token"], receipt["step0"]
    console.print(
        f"{target}: {receipt['host']}, {receipt['bytes'] / 2**20:.1f} MiB, receipt.json inside", soft_wrap=True
    )
    console.print(
        f"parameters {_count(params['before'])} -> {_count(params['after'])}, {_count(params['active'])} active; "
        f"FLOPs per token {_count(flops['before'])} -> {_count(flops['after'])} (context {flops['context']})",
        soft_wrap=True,
    )
    if step0:
        console.print(
            f"before training, on {step0['tokens']} tokens: MLP outputs differ from the parent's by at most "
            f"{step0['largest_relative_error']:.2g} relative (layer {step0['at_layer']})",
            soft_wrap=True,
        )
    for warning in receipt["warnings"]:
        console.print(f"note: {warning}", soft_wrap=True, markup=False)
