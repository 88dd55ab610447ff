"""A paper as data: its claims, tables, figures and metrics, read from experiments/papers/<paper>/claims.yaml.

Unknown keys, metrics and kinds fail when the file is read, with the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from experiments.errors import UserError
from experiments.schema import nearest

PAPERS = Path(__file__).parent / "papers"
KNOWN_PAPERS = {1: "moe_upcycling", 2: "face_deblur", 3: "tropical_cnn", 4: "min_max_plus", 5: "auto_map"}
PROFILES = ("smoke", "small", "gpu", "paper")  # not every paper has each

Kind = Literal["comparison", "value", "ordering", "trend", "identity"]


class ClaimError(UserError):
    """A claims file that cannot be used; the message says where and the nearest valid name."""


@dataclass(frozen=True)
class Metric:
    """A number that runs log: its name there, which way is better, its unit, and a label for people."""

    name: str
    direction: Literal["higher", "lower", "none"]
    unit: str
    label: str
    version: int = 1


@dataclass(frozen=True)
class Operand:
    """One side of a claim: a metric of an ablation on a data set, or of the best of several by a validation metric."""

    metric: str
    data: str
    ablation: str | None = None
    best_of: tuple[str, ...] = ()
    by: str | None = None

    @property
    def ablations(self) -> tuple[str, ...]:
        """Every ablation this side needs."""
        return self.best_of or ((self.ablation,) if self.ablation else ())

    @property
    def label(self) -> str:
        """How people call it."""
        return self.ablation or f"the best of {self.best_of[0]} to {self.best_of[-1]} by {self.by}"


@dataclass(frozen=True)
class Design:
    """How many seeds, whether they are paired, the two-sided alpha of the paper's claims together, and the test.

    Test "crossed": for metrics that are means over test images, whose values are in the runs' images.csv; both seeds and
    images are taken for drawn from more of their kind. For comparisons, and for orderings of pairs.
    """

    seeds: int = 6
    paired: bool = True
    alpha: float = 0.05
    test: Literal["t", "sign_flip", "crossed"] = "t"


@dataclass(frozen=True)
class Claim:
    """Something the paper says, in our words, and how it is decided.

    kind "comparison": operands a, b; a is better than b by more than `margin` (negative: not worse by more than that). With
    `against`, one operand: it is better than that number.
    kind "ordering", pattern "all": each operand is better than the last one by more than `margin`.
    kind "ordering", patterns "each", "any" and "mixed": operands come in pairs, and the first is better than the second by
    more than `margin` in each pair, in at least one, or in some while in others it is the second.
    kind "trend": the operands, in order, rise (their metric's better direction).
    kind "value": one operand; it agrees with `reported`, one value of the paper, within `margin` if one is given.
    kind "identity": an exact relation, which is checked and not tested. Of two operands without spread: a is better than b
    and, where `reported` is given, a / b equals it. Of pairs (pattern "each"), or of one operand `against` a number: in every
    single run the first is not worse than the second, or than the number.

    `relative`: differences are of 100 times the logarithm, that is in percent, and so is the margin. `beyond`: why no profile
    of the suite can put the question; the claim is listed as not assessable, with what the paper reports.
    """

    id: str
    text: str
    source: str
    kind: Kind
    operands: tuple[Operand, ...]
    margin: float = 0.0
    against: float | None = None
    pattern: Literal["all", "each", "any", "mixed"] = "all"
    match: Mapping[str, float] = dataclasses.field(default_factory=dict)
    design: Design = Design()
    reported: float | None = None
    scale: Literal["full", "reduced"] = "reduced"
    relative: bool = False
    beyond: str = ""
    profiles: tuple[str, ...] = PROFILES

    @property
    def pairs(self) -> list[tuple[Operand, Operand]]:
        """The operands two by two, for the patterns that compare pairs."""
        return list(zip(self.operands[::2], self.operands[1::2], strict=True))


@dataclass(frozen=True)
class Column:
    """A column of a table: a metric on a data set."""

    metric: str
    data: str


@dataclass(frozen=True)
class Table:
    """Rows are ablations, columns metrics on data sets."""

    id: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    source: str
    note: str = ""
    profiles: tuple[str, ...] = PROFILES


@dataclass(frozen=True)
class Figure:
    """A picture: its kind (see experiments/figures.py), what it shows and where; `plain` rows are those without the method."""

    id: str
    kind: Literal[
        "forest",
        "noise",
        "pareto",
        "verdicts",
        "difference",
        "gains",
        "curves",
        "rate",
        "advantage",
        "survival",
        "load",
        "blur",
        "gallery",
        "strength",
        "anytime",
        "pruning",
        "plan",
    ]
    title: str
    data: str = ""
    rows: tuple[str, ...] = ()
    baseline: str | None = None
    metric: str = "test/acc"  # of a forest
    plain: tuple[str, ...] = ()
    sides: tuple[str, ...] = ("without the method", "with it")
    profiles: tuple[str, ...] = PROFILES


@dataclass(frozen=True)
class PaperSpec:
    """Everything the suite knows of a paper."""

    key: str
    number: int
    title: str
    arxiv: str
    metrics: Mapping[str, Metric]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    claims: tuple[Claim, ...]
    data_in: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    def in_profile(self, profile: str) -> PaperSpec:
        """Return the same claims, tables and figures on the data that this profile has in the place of the ones named."""
        taken = self.data_in.get(profile, {})
        return _with_data(self, taken) if taken else self

    def on_data(self, taken: Mapping[str, str]) -> PaperSpec:
        """Return the same claims, tables and figures with some data sets in the place of others.

        Args:
            taken: by the name of the set whose place is taken.
        Raises:
            ClaimError: no claim, table or figure of the paper is of that set.
        """
        known = {operand.data for claim in self.claims for operand in claim.operands}
        known |= {column.data for table in self.tables for column in table.columns}
        for name in taken:
            if name not in known:
                raise ClaimError(f"{self.key}: no claim is of data set '{name}'{nearest(name, known)}")
        return _with_data(self, taken) if taken else self

    def required(self, profile: str) -> list[tuple[str, str]]:
        """Return the (ablation, data) pairs that this profile's claims and tables need, claims' first."""
        pairs = [
            (name, operand.data)
            for claim in self.claims_of(profile)
            for operand in claim.operands
            for name in operand.ablations
        ]
        for table in self.tables:
            if profile in table.profiles:
                pairs += [(row, column.data) for row in table.rows for column in table.columns]
        return list(dict.fromkeys(pairs))

    def claims_of(self, profile: str) -> list[Claim]:
        """Return the claims judged under a profile."""
        return [claim for claim in self.claims if profile in claim.profiles]

    def metric(self, name: str) -> Metric:
        """Return a metric; a name with `*` in the file stands for a family, such as noise/*/acc."""
        if name in self.metrics:
            return self.metrics[name]
        for pattern, metric in self.metrics.items():
            head, star, tail = pattern.partition("*")
            if star and name.startswith(head) and name.endswith(tail) and len(name) > len(head) + len(tail):
                middle = name[len(head) : len(name) - len(tail)]
                return dataclasses.replace(metric, name=name, label=metric.label.replace("*", middle.replace("_", " ")))
        raise ClaimError(f"{self.key}: unknown metric '{name}'{nearest(name, self.metrics)}")


def available_papers(folder: Path = PAPERS) -> dict[int, str]:
    """Return {number: key} of the papers that have a claims file."""
    numbers = {key: number for number, key in KNOWN_PAPERS.items()}
    return {numbers[f.parent.name]: f.parent.name for f in sorted(folder.glob("*/claims.yaml"))}


@cache
def load_paper(key: str, folder: Path = PAPERS) -> PaperSpec:
    """Read and check a paper's claims.yaml.

    Raises:
        ClaimError: an unknown key, metric, kind or operand, a duplicate id, or a metric that must not decide.
    """
    file = folder / key / "claims.yaml"
    if not file.is_file():
        raise ClaimError(f"no claims for '{key}'{nearest(key, available_papers(folder).values())}")
    raw = yaml.safe_load(file.read_text())
    metrics = {
        name: _build(Metric, {"name": name, **body}, f"metrics.{name}") for name, body in raw.pop("metrics", {}).items()
    }
    spec = _build(PaperSpec, {**raw, "key": key, "metrics": metrics}, str(file.relative_to(folder.parent)))
    _check(spec)
    return spec


T = TypeVar("T")


def _with_data(node: T, taken: Mapping[str, str]) -> T:
    """A copy of frozen dataclasses and tuples in which every field `data` is replaced as `taken` says."""
    if isinstance(node, tuple):
        return tuple(_with_data(item, taken) for item in node)  # type: ignore[return-value]
    if not dataclasses.is_dataclass(node):
        return node
    values = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    changed = {n: taken.get(v, v) if n == "data" else _with_data(v, taken) for n, v in values.items()}
    return dataclasses.replace(node, **changed)  # type: ignore[type-var]


def _build(kind: type[T], body: Any, where: str) -> T:
    """Turn plain YAML into a frozen dataclass, type by type."""
    if not isinstance(body, Mapping):
        raise ClaimError(f"{where}: expected a mapping, got {body!r}")
    hints = typing.get_type_hints(kind)
    for key in body:
        if key not in hints:
            raise ClaimError(f"{where}: unknown key '{key}'{nearest(str(key), hints)}")
    required = {
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - body.keys())
    if missing:
        raise ClaimError(f"{where}: missing {', '.join(missing)}")
    name = body.get("id")
    place = f"{where}.{name}" if name else where
    return kind(**{key: _convert(hints[key], value, f"{place}.{key}") for key, value in body.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else _build(hint, value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise ClaimError(f"{where}: unknown value {value!r}{nearest(str(value), map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ClaimError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(get_args(hint)[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (str, int, float, bool) and not isinstance(value, hint):
        raise ClaimError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


PAIRS = {"comparison": 2, "identity": 2, "value": 1}


def _check(spec: PaperSpec) -> None:
    for profile in spec.data_in:
        if profile not in PROFILES:
            raise ClaimError(f"{spec.key}: data_in: unknown profile '{profile}'{nearest(profile, PROFILES)}")
    ids = [item.id for group in (spec.claims, spec.tables, spec.figures) for item in group]
    double = sorted({name for name in ids if ids.count(name) > 1})
    if double:
        raise ClaimError(f"{spec.key}: ids used twice: {', '.join(double)}")
    for claim in spec.claims:
        _check_claim(spec, claim)
    for table in spec.tables:
        for column in table.columns:
            spec.metric(column.metric)
    everything: list[Any] = [*spec.claims, *spec.tables, *spec.figures]
    for item in everything:
        for profile in item.profiles:
            if profile not in PROFILES:
                raise ClaimError(f"{item.id}: unknown profile '{profile}'{nearest(profile, PROFILES)}")


def _check_claim(spec: PaperSpec, claim: Claim) -> None:
    wanted = 1 if claim.against is not None else None if claim.pattern == "each" else PAIRS.get(claim.kind)
    if claim.against is not None and claim.kind not in ("comparison", "identity"):
        raise ClaimError(f"{claim.id}: a claim of kind '{claim.kind}' is not held against a number")
    if claim.relative and (claim.against is not None or claim.kind in ("value", "identity")):
        raise ClaimError(f"{claim.id}: only differences between runs are relative, which this {claim.kind} has none of")
    if wanted is not None and len(claim.operands) != wanted:
        plural = "s" if wanted > 1 else ""
        raise ClaimError(f"{claim.id}: this {claim.kind} has {wanted} operand{plural}, got {len(claim.operands)}")
    if claim.kind in ("ordering", "trend") and len(claim.operands) < 2:
        raise ClaimError(f"{claim.id}: an {claim.kind} needs at least 2 operands")
    if claim.pattern != "all" and len(claim.operands) % 2:
        raise ClaimError(f"{claim.id}: the operands of '{claim.pattern}' come in pairs, got {len(claim.operands)}")
    for name in claim.match:
        spec.metric(name)
    for operand in claim.operands:
        metric = spec.metric(operand.metric)
        if claim.kind != "value" and metric.direction == "none":
            raise ClaimError(f"{claim.id}: {metric.name} has no better direction, so nothing can be compared by it")
        if bool(operand.ablation) == bool(operand.best_of):
            raise ClaimError(f"{claim.id}: an operand has either an ablation or best_of")
        if operand.best_of and not (operand.by or "").startswith("val/"):
            raise ClaimError(f"{claim.id}: best_of is chosen by a val/ metric, never on test; got by={operand.by!r}")
