"""What single splits take along, for all variables of a graph in time about linear in its size.

A split variable first narrows its own block; then some activation has to be whole, and with it the same tensors of the whole
model, whichever block that started in. Such a wave is walked once: a level holds the domains behind it, and facts (a tensor
that is left no more than a set of splits) that are known to bring it lead there, where only what is the variable's own is left
to do. As propagation does not depend on the order of work, what a fact implies may be put in at once: results are those of
`propagate`.

Legend: T tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.planning._propagate_numba import DONE, STOPPED, take_back
from datamodules.planning.graph import Graph
from datamodules.planning.propagate import Domains, Propagator, bit_of, propagator_of

FAR = 2048  # changes from which a wave has a level of its own
NEAR = 256  # changes up to which a fact counts as near, so that none nearer is looked for
TRIES, MISSES, LEVELS = 4, 32, 16  # facts tried after a walk, walks in a row without finding one, levels at most


@dataclass
class Level:
    """Domains (T,) from which nothing follows; of each tensor the set (T,) that leads on, 0 for none, and where to (T,)."""

    domains: Domains
    known: Domains
    leads: np.ndarray


class Waves:
    """Spreads of single splits; see the module."""

    def __init__(self, engine: Propagator) -> None:
        self.engine = engine
        self._gradients = {p.tensor: p.gradient for p in engine.graph.parameters}
        self._log = np.zeros((sum(len(t.shape) + 1 for t in engine.graph.tensors), 3), dtype=np.int64)
        self._levels, self._misses = [_level(engine.root)], 0

    def spread(self, tensor: int, split: int) -> tuple[tuple[int, int], ...]:
        """Return what is split once a variable is, as (tensor, dim) pairs, the variable first and then by tensor.

        Where the split contradicts itself that is the variable alone, with its gradient. Everything whole contradicts no wave,
        so that the tensors left one split are among those that the last walk changed.
        """
        level = self._levels[0]
        while True:
            ended, log = self._walk(level, tensor, bit_of(split))
            if len(log) > NEAR and self._misses < MISSES:
                self._misses = 0 if self._learn(level, log) else self._misses + 1
            if ended != STOPPED:
                break
            level = self._levels[level.leads[log[-1, 0]]]
        if ended == DONE:
            single = log[(log[:, 2] > 1) & (log[:, 2] & (log[:, 2] - 1) == 0)]
            rest = sorted((t, bits.bit_length() - 2) for t, _, bits in single.tolist() if t != tensor)
            return ((tensor, split), *rest)
        own = self._gradients.get(tensor)
        return ((tensor, split), *(() if own is None else ((own, split),)))

    def _walk(self, level: Level, tensor: int, bits: int) -> tuple[int, np.ndarray]:
        """Narrow a tensor and propagate: how that ended, see `close`, and what changed; the level is left as it is."""
        before = int(level.domains[tensor])
        if before & bits == 0:
            return 0, self._log[:0]
        level.domains[tensor], self._log[0] = before & bits, (tensor, before, before & bits)
        ended, changes = self.engine.close(level.domains, self.engine.users(tensor), self._log[1:], level.known)
        take_back(level.domains, self._log, changes + 1)
        return ended, self._log[: changes + 1].copy()

    def _learn(self, level: Level, log: np.ndarray) -> bool:
        """Note one of a walk's facts that brings a wave; those of tensors that many operations read are tried first."""
        usable = (log[:, 2] & 1 == 1) & (
            level.known[log[:, 0]] == 0
        )  # the tensor may still be whole, and leads nowhere yet
        facts = log[1:][usable[1:]].tolist()
        for tensor, _, bits in sorted(facts, key=lambda fact: -len(self.engine.users(fact[0])))[:TRIES]:
            ended, walk = self._walk(level, tensor, bits)
            if ended == STOPPED:
                level.known[tensor], level.leads[tensor] = bits, level.leads[walk[-1, 0]]
                return True
            if ended == DONE and len(walk) > FAR and len(self._levels) < LEVELS:
                behind = level.domains.copy()
                behind[walk[:, 0]] = walk[:, 2]
                level.known[tensor], level.leads[tensor] = bits, len(self._levels)
                self._levels.append(_level(behind))
                return True
        return False


def _level(domains: Domains) -> Level:
    return Level(domains, np.zeros_like(domains), np.zeros(len(domains), dtype=np.int64))


def waves_of(graph: Graph, devices: int) -> Waves:
    """Return the graph's waves, made on first use and kept with the graph."""
    kept = graph.__dict__.setdefault("_waves", {})
    if devices not in kept:
        kept[devices] = Waves(propagator_of(graph, devices))
    return kept[devices]
