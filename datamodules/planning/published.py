"""The plans that the paper prints, as rules on the names of variables, and how far a plan of ours agrees.

PyTorch keeps a linear layer as [out, in], the paper's frameworks as [in, out]: dims are exchanged here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from datamodules.planning.graph import Graph

WHOLE = -1

# Table 3 (T5 family): self-attention q, k, v by column and o by row, the MLP's first layer by column with its bias, its second
# by row without, the embedding by vocabulary, normalisations whole. Position biases are not in it. For BERT and GPT-2 the
# biases of attention follow their kernels (ours).
TRANSFORMER: Sequence[tuple[str, int]] = (
    (r"(attention|cross)\.(query|key|value)\.(weight|bias)$", 0),
    (r"(attention|cross)\.output\.weight$", 1),
    (r"(attention|cross)\.output\.bias$", WHOLE),
    (r"mlp\.up\.(weight|bias)$", 0),
    (r"mlp\.down\.weight$", 1),
    (r"mlp\.down\.bias$", WHOLE),
    (r"^words\.weight$", 0),
    (r"norm", WHOLE),
)
# Table 4 (VGG-19): convolutions whole, the fully connected layers by column, row, column; fc2's bias is split in the print,
# which its kernel, split by row, cannot lead to.
VGG: Sequence[tuple[str, int]] = (
    (r"^fc1\.(weight|bias)$", 0),
    (r"^fc2\.weight$", 1),
    (r"^fc2\.bias$", 0),
    (r"^predictions\.(weight|bias)$", 0),
    (r"conv|features", WHOLE),
)
TABLES: Mapping[str, Sequence[tuple[str, int]]] = {
    "t5": TRANSFORMER,
    "bert": TRANSFORMER,
    "gpt2": TRANSFORMER,
    "vgg19": VGG,
}


def table_of(graph: Graph) -> Sequence[tuple[str, int]] | None:
    """Return the printed plan of a workload's family, None where the paper prints none."""
    family = re.match(r"[a-z0-9]+", graph.name)
    return TABLES.get(family[0]) if family else None


def expected(graph: Graph) -> dict[int, int]:
    """Return {variable: dim or -1} of the variables that the printed plan speaks of."""
    rules = table_of(graph) or ()
    found: dict[int, int] = {}
    for parameter in graph.parameters:
        for pattern, dim in rules:
            if re.search(pattern, parameter.name):
                found[parameter.tensor] = dim
                break
    return found


def agreement(graph: Graph, split: Mapping[int, int], divisible_by: int = 1) -> float | None:
    """Return in percent how many variables are split as printed; None where nothing is printed of this model.

    Args:
        split: {variable: dim} of what a plan splits; others are whole.
        divisible_by: devices; variables whose printed dim these do not divide are left out.
    """
    wanted = {
        tensor: dim
        for tensor, dim in expected(graph).items()
        if dim == WHOLE or graph.tensors[tensor].shape[dim] % divisible_by == 0
    }
    if not wanted:
        return None
    return 100.0 * sum(split.get(tensor, WHOLE) == dim for tensor, dim in wanted.items()) / len(wanted)
