"""The network that values actions: a multilayer perceptron, plain or dueling, of values or of distributions over values.

Legend: B batch, F features of an observation, K actions, A atoms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class QNetwork(nn.Module):
    """Map observations (B, F) to the value of each action (B, K) or, with atoms, to probabilities of values (B, K, A).

    Args:
        features: F.
        actions: K.
        hidden: width of each hidden layer; two of 128 are ours, the paper's are not known.
        dueling: the value is V(s) + Q(s, a) - mean over a of Q(s, a), from two heads (arXiv 1511.06581).
        atoms: A of a categorical value distribution (arXiv 1707.06887), or 1 for the value itself.
    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, features: int, actions: int, hidden: Sequence[int] = (128, 128), dueling: bool = True, atoms: int = 1
    ) -> None:
        super().__init__()
        for name, value in {
            "features": features,
            "actions": actions,
            "atoms": atoms,
            "hidden": min(hidden, default=1),
        }.items():
            if value < 1:
                raise ValueError(f"{name} of a Q-network must be at least 1, got {value!r}")
        self.actions, self.atoms, self.features = actions, atoms, features
        layers: list[nn.Module] = []
        width = features
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.body = nn.Sequential(*layers)
        self.advantage = nn.Linear(width, actions * atoms)
        self.value = nn.Linear(width, atoms) if dueling else None

    def forward(self, x_BF: Tensor) -> Tensor:
        """Return (B, K), or (B, K, A) with atoms."""
        h = self.body(x_BF)
        q_BKA = self.advantage(h).view(-1, self.actions, self.atoms)
        if self.value is not None:
            q_BKA = q_BKA - q_BKA.mean(1, keepdim=True) + self.value(h).view(-1, 1, self.atoms)
        return q_BKA.squeeze(2) if self.atoms == 1 else torch.softmax(q_BKA, dim=2)
