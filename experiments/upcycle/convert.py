"""A dense Hugging Face checkpoint into a mixture of experts, streamed layer by layer, with a receipt.

Method: arXiv 2410.07524, in lit_modules.ops.upcycling; here are only files and names. At no time is more held than one
layer of the mixture (with `measure` also a float32 copy of it) or the embedding, whichever is larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.errors import UserError
from experiments.upcycle.hosts import ACTIVATIONS, choose_host, extra_shapes, host_config
from experiments.upcycle.measure import DenseWalk, Step0, measure_step0, sample_tokens
from experiments.upcycle.names import host_tensors
from experiments.upcycle.receipt import receipt_of
from experiments.upcycle.source import Source
from experiments.upcycle.writer import Shards, copy_tokenizer, whole_or_nothing, write_json
from lit_modules.ops.upcycling import Plan, Recipe, Target, UpcycleError, plan, upcycled_tensors

SIGMA = 0.01  # softmax_topk: spread of the router's logits that makes step 0 about 1.4% too large at E = 8
STD = 0.02  # topk_softmax: any router is exact


@dataclass(frozen=True)
class Options:
    """What to make of a dense checkpoint; the words are those of lit_modules.ops.upcycling.

    Attributes:
        layers: indices of the layers that become mixtures; None for all.
        host: the Hugging Face architecture, or None to choose.
        router_std: None for 0.01 / sqrt(D) with softmax_topk, whose start is exact only for small logits, else 0.02.
        balance: our coefficient of the load-balancing loss, for the configuration.
        measure: whether to compare every layer with its parent's on a sample text; needs transformers.
        text: the sample, or None for a built-in one.
    """

    expansion: int = 8
    granularity: int = 1
    top_k: int = 2
    order: str = "softmax_topk"
    scale: str | float = "exact"
    init: str = "virtual_group"
    router_std: float | None = None
    layers: tuple[int, ...] | None = None
    permute: bool = False
    reinit: float = 0.0
    reinit_rule: str = "qwen2"
    noise: float = 0.0
    seed: int = 0
    host: str | None = None
    balance: float = 1e-2
    measure: bool = True
    text: str | None = None


@dataclass(frozen=True)
class Conversion:
    """A conversion that fits, before any weight is read."""

    source: Source
    options: Options
    target: Target
    recipe: Recipe
    host: str
    plan: Plan
    config: dict[str, Any]
    warnings: tuple[str, ...]


def prepare(source: Source, options: Options) -> Conversion:
    """Check everything that can be checked without weights.

    Raises:
        UserError: numbers that do not fit together or into the source, a host that cannot hold the result.
    """
    config = source.config
    count = config["num_hidden_layers"]
    layers = tuple(range(count)) if options.layers is None else tuple(sorted(set(options.layers)))
    if not layers or not all(0 <= i < count for i in layers):
        raise UserError(f"layers are indices from 0 to {count - 1}, got {list(layers)}")
    if options.scale == "output":
        raise UserError("no Hugging Face architecture here has an output factor; scale=down_only has the same start")
    try:
        recipe = _recipe(options, config)
        target = Target(
            options.expansion,
            options.granularity,
            options.top_k,
            options.order,
            ACTIVATIONS[config["hidden_act"]],
            layers,
            router_std=recipe.router_std,
        )
        host = choose_host(config, options.order, len(layers) < count, options.host)
        made = plan(source.shapes, target_shapes(source.shapes, target), target, recipe)
    except UpcycleError as error:
        raise UserError(f"this checkpoint cannot be upcycled so:\n{error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    width = config["intermediate_size"] // options.granularity
    dense = [i for i in range(count) if i not in layers]
    host_cfg = host_config(config, host, target.experts, width, target.top_k, target.order, dense, options.balance)
    return Conversion(
        source, options, target, recipe, host, made, host_cfg, source.warnings + _cautions(source, target, made)
    )


def _recipe(options: Options, config: Mapping[str, Any]) -> Recipe:
    std = options.router_std
    if std is None:
        std = SIGMA / math.sqrt(config["hidden_size"]) if options.order == "softmax_topk" else STD
    return Recipe(
        options.init,
        options.scale,
        std,
        options.permute,
        options.reinit,
        options.reinit_rule,
        config["initializer_range"],
        options.noise,
    )


def target_shapes(shapes: Mapping[str, Sequence[int]], target: Target) -> dict[str, tuple[int, ...]]:
    """Return the mixture's keys and shapes, in a model's order.

    Raises:
        UserError: G does not divide the MLP's hidden width.
    """
    made: dict[str, tuple[int, ...]] = {}
    mixed = {f"blocks.{i}.mlp" for i in target.layers}
    for key, shape in shapes.items():
        module, _, name = key.removesuffix(".weight").rpartition(".")
        if module not in mixed:
            made[key] = tuple(shape)
            continue
        D, F = shape if name == "down" else reversed(shape)
        if F % target.granularity:
            raise UserError(f"the MLP's hidden width {F} is not divisible by G={target.granularity}")
        width = F // target.granularity
        made.setdefault(f"{module}.router.weight", (target.experts, D))
        made[f"{module}.{name}"] = (target.experts, D, width) if name == "down" else (target.experts, width, D)
    return made


def _cautions(source: Source, target: Target, made: Plan) -> tuple[str, ...]:
    found = made.receipt.warnings
    probe = source["norm.weight"].dtype
    if probe in (torch.bfloat16, torch.float16):
        text = f"weights are {str(probe).removeprefix('torch.')}: Hugging Face computes router logits in it"
        if target.granularity > 1:
            text += ", where near-ties between groups become ties and break virtual groups; train with a float32 router"
        found += (text,)
    return found


def convert(source: Source, folder: Path, options: Options, force: bool = False) -> dict[str, Any]:
    """Write the mixture into `folder` and return the receipt, which is also written there as receipt.json.

    Raises:
        UserError: as `prepare`, or a target that exists and may not be replaced. Nothing is left under its name then.
    """
    job = prepare(source, options)
    count = source.config["num_hidden_layers"]
    with whole_or_nothing(folder, force) as partial:
        shards = Shards(partial, count + 2)
        walk = None
        if options.measure:
            tokens_S = sample_tokens(source.tokenizer, source.config["vocab_size"], options.text)
            walk = DenseWalk(source, tokens_S)
        layers: dict[int, Step0] = {}
        for place, made in grouped(job):
            if walk is not None and place.isdigit():
                _measure(job, walk, int(place), made, layers)
            shards.write(dict(_hosted(job, place, made)))
            made.clear()
        shards.finish()
        write_json(partial / "config.json", job.config)
        files = copy_tokenizer(source.tokenizer, partial)
        receipt = receipt_of(job, layers, walk.hidden.shape[1] if walk else 0, files, shards.size)
        write_json(partial / "receipt.json", receipt)
    return receipt


def grouped(job: Conversion) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (place, {our key: tensor}) for the embedding, every layer by its index, and the rest.

    Who takes one clears it, or two are held.
    """
    generator = torch.Generator().manual_seed(job.options.seed)
    held: dict[str, Tensor] = {}
    current = "embedding"
    for key, tensor in upcycled_tensors(job.plan, job.source, generator):
        parts = key.split(".")
        place = parts[1] if parts[0] == "blocks" else "embedding" if parts[0] == "embedding" else "end"
        if place != current:
            yield current, held
            current, held = place, {}
        # the router too: Hugging Face loads a checkpoint in one dtype
        held[key] = tensor.to(job.source["norm.weight"].dtype) if key.endswith("router.weight") else tensor
        del tensor
    yield current, held


def _measure(
    job: Conversion, walk: DenseWalk, layer: int, made: Mapping[str, Tensor], layers: dict[int, Step0]
) -> None:
    x_SD, y_SD = walk.step(layer)
    if layer not in job.target.layers:
        return
    prefix, target = f"blocks.{layer}.mlp.", job.target
    experts = {key.removeprefix(prefix): tensor for key, tensor in made.items() if key.startswith(prefix)}
    order: Any = target.order
    layers[layer] = measure_step0(x_SD, y_SD, experts, target.top_k, order, target.granularity, target.activation)


def _hosted(job: Conversion, place: str, made: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the host's names and tensors of one place, with what the host has and we have not."""
    for key, tensor in made.items():
        yield from host_tensors(job.host, key, tensor)
    if place.isdigit() and int(place) in job.target.layers:
        like = next(iter(made.values()))
        for key, shape in extra_shapes(job.host, int(place), job.source.config["hidden_size"]).items():
            yield key, like.new_zeros(shape)
