"""From the splits of a plan to torch's styles: which module is ColwiseParallel, which RowwiseParallel, what is gathered where.

A plan names splits of variables; `placement.settle` says how every tensor lies. Here that is read off at each module's
border. A Linear's weight is (out, in): split 0 is colwise, split 1 rowwise; its bias goes with it (colwise: split; rowwise:
whole), whatever the plan says. An Embedding's table is (vocab, width): split 0 is rowwise, split 1 colwise. All other modules
keep their weights whole. Torch's styles move activations at the border of a split module, and nowhere else.

Legend: T columns of the stage's mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel

from datamodules.planning.graph import Graph
from datamodules.planning.placement import full_rows, settle
from datamodules.planning.plan import PlanError, StagePlan
from datamodules.planning.vocabulary import CONSTANTS, VIEWS

WHOLE = -1


@dataclass(frozen=True)
class Use:
    """Where a module with weights of its own stands in the graph, and how its border lies.

    Attributes:
        path: of the module.
        weight: split of its main weight, or -1.
        x, y: tensors that its operation reads and returns.
        source: what x is a view of: what the module is given.
        x_split, y_split: how these lie.
    """

    path: str
    weight: int
    x: int
    y: int
    source: int
    x_split: int
    y_split: int
    ops: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What a stage's columns do.

    Attributes:
        styles: module path -> what torch is to do there.
        summed: variables held whole whose gradient is the sum over columns, since each column sees other rows.
        cuts_batch: whether a column takes its own rows of the batch (inputs split in dim 0).
        cuts_output: whether it returns its own rows.
    """

    styles: dict[str, ParallelStyle]
    summed: frozenset[str]
    cuts_batch: bool
    cuts_output: bool


def layout_of(net: nn.Module, graph: Graph, stage: StagePlan) -> Layout:
    """Return how a stage's columns are set up.

    Args:
        net: the whole net, whose parameters are named as in the graph.
    Raises:
        PlanError: a split of a module that DTensor has no style for, or a plan that moves a tensor where no style can.
    """
    if stage.ways == 1:
        return Layout({}, frozenset(), False, False)
    places = settle(graph, stage.ways, stage.splits, stage.placements)
    uses = uses_of(net, graph, stage, places)
    _check_between(graph, stage, places, uses)
    styles: dict[str, ParallelStyle] = {}
    modules = dict(net.named_modules())
    last = uses[-1] if stage.last_op >= last_forward(graph) else None
    for use in uses:
        style = _style(use, modules[use.path], graph, is_last=use is last)
        if style is not None:
            styles[use.path] = style
    _share_inputs(styles, uses)
    summed = {f"{u.path}.{n}" for u in uses if u.weight == WHOLE and u.x_split == 0 for n in _own(modules[u.path])}
    inputs = {t: places[t] for t in graph.inputs}
    return Layout(styles, frozenset(summed), any(s == 0 for s in inputs.values()), bool(last and last.y_split == 0))


def uses_of(net: nn.Module, graph: Graph, stage: StagePlan, places: Sequence[int]) -> list[Use]:
    """Return the modules with weights that a stage holds, in forward order.

    Raises:
        PlanError: a parameter that the graph does not have, or that is used twice.
    """
    tensors = {p.name: p.tensor for p in graph.parameters}
    found = []
    for path, module in net.named_modules():
        names = [f"{path}.{n}" if path else n for n in _own(module)]
        if not names:
            continue
        if missing := [n for n in names if n not in tensors]:
            raise PlanError(f"{graph.name} has no variable {missing[0]}: the graph is of another net")
        use = _use(path, tensors[names[0]], {tensors[n] for n in names}, graph, places)
        if stage.first_op <= use.ops[0] <= stage.last_op:
            found.append(use)
    return sorted(found, key=lambda use: use.ops[0])


def _use(path: str, weight: int, own: set[int], graph: Graph, places: Sequence[int]) -> Use:
    """Follow a weight through views to the operation that uses it, and that operation's result through its bias."""
    tensor, seen = weight, []
    while True:
        users = [i for i in graph.consumers(tensor) if graph.ops[i].phase == "forward"]
        if len(users) != 1:
            raise PlanError(
                f"{graph.tensors[weight].name} is used {len(users)} times; a plan is run for weights used once"
            )
        seen.append(users[0])
        op = graph.ops[users[0]]
        if op.kind not in VIEWS:
            break
        tensor = op.outputs[0]
    x = next(t for t in op.inputs if t != tensor and t not in own)
    y = op.outputs[0]
    for i in graph.consumers(y):
        following = graph.ops[i]
        if following.phase == "forward" and following.kind == "add" and own & set(following.inputs):
            seen.append(i)
            y = following.outputs[0]
    return Use(path, places[weight], x, y, _source(graph, path, x), places[x], places[y], tuple(sorted(seen)))


def _source(graph: Graph, path: str, tensor: int) -> int:
    """Go back through a module's own views."""
    while (i := graph.producer(tensor)) is not None and graph.ops[i].kind in VIEWS and graph.ops[i].layer == path:
        tensor = graph.ops[i].inputs[0]
    return tensor


def _style(use: Use, module: nn.Module, graph: Graph, is_last: bool) -> ParallelStyle | None:
    x, y = (_placement(use, graph, t, s) for t, s in ((use.x, use.x_split), (use.y, use.y_split)))
    if is_last and y == Shard(-1):
        y = Replicate()  # the loss is taken of whole rows
    if use.weight == WHOLE:
        if use.x_split in (WHOLE, 0):
            if use.y_split != use.x_split:
                raise PlanError(f"{use.path} is whole, reads {x} and should return {y}: no style of torch's does that")
            return None
        if isinstance(module, nn.Linear) and y == Replicate():
            return PrepareModuleInput(input_layouts=(x,), desired_input_layouts=(Replicate(),), use_local_output=True)
        raise PlanError(
            f"{use.path} ({type(module).__name__}) is whole and cannot take an input split as {x}; split it too"
        )
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise PlanError(
            f"DTensor has no style that splits {use.path} ({type(module).__name__}); replicate its variables (-1): Linear and "
            "Embedding can be split"
        )
    by_output = use.weight == (0 if isinstance(module, nn.Linear) else 1)
    kind = ColwiseParallel if by_output else RowwiseParallel
    return kind(input_layouts=x, output_layouts=y)


def _placement(use: Use, graph: Graph, tensor: int, split: int) -> Placement:
    """A split of a module's input or output as torch names it. Products see rows and tokens merged, dim 0 leading."""
    if split == WHOLE:
        return Replicate()
    rank = len(graph.tensors[tensor].shape)
    if split == rank - 1 and rank > 1:
        return Shard(-1)
    if split == 0:
        return Shard(0)
    raise PlanError(
        f"{graph.tensors[tensor].name} at the border of {use.path} lies as {split}: neither rows nor columns"
    )


def _share_inputs(styles: dict[str, ParallelStyle], uses: Sequence[Use]) -> None:
    """Where siblings all are colwise on one input, make it a DTensor once, so that their gradients are added and then summed
    over columns in one all-reduce instead of one each.
    """
    groups: dict[tuple[str, int], list[Use]] = {}
    for use in uses:
        if isinstance(styles.get(use.path), ColwiseParallel) and "." in use.path:
            groups.setdefault((use.path.rpartition(".")[0], use.source), []).append(use)
    for (parent, _), group in groups.items():
        if len(group) > 1 and group[0].x_split == WHOLE:
            whole = (Replicate(),)
            styles[parent] = PrepareModuleInput(
                input_layouts=whole, desired_input_layouts=whole, use_local_output=False
            )


def _check_between(graph: Graph, stage: StagePlan, places: Sequence[int], uses: Sequence[Use]) -> None:
    """Between modules with weights nothing is sent: each operation there must have a rule for its operands as they lie."""
    within = {i for use in uses for i in use.ops}
    for i, op in enumerate(graph.ops[stage.first_op : stage.last_op + 1], stage.first_op):
        if op.phase != "forward" or i in within or not op.layer or op.kind in CONSTANTS:
            continue
        lies = tuple(places[t] for t in op.inputs), tuple(places[t] for t in op.outputs[:1])
        if all(s == WHOLE for s in (*lies[0], *lies[1])):
            continue
        rows = [p for p in full_rows(op, graph, stage.ways) if not p.reduced and not p.inner]
        if lies not in [(p.row[0], p.row[1][:1]) for p in rows]:
            raise PlanError(
                f"{op.name} ({op.kind}) in {op.layer} reads {lies[0]} and makes {lies[1]}: this needs communication where no "
                "module with weights stands, and torch's styles have it nowhere else"
            )


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def last_forward(graph: Graph) -> int:
    """Return the last forward operation of a module."""
    return max(i for i, op in enumerate(graph.ops) if op.phase == "forward" and op.layer)
