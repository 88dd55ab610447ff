"""What a cell costs before it runs, and whether it could run at all: every part of it is imported, checked and built."""

from __future__ import annotations

import hashlib
import inspect
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from experiments import memo
from experiments.cell import Cell, canonical, origin_of, targets_of
from experiments.claims import PaperSpec
from experiments.provenance import lock_digest
from experiments.records import CellKey
from experiments.schema import ConfigError, Data, check_targets, default_of, nearest
from experiments.sources_digest import closure, digest
from experiments.store import Index


@dataclass(frozen=True)
class Cost:
    """What a net costs.

    Attributes:
        params: trainable parameters.
        operations: additions, multiplications and comparisons of one sample's forward pass.
        active: parameters that one token meets. This and the following are known of language models only.
        tokens: of a sample.
        training_flops: forward and backward, per sample.
        state: bytes of weights, gradients and AdamW's moments in float32.
        copies: bytes of the bfloat16 copies of weights that autocast keeps until the backward pass.
        activations: bytes that the backward pass needs, per sample.
    """

    params: int
    operations: int
    active: int | None = None
    tokens: int | None = None
    training_flops: int | None = None
    state: int | None = None
    copies: int | None = None
    activations: int | None = None

    def memory(self, budget: Mapping[str, Any], strategy: str, processes: int) -> int | None:
        """Return the bytes that training takes on each device, workspace and the block that is being gathered aside.

        Under FSDP the state is divided; the copies are not, since each block's backward pass needs them whole.
        """
        if self.state is None or self.copies is None or self.activations is None:
            return None
        if not budget["max_epochs"]:
            return self.state // 4 + self.copies  # weights alone
        at_once = -(-(budget.get("micro_batch") or budget["batch_size"]) // processes)
        return self.state // (processes if strategy == "fsdp" else 1) + self.copies + at_once * self.activations


@dataclass
class Pricer:
    """Prices cells, one net per (ablation, data set); times come from finished runs where there are any.

    Args:
        processes: that a cell takes, one per device.
    """

    index: Index
    spec: PaperSpec
    processes: int = 1
    _costs: dict[tuple[str, str], Cost] = field(default_factory=dict)

    # Rough single-core model for a machine that has not run the cell yet; measured on an AMD EPYC core.
    FIXED_S, PER_STEP_S, PER_OPERATION_S = 3.0, 1.7e-3, 6.0e-11
    # Of one GPU, for language models: an assumption, 15 percent of an H100's bfloat16 peak. None has been measured.
    GPU_FIXED_S, GPU_FLOPS_PER_S = 60.0, 1.5e14

    def price(self, cell: Cell) -> tuple[Cost, float]:
        """Return what a cell's net costs, and the seconds that the cell is expected to take.

        Raises:
            ConfigError: it could not run.
        """
        key = cell.key
        if (key.ablation, key.data) not in self._costs:
            check_processes(cell, self.processes)
            self._costs[key.ablation, key.data] = _cost(cell, self.spec)
        cost = self._costs[key.ablation, key.data]
        earlier = self.index.seconds(self._same_but_seed(key))
        return cost, statistics.median(earlier) if earlier else self._guess(cell.config, cost)

    def _same_but_seed(self, key: CellKey) -> Iterable[CellKey]:
        wanted = (key.paper, key.ablation, key.data, key.scale)
        return [k for k in self.index.signatures if (k.paper, k.ablation, k.data, k.scale) == wanted]

    def _guess(self, config: dict[str, Any], cost: Cost) -> float:
        budget = config["budget"]
        samples = budget["max_epochs"] * (budget["train_samples"] or 55_000)
        if config["trainer"]["accelerator"] != "cpu" and cost.training_flops is not None:
            return self.GPU_FIXED_S + samples * cost.training_flops / self.GPU_FLOPS_PER_S / self.processes
        steps = samples / budget["batch_size"]
        return self.FIXED_S + steps * self.PER_STEP_S + 4 * samples * cost.operations * self.PER_OPERATION_S


def processes_of(trainer: Mapping[str, Any]) -> int:
    """Return how many processes a cell takes with these settings on this machine."""
    if trainer["accelerator"] == "cpu" and trainer["devices"] in (1, "auto"):
        return 1  # without the import of torch, which takes seconds
    from experiments.strategies import processes

    return processes(trainer)


def check_processes(cell: Cell, processes: int) -> None:
    """Refuse several processes where they would compute something else than one, or cannot share a batch evenly.

    Raises:
        ConfigError: naming the trainer, or the size that does not divide.
    """
    if processes == 1:
        return
    from hydra.utils import get_class

    budget, origin = cell.config["budget"], origin_of(cell.key)
    if not getattr(get_class(cell.config["datamodule"]["_target_"]), "shares_batches", False):
        raise ConfigError(
            f"{origin}: {processes} processes would each take a whole batch of {cell.key.paper}, which is another experiment; "
            f"use a trainer of one device, such as cpu or gpu"
        )
    for name in ("batch_size", "micro_batch", "train_samples"):
        if budget.get(name) and budget["max_epochs"] and budget[name] % processes:
            raise ConfigError(
                f"{origin}: budget.{name}: {budget[name]} cannot be dealt evenly to {processes} processes"
            )


def _cost(cell: Cell, spec: PaperSpec) -> Cost:
    """Check and price a cell, or recall what that gave for the same configuration, code and libraries."""
    watched = {name for name in spec.metrics if name.startswith("val/")}
    parts = {
        "config": cell.hashed,
        "code": digest(closure(sorted(set(targets_of(cell.hashed))))),
        "checks": digest([Path(__file__), Path(__file__).with_name("schema.py")]),
        "lock": lock_digest(),
        "metrics": sorted(watched),
    }
    inputs, name = hashlib.sha256(canonical(parts).encode()).hexdigest(), f"{cell.key.paper}|{origin_of(cell.key)}"
    if kept := memo.recall("price", name, inputs):
        return Cost(**kept)
    cost = _check_and_price(cell.config, watched, origin_of(cell.key))
    memo.keep("price", name, inputs, asdict(cost))
    return cost


def _check_and_price(config: dict[str, Any], watched: set[str], origin: str) -> Cost:
    """Refuse what would fail in training, without loading data; return what the net costs."""
    try:
        check_targets(config, origin)
        _check_data(config)
        net = _dry_build(config)
        _check_monitor(config, watched)
        shape = Data.model_validate(config["data"]).input_shape
        try:
            return _cost_of(net, shape, config["precision"])
        except Exception as error:
            raise ConfigError(f"net: it cannot take a sample of shape {shape}: {_cause(error)}") from error
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if said.startswith(origin) else f"{origin}: {said}") from error


def _cost_of(net: Any, shape: tuple[int, ...], precision: str) -> Cost:
    from lit_modules.nets.counting import count_ops, count_params
    from lit_modules.nets.transformer import Transformer

    params, operations = count_params(net), count_ops(net, shape).total
    if not isinstance(net, Transformer):
        return Cost(params, operations)
    from lit_modules.nets.pricing import Shape, price

    context = shape[0]
    known = price(Shape(**net.arguments), context, "bf16-mixed" if precision == "bf16-mixed" else "fp32")
    state = 4 * known.params + known.bytes_gradients + known.bytes_adam
    copies = known.bytes_weights - 4 * known.params
    return Cost(
        params,
        operations,
        active=known.params_active,
        tokens=context,
        training_flops=context * known.flops_training,
        state=state,
        copies=copies,
        activations=known.bytes_activations,
    )


def _check_data(config: Mapping[str, Any]) -> None:
    """Compare what the configuration says of a set of images with what the set is: shape, classes, numbers of images."""
    from datamodules.images import IMAGE_SETS, check_split

    data, facts = config["data"], IMAGE_SETS.get(config["data"]["name"])
    if facts is None:
        return
    takers = {"channels": "in_channels", "image_size": "image_size", "classes": "num_classes"}
    for name, argument in takers.items():
        right = getattr(facts, name)
        given = {f"data.{name}": data[name]}
        given |= {
            f"{part}.{argument}": config[part][argument] for part in ("net", "module") if argument in config[part]
        }
        for path, value in given.items():
            if value != right:
                raise ConfigError(f"{path}: {value!r}, but {data['name']} has {right}; leave it to conf/data")
    for part in ("budget", "datamodule"):
        sizes = {name: config[part].get(name) for name in ("val_samples", "train_samples", "test_samples")}
        if sizes["test_samples"] is not None and not 1 <= sizes["test_samples"] <= facts.test:
            limits = f"must lie between 1 and {facts.test}, or be null for all"
            raise ConfigError(f"{part}.test_samples {limits}; got {sizes['test_samples']}")
        if sizes["val_samples"] is not None:
            try:
                check_split(facts.train, sizes["val_samples"], sizes["train_samples"])
            except ValueError as error:
                raise ConfigError(f"{part}.{error}") from error


def _dry_build(config: dict[str, Any]) -> Any:
    """Build everything that a run of this configuration builds before it loads data, and return the net.

    One that counts itself by formula is built without memory for its weights, whatever their number.
    """
    import torch
    from hydra.utils import get_object, instantiate

    kind, optim = get_object(config["net"]["_target_"]), config["optim"]
    formula = hasattr(kind, "scalar_ops") and hasattr(kind, "input_dtype")
    with torch.random.fork_rng(devices=[]), torch.device("meta" if formula else "cpu"):
        net = _build(config["net"], "net", instantiate)
        parameters = list(net.parameters())
        if parameters and config["budget"]["max_epochs"]:
            _build(optim["optimizer"], "optim.optimizer", lambda node: instantiate(node, _partial_=True)(parameters))
        schedule = optim["schedule"] and _build(optim["schedule"], "optim.schedule", instantiate)
        _build(config["datamodule"], "datamodule", instantiate)
        if config["parent"]:
            _build(config["parent"]["inherit"], "parent.inherit", instantiate)
        parts = {"net": net, "optimizer": instantiate(optim["optimizer"], _partial_=True), "schedule": schedule}
        _build(config["module"], "module", lambda node: instantiate(node, **parts, steps_per_epoch=1))
    return net


def _build(node: dict[str, Any], path: str, make: Callable[[dict[str, Any]], Any]) -> Any:
    """Build one part, or say which of its arguments stands in the way."""
    try:
        return make(node)
    except Exception as error:
        said = _cause(error)
        name = _culprit(node, make, said)
        if name is None:
            raise ConfigError(f"{path}: {node['_target_']} cannot be built: {said}") from error
        hint = default_of(node["_target_"], name)
        raise ConfigError(f"{path}.{name}: {node[name]!r} cannot be used: {said}{hint}") from error


def _culprit(node: dict[str, Any], make: Callable[[dict[str, Any]], Any], said: str) -> str | None:
    """The argument that an error names or, where it names none, the one without which there is no error."""
    names = [name for name in node if not name.startswith("_")]
    named = [(found.start(), name) for name in names if (found := re.search(rf"\b{re.escape(name)}\b", said))]
    if named:
        return min(named)[1]
    for name in names:
        try:
            make({key: value for key, value in node.items() if key != name})
        except Exception:
            continue
        return name
    return None


def _cause(error: Exception) -> str:
    """What went wrong, without the frame that Hydra puts round it."""
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _check_monitor(config: Mapping[str, Any], watched: set[str]) -> None:
    """The metric that selects weights must be one that the claims file knows or that the module writes about."""
    monitor = config["selection"]["monitor"]
    known = watched | _written_of(config["module"]["_target_"])
    if monitor not in known:
        raise ConfigError(f"selection.monitor: nothing logs '{monitor}'{nearest(monitor, known)}")


@cache
def _written_of(module: str) -> frozenset[str]:
    """The validation metrics that the code and docstrings of a module write about."""
    from hydra.utils import get_class

    ours = [kind for kind in get_class(module).__mro__ if kind.__module__.startswith("lit_modules.")]
    return frozenset(name for kind in ours for name in re.findall(r"\bval/\w+", inspect.getsource(kind)))
