"""What a plan keeps in the memory of each device, by part, against a hard limit. Units: bytes.

Variables, their gradients and Adam's two moments are held from step to step. Activations come and go: a tensor lives from the
operation that makes it to the last one that reads it, views with what they look at; of every micro-batch in flight but one,
what its backward pass will need is kept beside that peak.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from datamodules.planning.tables import Tables
from datamodules.planning.topology import Topology

MOMENTS = 2  # of Adam, in the variable's dtype


@dataclass(frozen=True)
class Memory:
    """Bytes on one device of a stage, by part."""

    variables: float
    gradients: float
    optimiser: float
    activations: float
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def violation(self, topology: Topology, what: str) -> str | None:
        """What is wrong, with the number of bytes too many; None where it fits."""
        over = self.total - topology.memory_limit
        if over <= 0:
            return None
        largest = max(asdict(self).items(), key=lambda part: part[1])
        return (
            f"{what} needs {self.total:,.0f} bytes on each device, {over:,.0f} more than the {topology.memory_limit:,} that "
            f"topology {topology.name} allows; most of it {largest[0]} ({largest[1]:,.0f})"
        )


def memory_of(tables: Tables, place_T: np.ndarray, held: int) -> Memory:
    """Memory of a stage that holds the activations of `held` micro-batches at most."""
    peak, kept = tables.live(place_T)
    variables = tables.variable_bytes(place_T)
    return Memory(
        variables=variables,
        gradients=variables,
        optimiser=MOMENTS * variables,
        activations=peak + (held - 1) * kept,
        buffers=float(tables.size_T[list(tables.buffers)].sum()),
    )
