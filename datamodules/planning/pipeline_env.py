"""Pipeline stages as decisions: first how many devices each stage has, then where the model is cut.

Legend: K buckets, S stages, D devices, F features.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Buckets:
    """A model as a row of K buckets in the order of execution: the paper's arrays C, A and W.

    Attributes:
        seconds_K: forward and backward of the whole batch on one device.
        activation_K: bytes that cross the boundary behind each bucket, for the whole batch, one way.
        parameters_K: bytes of weights.
        kept_K: bytes that the backward pass needs of each bucket, for the whole batch; None for nothing.
    Raises:
        ValueError: arrays of different length, fewer than two buckets, or negative or not finite numbers.
    """

    name: str
    seconds_K: np.ndarray
    activation_K: np.ndarray
    parameters_K: np.ndarray
    kept_K: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.kept_K is None:
            object.__setattr__(self, "kept_K", np.zeros(len(self.seconds_K)))
        for name in ("seconds_K", "activation_K", "parameters_K", "kept_K"):
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if array.ndim != 1 or len(array) != len(self.seconds_K) or len(array) < 2:
                raise ValueError(
                    f"{self.name}: {name} must be a row of as many numbers as there are buckets, two at least"
                )
            if not np.isfinite(array).all() or (array < 0).any():
                raise ValueError(f"{self.name}: {name} must be finite and not negative")
            object.__setattr__(self, name, array)
        if not self.seconds_K.sum() > 0:
            raise ValueError(f"{self.name}: no bucket takes any time")

    def __len__(self) -> int:
        return len(self.seconds_K)


class StageModel(Protocol):
    """Prices a pipeline; `cuts` are the first buckets of stages 1 to S - 1, `devices` the first devices."""

    def length(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return the seconds from the first forward to the last gradient; infinite where memory does not suffice."""

    def fits(self, stage: int, first: int, last: int, devices: int) -> bool:
        """Return whether buckets `first` to `last` - 1 fit into the memory of a stage's devices."""

    def least(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return a length that none with these first model cuts and all these device cuts is below."""


@dataclass(frozen=True)
class Window:
    """The paper's pruning of pipelines as switches.

    Attributes:
        device_radius: device cuts lie within this many devices of a server's boundary; None for anywhere.
        cut_radius: model cuts lie within this many buckets of where the time so far matches the devices' share; None for
            anywhere.
        memory: cuts whose stage does not fit are not offered.
    """

    device_radius: int | None = 2
    cut_radius: int | None = 4
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("device_radius", "cut_radius"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, or None for anywhere; got {value!r}")


class PipelineProblem:
    """Cut a row of buckets into S stages on D devices, so that the pipeline is as short as it can be.

    Decisions: S - 1 device cuts, then S - 1 model cuts. Only the last stage is ever split, so earlier ones never move. With a
    radius an action is the distance from the centre plus the radius; without, the place itself minus one.

    Args:
        buckets: the model.
        model: prices stages.
        stages: S, given by the user as in the paper.
        devices: D.
        per_server: devices of a server, whose boundaries are the centres of device cuts where they are as many as the stages;
            otherwise the devices are shared out evenly.
        window: pruning.
        arrays: whether the agent sees the three arrays, so that one agent can serve any model.
    Raises:
        ValueError: more stages than devices or buckets, or fewer than one.
    Source: dossier 1.7, 1.8.
    """

    scale: float | None = None

    def __init__(
        self,
        buckets: Buckets,
        model: StageModel,
        stages: int,
        devices: int,
        per_server: int | None = None,
        window: Window | None = None,
        arrays: bool = False,
    ) -> None:
        if not 1 <= stages <= min(devices, len(buckets)):
            raise ValueError(f"{stages} stages do not fit on {devices} devices and {len(buckets)} buckets")
        self.name = f"{buckets.name}, {stages} stages"
        self.buckets, self.model, self.stages, self.devices = buckets, model, stages, devices
        self.window, self.arrays = window or Window(), arrays
        self._time_K1: list[float] = [0.0, *np.cumsum(buckets.seconds_K).tolist()]
        self._total = self._time_K1[-1]
        self._crossing_K: list[float] = buckets.activation_K.tolist()
        self._weights = float(buckets.parameters_K.sum())
        boundaries = (
            [n * per_server for n in range(1, stages)] if per_server and per_server * stages == devices else None
        )
        self._centres = boundaries or [round(devices * n / stages) for n in range(1, stages)]
        self._matched: dict[int, int] = {}
        self.horizon = 2 * (stages - 1)
        self.actions = max(self._choices(True), self._choices(False), 1)
        self.width = 3 * stages + self.horizon + 2 * self.actions + 1 + (3 * len(buckets) if arrays else 0)
        self._arrays = self._shown_arrays() if arrays else np.zeros(0, dtype=np.float32)
        self._prices: dict[tuple[int, ...], float] = {}
        self._shares: dict[tuple[int, int], float] = {}
        self._fitting: dict[tuple[int, int, int, int], bool] = {}
        self.reset()
        self.reference = self._even_cost()

    def _choices(self, of_devices: bool) -> int:
        radius = self.window.device_radius if of_devices else self.window.cut_radius
        if radius is not None:
            return 2 * radius + 1
        return self.devices - 1 if of_devices else len(self.buckets) - 1

    def _even_cost(self) -> float:
        """What the default costs: server boundaries and equal time; its compute alone where it does not fit."""
        cost = self.cost()
        return cost if math.isfinite(cost) else self._total / self.devices

    def reset(self) -> None:
        """Forget every cut."""
        self._taken: list[int] = []
        self._places: list[int] = []  # S - 1 device cuts, then model cuts

    @property
    def done(self) -> bool:
        """Whether every cut is made."""
        return len(self._taken) == self.horizon

    @property
    def decisions(self) -> tuple[int, ...]:
        """The actions taken so far."""
        return tuple(self._taken)

    @property
    def device_cuts(self) -> tuple[int, ...]:
        """The device cuts made so far: the first device of stages 1 to S - 1."""
        return tuple(self._places[: self.stages - 1])

    @property
    def cuts(self) -> tuple[int, ...]:
        """The model cuts made so far: the first bucket of stages 1 to S - 1."""
        return tuple(self._places[self.stages - 1 :])

    def _place_of(self, action: int) -> int:
        """The device or bucket that an action names."""
        radius = self.window.device_radius if self._on_devices else self.window.cut_radius
        return action + (1 if radius is None else self._centre() - radius)

    @property
    def _on_devices(self) -> bool:
        return len(self._taken) < self.stages - 1

    def _centre(self) -> int:
        if self._on_devices:
            return self._centres[len(self._taken)]
        return self._matching(self._places[len(self._taken) - (self.stages - 1)])

    def _matching(self, device: int) -> int:
        """The bucket before which as much of the time has passed as `device` is of all devices."""
        if device not in self._matched:
            target, time_K1, last = self._total * device / self.devices, self._time_K1, len(self.buckets)
            after = bisect.bisect_left(time_K1, target)
            nearer = after > 0 and target - time_K1[after - 1] <= time_K1[min(after, last)] - target
            self._matched[device] = min(max(1, after - 1 if nearer else after), last - 1)
        return self._matched[device]

    def _bounds(self) -> tuple[int, int]:
        """The least and largest place that leaves something for every later stage."""
        row = self.device_cuts if self._on_devices else self.cuts
        end = self.devices if self._on_devices else len(self.buckets)
        return (row[-1] if row else 0) + 1, end - (self.stages - 1 - len(row))

    def default(self) -> int:
        """Return the action of the cut that is made where none is decided: a server's boundary, an equal share of the time."""
        cuts, devices = self.completed()
        taken = len(self._taken)
        place = devices[taken] if self._on_devices else cuts[taken - (self.stages - 1)]
        return place - self._place_of(0)

    def allowed(self) -> np.ndarray:
        """Return which actions leave something for each stage and fit into memory (K,), bool."""
        low, high = self._bounds()
        first, choices = self._place_of(0), self._choices(self._on_devices)
        found = [low <= place <= high for place in range(first, first + choices)]
        if not any(found):  # an earlier cut has moved past this window: the nearest place that is left
            found[min(range(choices), key=lambda action: abs(first + action - low))] = True
        if self.window.memory and not self._on_devices:
            fitting = [ok and self._stage_fits(first + action) for action, ok in enumerate(found)]
            found = fitting if any(fitting) else found
        return np.array(found + [False] * (self.actions - choices))

    def _stage_fits(self, place: int) -> bool:
        cuts = self.cuts
        stage, first = len(cuts), cuts[-1] if cuts else 0
        ends = (0, *self.device_cuts, self.devices)
        fits = place > first and self._fits(stage, first, place, ends[stage + 1] - ends[stage])
        if fits and stage == self.stages - 2:  # the rest is the last stage
            fits = self._fits(stage + 1, place, len(self.buckets), self.devices - ends[stage + 1])
        return fits

    def _fits(self, stage: int, first: int, last: int, devices: int) -> bool:
        """What the model says of a stage, asked once."""
        key = stage, first, last, devices
        if key not in self._fitting:
            self._fitting[key] = self.model.fits(*key)
        return self._fitting[key]

    def step(self, action: int) -> bool:
        """Make a cut; a place out of reach is moved to the nearest that leaves something for each stage."""
        if self.done:
            raise ValueError(f"{self.name}: every cut is made")
        low, high = self._bounds()
        place = min(max(self._place_of(action), low), high)
        self._taken.append(action)
        self._places.append(place)
        return True

    def undo(self) -> None:
        """Take the last cut back."""
        if not self._taken:
            raise ValueError(f"{self.name}: there is no cut to take back")
        self._taken.pop()
        self._places.pop()

    def completed(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (model cuts, device cuts), those not made yet at their default: boundaries and equal shares of time."""
        devices = list(self.device_cuts)
        for n in range(len(devices), self.stages - 1):
            low, high = (devices[-1] if devices else 0) + 1, self.devices - (self.stages - 1 - n)
            devices.append(min(max(self._centres[n], low), high))
        cuts = list(self.cuts)
        for n in range(len(cuts), self.stages - 1):
            low, high = (cuts[-1] if cuts else 0) + 1, len(self.buckets) - (self.stages - 1 - n)
            cuts.append(min(max(self._matching(devices[n]), low), high))
        return tuple(cuts), tuple(devices)

    def cost(self) -> float:
        """Return the pipeline's length in seconds, cuts not made yet at their default; infinite where it does not fit."""
        cuts, devices = self.completed()
        key = (*cuts, *devices)
        if key not in self._prices:
            self._prices[key] = self.model.length(cuts, devices)
        return self._prices[key]

    def bound(self) -> float:
        """Return a length that none with these cuts is below: even shares of the time while devices are being shared out."""
        if self._on_devices or self.stages == 1:
            return self._total / self.devices
        return self.model.least(self.cuts, self.device_cuts)

    def progress(self) -> float:
        """Return the share of cuts made: nothing is partitioned here."""
        return len(self._taken) / max(1, self.horizon)

    def features(self) -> np.ndarray:
        """Return the stages' bars (S), devices (S) and parameters (S), the pointer, for each action its distance from the
        target and the bytes it cuts, the target, and the arrays where they are shown; float32.
        """
        s, found = self.stages, [0.0] * (self.width - len(self._arrays))
        rows, ends = (0, *self.cuts, len(self.buckets)), (0, *self.device_cuts, self.devices)
        for n, (a, b) in enumerate(itertools.pairwise(rows)):
            place = n if n < len(rows) - 2 else s - 1  # the remainder is the last bar
            found[place] = (self._time_K1[b] - self._time_K1[a]) / self._total
            found[2 * s + place] = self._share(a, b)
        for n, (a, b) in enumerate(itertools.pairwise(ends)):
            found[s + (n if n < len(ends) - 2 else s - 1)] = (b - a) / self.devices
        if not self.done:
            found[3 * s + len(self._taken)] = 1.0
            self._describe_actions(found, 3 * s + self.horizon)
        shown = np.array(found, dtype=np.float32)
        return np.concatenate([shown, self._arrays]) if self.arrays else shown

    def _share(self, first: int, last: int) -> float:
        """The share of the weights in buckets `first` to `last` - 1."""
        if (first, last) not in self._shares:
            weights = float(self.buckets.parameters_K[first:last].sum())
            self._shares[first, last] = weights / max(1.0, self._weights)
        return self._shares[first, last]

    def _describe_actions(self, found: list[float], start: int) -> None:
        """Write what each action would do from `start` on: distances (K), bytes (K), and the centre."""
        k = self.actions
        found[start + 2 * k] = self._centre() / (self.devices if self._on_devices else len(self.buckets))
        if self._on_devices:
            return
        target = self._total * self.device_cuts[len(self.cuts)] / self.devices
        largest = max(1.0, max(self._crossing_K))
        (low, high), first = self._bounds(), self._place_of(0)
        for place in range(max(low, first), min(high + 1, first + self._choices(False))):
            found[start + place - first] = (self._time_K1[place] - target) / self._total
            found[start + k + place - first] = self._crossing_K[place - 1] / largest

    def _shown_arrays(self) -> np.ndarray:
        rows = (self.buckets.seconds_K, self.buckets.activation_K, self.buckets.parameters_K)
        return np.concatenate([row / max(float(row.mean()), 1e-30) / 4 for row in rows]).astype(np.float32)

    def plan(self) -> dict[str, Any]:
        """Return {"cuts": first bucket of stages 1 to S - 1, "devices": their first device}."""
        cuts, devices = self.completed()
        return {"cuts": list(cuts), "devices": list(devices)}


def random_buckets(rng: np.random.Generator, count: int = 128) -> Buckets:
    """Return a made-up model: layers of random sizes, a heavy or light front and end, parameters anywhere (our distribution).

    Sizes suit four servers of 8 with NVLink inside and 25 Gbit/s between. The paper does not say what its general agent was
    trained on.
    """
    layers = int(rng.integers(6, 49))
    edges = np.unique(np.concatenate([[0], np.sort(rng.integers(1, count, layers)), [count]]))
    seconds, activation, parameters = (np.empty(count) for _ in range(3))
    base, drift = rng.uniform(0.5, 2.0), rng.uniform(-0.7, 0.7)
    for a, b in itertools.pairwise(edges):
        own, other = rng.standard_normal((2, 1 + b - a))  # of the layer, and of its buckets
        level = base * math.exp(drift * a / count) * math.exp(0.3 * own[0])
        seconds[a:b] = level * np.exp(0.2 * own[1:])
        activation[a:b] = math.exp(0.5 * other[0]) * np.exp(0.5 * other[1:])
        activation[b - 1] *= rng.uniform(0.2, 1.0)  # between layers less crosses than inside
        parameters[a:b] = math.exp(rng.normal(0.0, 0.7)) * rng.uniform(0.0, 2.0, b - a)
    for end in (0, count - 1):  # an embedding or a head
        if rng.random() < 0.5:
            seconds[end] *= rng.uniform(1.0, 6.0)
            parameters[end] *= rng.uniform(1.0, 20.0)
    # seconds on one device; what crosses and is summed takes up to 0.4 of a stage's
    whole = 10 ** rng.uniform(0.0, 1.5)
    scale_s, scale_a, scale_w = whole, rng.uniform(0.0, 0.4) * whole * 9.4e7, rng.uniform(0.0, 0.4) * whole * 7e9
    return Buckets(
        "random",
        seconds / seconds.sum() * scale_s,
        activation / activation.mean() * scale_a,
        parameters / parameters.sum() * scale_w,
    )
