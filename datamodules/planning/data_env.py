"""Automatic data parallelism as decisions: one slot for each dim of each input, split over all devices or not.

On an intermediate representation nobody says which dim of which argument is the batch: it has to be found. Batch dims follow
the data from input to input, so a decision about one settles the others by its linkage group.
Source: dossier 1.2, 1.6.
"""

from __future__ import annotations

from datamodules.planning.graph import Graph
from datamodules.planning.partition_env import PartitionProblem, Pruning, SlotTable
from datamodules.planning.plan import batch_dims


def input_problem(graph: Graph, table: SlotTable, pruning: Pruning | None = None) -> PartitionProblem:
    """Return the problem of splitting as many inputs as can be, each in one dim: the paper's reward.

    Args:
        table: slots of the inputs' dims, with their linkage groups.
    """
    return PartitionProblem(f"inputs of {graph.name}", table, "count", None, pruning)


def batch_agreement(graph: Graph, split: set[tuple[int, int]]) -> float:
    """Return in percent how many inputs are treated as the front end knows it: split in their batch dim, or not at all."""
    known = batch_dims(graph)
    right = 0
    for tensor in graph.inputs:
        found = {dim for t, dim in split if t == tensor}
        right += found == ({known[tensor]} if tensor in known else set())
    return 100.0 * right / max(1, len(graph.inputs))
