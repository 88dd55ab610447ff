"""How much too small an upcycled MoE layer is at step 0, and which factors on its matrices undo that.

Follows "Upcycling Large Language Models into Mixture of Experts" (arXiv 2410.07524) and, where the paper is silent, the
exponents of Megatron-LM's converter; what is ours is marked so. Two routing orders (paper 2.1.2):

- "softmax_topk": softmax over all N logits, the T largest probabilities kept as they are, never renormalised;
- "topk_softmax": softmax over the T largest logits only (what Mixtral does; the same as renormalising the kept ones).

Legend: E expansion rate, G granularity, T experts per token, N = E * G experts, C the missing factor of the output.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

import torch

ORDERS = ("softmax_topk", "topk_softmax")
INITS = ("virtual_group", "random_router")
MODES = ("paper", "exact", "down_only", "output", "none")

GATED = frozenset({"swiglu", "geglu", "reglu"})
# scaling every matrix by f scales the output by f ** degree; the other activations have no such degree
DEGREE = {"relu": 2, "squared_relu": 3, "reglu": 3}
ACTIVATIONS = ("relu", "squared_relu", "gelu", "silu", *sorted(GATED))


@dataclass(frozen=True)
class Factors:
    """What every expert matrix is multiplied by, and what the layer's output is.

    `gate` is 1 for an activation without a gate. `output` is not a weight: it belongs into the module's output factor.
    """

    up: float
    gate: float
    down: float
    output: float = 1.0


def checked(name: str, value: str, known: tuple[str, ...]) -> str:
    """Return `value` if it is one of `known`.

    Raises:
        ValueError: it is not, with the nearest one named.
    """
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.3)
        hint = f", nearest: {near[0]!r}" if near else ""
        raise ValueError(f"unknown {name} {value!r}{hint}; known: {', '.join(known)}")
    return value


def check_routing(expansion: int, granularity: int, top_k: int, order: str) -> None:
    """Refuse what cannot be routed.

    Raises:
        ValueError: E, G or T out of range, an unknown order, or T = 1 with "topk_softmax".
    """
    experts = expansion * granularity
    if expansion < 1 or granularity < 1:
        raise ValueError(f"expansion and granularity are at least 1, got {expansion} and {granularity}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is between 1 and the {experts} experts of E{expansion}G{granularity}, got {top_k}")
    if checked("order", order, ORDERS) == "topk_softmax" and top_k == 1:
        raise ValueError(
            "top_k=1 with order='topk_softmax' cannot learn to route: the softmax of the one kept logit is 1 whatever "
            "the router says, so the router's gradient is zero (paper 2.1.2). Use order='softmax_topk' or top_k >= 2"
        )


def correction(expansion: int, granularity: int, top_k: int, order: str) -> float:
    """Return C: how many times too small the output is at step 0, with virtual groups and unscaled weights.

    "softmax_topk": C = E * G^2 / T (paper eq. 2): each kept probability is about 1 / (E * G), and T of them contribute
    T / G whole dense outputs. The uniform probability is the paper's simplification, true only as the router's logits
    go to zero (`expected_gain`). "topk_softmax": C = G, for any router (paper 2.3 states it for E8G8T8; Megatron-LM
    uses it).

    Raises:
        ValueError: as `check_routing`.
    """
    check_routing(expansion, granularity, top_k, order)
    return float(granularity) if order == "topk_softmax" else expansion * granularity**2 / top_k


def scale_of(
    expansion: int, granularity: int, top_k: int, order: str, activation: str, mode: str | float = "paper"
) -> Factors:
    """Return the factors that repair the output, or one of the alternatives the paper compares.

    Modes:
        "paper": one factor on every matrix, C^(1/3) for squared ReLU and for gated MLPs, C^(1/2) for the others (paper
            2.3.1; the exponents by activation are Megatron-LM's). Function preserving for relu, squared_relu and reglu
            only; for swiglu the paper found it empirically no worse than a tuned split and claims no exactness.
        "exact": ours. As "paper" where that is exact (relu, squared_relu, reglu are homogeneous); sqrt(C) on up and
            down for swiglu and geglu, whose gate sits inside the nonlinearity (AI2's OLMo-core branch does the same);
            C on down alone for gelu and silu.
        "down_only": C on down: exact for every activation. The paper tried it and found it worse (3.5).
        "output": no weight is touched, C multiplies the layer's output, as a constant or as the initial value of a
            learnable scalar. The paper tried both and found them worse (3.5).
        "none": nothing is scaled (the paper's control).
        a number f: f on every matrix (the paper tried 2, 2.5 and 4 for E8G8T8; 4 = C^(1/3) was best).
    Raises:
        ValueError: an unknown mode or activation, a factor that is not positive, or as `check_routing`.
    """
    missing = correction(expansion, granularity, top_k, order)
    gated = checked("activation", activation, ACTIVATIONS) in GATED
    if isinstance(mode, (int, float)):
        if not (math.isfinite(mode) and mode > 0):
            raise ValueError(f"a scale factor is positive and finite, got {mode}")
        return _equal(float(mode), gated)
    mode = checked("scale mode", mode, MODES)
    if mode == "none":
        return Factors(1.0, 1.0, 1.0)
    if mode == "output":
        return Factors(1.0, 1.0, 1.0, output=missing)
    if mode == "paper" or (mode == "exact" and activation in DEGREE):
        return _equal(missing ** (1 / 3 if gated or activation == "squared_relu" else 1 / 2), gated)
    if mode == "exact" and gated:
        return Factors(math.sqrt(missing), 1.0, math.sqrt(missing))
    return Factors(1.0, 1.0, missing)


def _equal(factor: float, gated: bool) -> Factors:
    return Factors(factor, factor if gated else 1.0, factor)


def preserves(mode: str | float, activation: str, missing: float) -> bool:
    """Whether these factors multiply the MLP's output by C = `missing` exactly, whatever the weights."""
    if isinstance(mode, (int, float)):
        return activation in DEGREE and math.isclose(mode ** DEGREE[activation], missing, rel_tol=1e-9)
    if mode == "none":
        return missing == 1
    return mode != "paper" or activation in DEGREE or missing == 1


def expected_error(expansion: int, granularity: int, top_k: int, init: str) -> float:
    """Return the expected step-0 error, relative to the dense output, that the choice of experts alone causes.

    Ours. For uniform kept probabilities and a correct scale. A token's T picks hold shard j n_j times and the output is
    (G / T) * sum_j n_j y_j instead of sum_j y_j; for uncorrelated shard outputs y_j of equal norm that is off by
    (G / T) * sd(n_j). Virtual groups: every n_j is floor(T / G) or one more, so sd = sqrt(f * (1 - f)) with
    f = (T mod G) / G, and zero when G divides T. Random router: T picks out of N, hypergeometric.

    Raises:
        ValueError: an unknown init.
    """
    if checked("init", init, INITS) == "virtual_group":
        fraction = (top_k % granularity) / granularity
        variance = fraction * (1 - fraction)
    else:
        experts = expansion * granularity
        share = 1 / granularity
        variance = top_k * share * (1 - share) * (experts - top_k) / max(experts - 1, 1)
    return math.sqrt(variance) * granularity / top_k


def expected_gain(expansion: int, granularity: int, top_k: int, sigma: float) -> float:
    """Return about how many times too large "softmax_topk" output is at step 0 for router logits of spread `sigma`.

    Ours, to first order in sigma (use it below 0.2): the kept probabilities are not 1 / N but those of the best
    replicas, whose logits lie above the mean by sigma times the mean of the largest T / G of E normal order statistics
    (Blom's approximation). `sigma` is router_std * sqrt(D) for inputs of unit RMS.
    """
    replicas = max(1, min(expansion, top_k // granularity))
    ranks = torch.arange(expansion, expansion - replicas, -1, dtype=torch.float64)
    quantiles = torch.special.ndtri((ranks - 0.375) / (expansion + 0.25))
    return 1.0 + sigma * quantiles.mean().item()
