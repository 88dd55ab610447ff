"""What the planning commands do: read graphs and machines, search, write a folder that explains itself."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from datamodules.planning.explain import differences, explain
from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, batch_of
from datamodules.planning.topology import Topology, load_topology
from experiments.errors import UserError
from experiments.store import write_atomically

PLAN, GRAPH, MACHINE, TEXT, PICTURE = "plan.json", "graph.json.gz", "topology.yaml", "explanation.txt", "plan.svg"
SEARCHERS = {"greedy": "greedy", "beam": "beam", "anneal": "annealing", "mcmc": "mcmc", "random": "random"}


@dataclass(frozen=True)
class Wish:
    """How a plan is looked for."""

    searcher: str = "optimum"
    stages: str = "1"
    micro_batches: int = 1
    data: int | None = None
    seconds: float = 120.0
    seed: int = 0


@contextmanager
def mendable() -> Iterator[None]:
    """Turn what a user can mend into one message."""
    from datamodules.planning.recorder import TraceError

    try:
        yield
    except UserError:
        raise
    except (ValueError, TraceError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def plan_model(
    model: str,
    mesh: str,
    topology: str,
    wish: Wish,
    out: Path,
    arguments: Sequence[str],
    force: bool,
    console: Console,
) -> Path:
    """Trace, search, and write the folder; nothing is left where any of it fails."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not (force and (out / PLAN).exists()):
        way = "--force replaces it" if (out / PLAN).exists() else "it holds no plan, so it is left alone"
        raise UserError(f"{out} is there already: {way}; or name another folder with --out")
    with mendable():
        machine = machine_of(topology, mesh)
        found = find(wish)
        graph = graph_of(model, arguments)
        say(
            console,
            f"{graph.name}: {len(graph.ops):,} operations, {len(graph.parameters):,} variables on {machine.name}",
        )
        plan, remarks = found(graph, machine)
        for remark in remarks:
            say(console, remark)
        return write(out, graph, machine, plan, force, console, remarks)


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def machine_of(topology: str, mesh: str) -> Topology:
    """A machine, with other counts of nodes and devices where a mesh is given."""
    machine = load_topology(topology)
    if not mesh:
        return machine
    match = re.fullmatch(r"(\d+)x(\d+)", mesh)
    if not match or "0" in (match[1], match[2]):
        raise UserError(f"a mesh is nodes x devices of each, such as 2x4, not '{mesh}'")
    return machine.meshed(int(match[1]), int(match[2]))


def graph_of(model: str, arguments: Sequence[str]) -> Graph:
    """A graph from its file, of a workload, or traced from a factory."""
    from datamodules.planning.workloads import load_graph, load_user_model

    if Path(model).is_file():
        return Graph.load(model)
    given = dict(map(_argument, arguments))
    return load_user_model(model, **given) if ":" in model else load_graph(model, **given)


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--argument takes NAME=VALUE, not '{text}'")
    return name, yaml.safe_load(value)


def find(wish: Wish) -> Callable[[Graph, Topology], tuple[Plan, list[str]]]:
    """The searcher of that name, its settings checked before anything is traced."""
    from experiments.schema import nearest

    if wish.searcher == "optimum":
        return lambda graph, machine: _optimum(graph, machine, wish)
    if wish.searcher not in {*SEARCHERS, "dqn"}:
        raise UserError(f"no searcher '{wish.searcher}'{nearest(wish.searcher, [*SEARCHERS, 'dqn', 'optimum'])}")
    if wish.stages != "1" or wish.micro_batches != 1:
        raise UserError(
            f"{wish.searcher} plans one stage and one micro-batch; stages are planned by --searcher optimum"
        )
    return lambda graph, machine: _searched(graph, machine, wish)


def _optimum(graph: Graph, machine: Topology, wish: Wish) -> tuple[Plan, list[str]]:
    from datamodules.planning.optimum_joint import joint_optimum

    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", wish.stages):
        raise UserError(f"stages are numbers such as 1,2, not '{wish.stages}'")
    stages = [int(count) for count in wish.stages.split(",")]
    _check_rows(machine, stages, wish.data)
    rows = None if wish.data is None else [wish.data]
    found = joint_optimum(graph, machine, stages, rows, wish.micro_batches, time_limit=wish.seconds, precision=1e-3)
    remarks = [
        f"  {t.stages} stage{'s' if t.stages > 1 else ''}, batch split {t.data} ways first: "
        + (f"{t.value * 1e3:,.3f} ms, none below {t.bound * 1e3:,.3f} ms" if t.value < float("inf") else "none")
        + f" ({t.why}; {t.seconds:.1f} s)"
        for t in found.tried
    ]
    remarks.append(
        f"best {found.best.value * 1e3:,.3f} ms; within {found.gap:.2%} of the best that these meshes can have"
    )
    return found.best.plan, remarks


def _check_rows(machine: Topology, stages: Sequence[int], data: int | None) -> None:
    for count in stages:
        if machine.devices % count:
            raise UserError(f"{machine.devices} devices cannot be shared out evenly to {count} stages")
        if data is not None and machine.devices // count % data:
            raise UserError(f"{machine.devices // count} devices of a stage cannot split a batch {data} ways")


def _searched(graph: Graph, machine: Topology, wish: Wish) -> tuple[Plan, list[str]]:
    """Decide slots of the paper's space by step time, for every number of mesh rows that fits."""
    from datamodules.planning.plan import PlanError
    from datamodules.planning.problems import Partitioning

    batch = batch_of(graph)
    _check_rows(machine, [1], wish.data)
    divisors = [d for d in range(1, machine.devices) if machine.devices % d == 0 and batch % d == 0]
    rows = divisors if wish.data is None else [wish.data]
    best: tuple[float, Plan] | None = None
    remarks = []
    for d in rows:
        try:
            problem = Partitioning(graph, machine, "time", data=d, columns=batch % machine.devices == 0).problem()
        except PlanError as error:
            remarks.append(f"  batch split {d} ways first: {error}")
            continue
        steps = _dqn(problem, wish, len(rows)) if wish.searcher == "dqn" else _heuristic(problem, wish, len(rows))
        pricer: Any = getattr(problem.pricer, "pricer", problem.pricer)
        cost, plan = problem.cost(), pricer.plan()
        fits = "" if pricer.feasible else ", but does not fit into memory"
        remarks.append(f"  batch split {d} ways first: {cost * 1e3:,.3f} ms after {steps:,} decisions{fits}")
        if pricer.feasible and (best is None or cost < best[0]):
            best = cost, plan
    if best is None:
        raise UserError("\n".join([f"{wish.searcher} found no plan that fits on {machine.name}:", *remarks]))
    return best[1], [*remarks, f"best {best[0] * 1e3:,.3f} ms, without a proof; --searcher optimum gives a bound"]


def _heuristic(problem: Any, wish: Wish, shares: int) -> int:
    from datamodules.planning.searchers import Budget, search

    found = search(problem, SEARCHERS[wish.searcher], Budget(seconds=wish.seconds / shares, steps=200_000), wish.seed)
    return found.steps


def _dqn(problem: Any, wish: Wish, shares: int) -> int:
    """Train an agent on this problem alone and leave the best plan it met."""
    import copy
    import time

    import torch

    from datamodules.planning.environment import PlanEnvironment
    from datamodules.planning.problem import take
    from lit_modules.nets.q_network import QNetwork
    from lit_modules.plan_agent import PlanAgent, Recipe

    if problem.done:
        return 0
    torch.manual_seed(wish.seed)
    best = _Best()
    recipe = Recipe()
    net = QNetwork(problem.width, problem.actions)
    environments = [
        PlanEnvironment(copy.deepcopy(problem), "relative", observer=best, seed=wish.seed + n)
        for n in range(recipe.environments)
    ]
    agent, optimiser = PlanAgent(net, environments, recipe, wish.seed), torch.optim.Adam(net.parameters(), lr=1e-3)
    total = max(2_000, 40 * problem.horizon)
    ends = time.perf_counter() + wish.seconds / shares
    while best.steps < total and time.perf_counter() < ends:
        agent.collect(recipe.environments, max(0.05, 1 - best.steps / (0.5 * total)))
        if best.steps > 128:
            optimiser.zero_grad()
            agent.loss(64, recipe.beta + (1 - recipe.beta) * best.steps / total).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimiser.step()
    take(problem, best.decisions)
    return best.steps


class _Best:
    """The best plan that environments came to."""

    def __init__(self) -> None:
        self.steps, self.cost = 0, float("inf")
        self.decisions: tuple[int, ...] = ()

    def on_step(self) -> None:
        self.steps += 1

    def on_plan(self, cost: float, decisions: tuple[int, ...]) -> None:
        if cost < self.cost:
            self.cost, self.decisions = cost, decisions


def write(
    out: Path, graph: Graph, machine: Topology, plan: Plan, force: bool, console: Console, remarks: Sequence[str]
) -> Path:
    """Write plan, graph, machine, explanation and picture: the folder appears whole."""
    from experiments.planning.draw import draw

    out.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        making.chmod(0o755)
        plan.save(making / PLAN)
        graph.save(making / GRAPH)
        (making / MACHINE).write_text(yaml.safe_dump(machine.to_dict(), sort_keys=False))
        text = explain(graph, machine, plan)
        (making / TEXT).write_text(text + "\nhow it was found:\n" + "\n".join(remarks) + "\n")
        draw(graph, machine, plan, making / PICTURE)
        if out.exists():
            shutil.rmtree(out) if force else out.rmdir()
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return out


def explain_plan(path: Path, graph: str, topology: str, target: Path | None) -> str:
    """The explanation of a plan; also drawn where a target is given."""
    with mendable():
        plan = Plan.load(path)
        model, machine = beside(path, plan, graph, topology)
        text = explain(model, machine, plan)
        if target is not None:
            _draw(model, machine, plan, target)
            text += f"\ndrawn in {target}\n"
        return text


def _draw(graph: Graph, machine: Topology, plan: Plan, target: Path) -> None:
    from experiments.planning.draw import draw

    if target.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"a plan is drawn as .svg, .png or .pdf, not '{target}'")
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / target.name
        draw(graph, machine, plan, drawn)
        write_atomically(target, drawn.read_bytes())


def diff_plans(a: Path, b: Path, graph: str, topology: str) -> str:
    """What two plans do differently."""
    with mendable():
        first, second = Plan.load(a), Plan.load(b)
        if first.graph_digest != second.graph_digest:
            raise UserError(
                f"{a} and {b} are plans of different graphs ({first.graph_digest[:12]} and {second.graph_digest[:12]}), so "
                "their tensors cannot be compared"
            )
        model, machine = beside(a, first, graph, topology)
        return differences(model, machine, first, second)


def beside(path: Path, plan: Plan, graph: str, topology: str) -> tuple[Graph, Topology]:
    """The graph and machine of a plan: as named, else from the files beside it."""
    if graph:
        model = graph_of(graph, [])
    elif (path.parent / GRAPH).exists():
        model = Graph.load(path.parent / GRAPH)
    else:
        raise UserError(f"there is no {GRAPH} beside {path}: name the plan's graph with --graph (a file or a workload)")
    if plan.graph_digest != model.digest:
        raise UserError(
            f"{path} is a plan of graph {plan.graph_digest[:12]}, not of {model.name} ({model.digest[:12]})"
        )
    own = path.parent / MACHINE
    if topology:
        return model, load_topology(topology)
    return model, load_topology(own) if own.exists() else load_topology(plan.topology)
