"""Small made-up problems with known optima, on which searchers and the agent are checked.

Legend: N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from datamodules.planning.partition_env import PARTITIONED, REPLICATED, Assignments, SlotTable
from datamodules.planning.pipeline_env import Buckets


def blocks_table(blocks: int, useless: int = 1) -> SlotTable:
    """Return the slots of `blocks` pairs of linear layers with a bias, as column and row parallelism decide them.

    Of each block: a (in, out), its bias (out), and b (in, out). Splitting a's out splits the bias and b's in, and the other
    way round; a's in and b's out contradict everything. Then `useless` variables of one slot that cannot be split. The best
    plan splits 3 variables of each block, of 3 * blocks + useless.
    """
    names: list[str] = []
    variable: list[int] = []
    partitioned: list[Assignments | None] = []
    reach: list[int] = []
    for block in range(blocks):
        first, v = 5 * block, 3 * block
        names += [f"{block}.a[0]", f"{block}.a[1]", f"{block}.bias[0]", f"{block}.b[0]", f"{block}.b[1]"]
        variable += [v, v, v + 1, v + 2, v + 2]
        group = {first + 1, first + 2, first + 3}
        for slot in range(first, first + 5):
            good = slot in group
            partitioned.append(tuple((s, PARTITIONED) for s in sorted(group - {slot})) if good else None)
            reach.append(10 + blocks - block if good else 0)
    for place in range(useless):
        names.append(f"norm{place}[0]")
        variable.append(3 * blocks + place)
        partitioned.append(None)
        reach.append(0)
    sizes = [size for _ in range(blocks) for size in (4096, 64, 4096)] + [64] * useless
    nothing: tuple[Assignments | None, ...] = ((),) * len(names)
    return SlotTable(tuple(names), tuple(variable), tuple(sizes), nothing, tuple(partitioned), tuple(reach))


def exclusive_table() -> SlotTable:
    """Return three matrices in a row, where the first and second or the second and third are split together, not both.

    As the three fully connected layers of VGG: the groups {a out, b in} and {b out, c in} exclude each other. The second holds
    more bytes, so the best plan splits b and c, two variables of three.
    """
    groups: dict[int, tuple[int, ...]] = {1: (2,), 2: (1,), 3: (4,), 4: (3,)}
    partitioned: list[Assignments | None] = [
        tuple((other, PARTITIONED) for other in groups[slot]) if slot in groups else None for slot in range(6)
    ]
    names = tuple(f"{letter}[{dim}]" for letter in "abc" for dim in (0, 1))
    nothing: tuple[Assignments | None, ...] = ((),) * 6
    return SlotTable(names, (0, 0, 1, 1, 2, 2), (100, 1000, 1000), nothing, tuple(partitioned), (0, 5, 5, 4, 4, 0))


def chained_table(length: int) -> SlotTable:
    """Return variables of one slot in a row, where splitting one forbids splitting the next: every second is the best."""
    forbid = [
        tuple((other, REPLICATED) for other in (slot - 1, slot + 1) if 0 <= other < length) for slot in range(length)
    ]
    names = tuple(f"v{slot}[0]" for slot in range(length))
    nothing: tuple[Assignments | None, ...] = ((),) * length
    return SlotTable(names, tuple(range(length)), (100,) * length, nothing, tuple(forbid), tuple([2] * length))


@dataclass
class CoupledPricer:
    """Step time of split slots: each saves or costs something, and each pair of them again something.

    Attributes:
        base: seconds with nothing split, above whatever can be saved.
        single_N: seconds that splitting a slot adds.
        pair_NN: seconds that splitting both adds, symmetric, its diagonal zero.
        most: slots that may be split at once.
    """

    base: float
    single_N: np.ndarray
    pair_NN: np.ndarray
    most: int = 10**9
    _split: list[int] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        chosen = self._split
        pairs = self.pair_NN[np.ix_(chosen, chosen)].sum() / 2 if chosen else 0.0
        return float(self.base + self.single_N[chosen].sum() + pairs)

    @property
    def feasible(self) -> bool:
        """Whether at most `most` slots are split."""
        return len(self._split) <= self.most

    def set(self, slot: int, value: int) -> None:
        """Split a slot."""
        if value != PARTITIONED:
            raise ValueError(f"only {PARTITIONED} is set, got {value!r}")
        self._split.append(slot)

    def undo(self) -> None:
        """Take the last split back."""
        self._split.pop()


def coupled_pricer(slots: int, seed: int) -> CoupledPricer:
    """Return random savings and couplings, so strong that the best single splits are not the best together."""
    rng = np.random.default_rng(seed)
    pair = np.triu(rng.normal(0.0, 1.0, (slots, slots)), 1)
    single = rng.normal(0.0, 1.0, slots)
    base = 2.0 * (np.abs(single).sum() + np.abs(pair).sum()) / slots + 5.0 * slots
    return CoupledPricer(float(base), single, pair + pair.T)


@dataclass(frozen=True)
class EvenStages:
    """A pipeline priced by the usual short form: the sum of one micro-batch through all stages and hops, and the slowest
    (`micro_batches` - 1) times more. Source: Alpa's T = sum t_i + (M - 1) max t_i.
    """

    buckets: Buckets
    devices: int
    micro_batches: int = 4
    bytes_per_s: float = 1e9
    memory_bytes: float = float("inf")

    def length(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return the seconds of the whole batch."""
        rows, ends = (0, *cuts, len(self.buckets)), (0, *devices, self.devices)
        stages = range(len(rows) - 1)
        if not all(self.fits(n, rows[n], rows[n + 1], ends[n + 1] - ends[n]) for n in stages):
            return float("inf")
        times = [self.buckets.seconds_K[rows[n] : rows[n + 1]].sum() / (ends[n + 1] - ends[n]) for n in stages]
        hops = [2 * self.buckets.activation_K[cut - 1] / self.bytes_per_s for cut in cuts]
        each = [value / self.micro_batches for value in (*times, *hops)]
        return float(sum(each) + (self.micro_batches - 1) * max(each))

    def least(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return what the stages so far take, were the rest shared evenly."""
        rows, ends = (0, *cuts), (0, *devices, self.devices)
        done = [self.buckets.seconds_K[rows[n] : rows[n + 1]].sum() / (ends[n + 1] - ends[n]) for n in range(len(cuts))]
        rest = self.buckets.seconds_K[rows[-1] :].sum() / (ends[-1] - ends[len(rows) - 1])
        return float(max(max(done, default=0.0), rest))

    def fits(self, stage: int, first: int, last: int, devices: int) -> bool:
        """Return whether 16 bytes for each weight of four suffice."""
        return bool(4 * self.buckets.parameters_K[first:last].sum() <= self.memory_bytes)
