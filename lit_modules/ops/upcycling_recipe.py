"""What is to be built, how it begins, and the receipt of having done it.

Follows arXiv 2410.07524; what other papers or we add says so. Legend: E expansion, G granularity, T experts per token,
N = E * G experts, F hidden units of the dense MLP, D width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lit_modules.ops import upcycling_scale as scaling
from lit_modules.ops.upcycling_scale import Factors

OUTPUTS = ("none", "constant", "learnable", "layernorm")
REINIT_RULES = ("qwen2", "drop_upcycling")
SIGMA_LIMIT = 0.05  # router logits this spread make softmax_topk about 7% too large at step 0 (E = 8)


@dataclass(frozen=True)
class Target:
    """What is built: the shape of the MoE layers, and which layers are MoE.

    Attributes:
        layers: indices of the blocks whose MLP becomes a mixture; the others stay dense.
        shared: shared experts of width F / G beside the routed ones.
        output: what follows the experts: "none", a "constant", a "learnable" scalar or a "layernorm". It does not
            apply to shared experts.
        output_value: the constant, or the initial value of the scalar or of the norm's gains, unless the recipe's scale
            is "output".
        router_std: spread of the net's own fresh router, for the receipt.
    Raises:
        ValueError: what `check_routing` refuses, or an unknown activation or output.
    """

    expansion: int
    granularity: int
    top_k: int
    order: str
    activation: str
    layers: tuple[int, ...]
    shared: int = 0
    output: str = "none"
    output_value: float = 1.0
    router_std: float | None = None

    def __post_init__(self) -> None:
        scaling.check_routing(self.expansion, self.granularity, self.top_k, self.order)
        scaling.checked("activation", self.activation, scaling.ACTIVATIONS)
        scaling.checked("output", self.output, OUTPUTS)

    @property
    def experts(self) -> int:
        """N = E * G."""
        return self.expansion * self.granularity


@dataclass(frozen=True)
class Recipe:
    """How the experts and the router begin.

    Everything that makes copies differ is done before the scaling, in this order: permute, shard, re-initialise, noise.

    Attributes:
        init: "virtual_group" (the paper's) or "random_router" (its control: N independent rows).
        scale: a mode or a factor, see `scale_of`.
        router_std: of the router's fresh normal rows; None keeps the target net's own (its first E rows for virtual
            groups with G > 1, as Megatron-LM does). The paper does not give its value.
        permute: every replica of the MLP gets its own order of the hidden units before it is cut into shards (paper 3.8
            names "weight permutation" in the style of Qwen2; that it is one order per replica, shared by gate, up and
            down, is inferred). Kept: each replica is still the whole MLP, so with virtual groups and T divisible by G
            step 0 is exact as before. Lost: shard j of two replicas no longer holds the same units, so a token whose
            picks mix replicas sees some units twice and misses others, even if it picks one of each shard. With
            G = 1 nothing changes but the order of the units: training is the same up to it.
        reinit: share of the expert weights that is drawn anew; 0 is off, Qwen2 and Drop-Upcycling use 0.5. Step 0 is
            not preserved. `reinit_rule`: "qwen2" (entries, from the initial normal) or "drop_upcycling" (whole hidden
            units, from a normal with the mean and standard deviation of what they replace).
        init_std: of the initial normal that "qwen2" redraws from; None takes the target net's own fresh weights.
        noise: Gaussian noise on half of the entries, relative to each matrix's standard deviation (OLMoE). 0 is off.
    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    init: str = "virtual_group"
    scale: str | float = "paper"
    router_std: float | None = None
    permute: bool = False
    reinit: float = 0.0
    reinit_rule: str = "qwen2"
    init_std: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        scaling.checked("init", self.init, scaling.INITS)
        scaling.checked("reinit_rule", self.reinit_rule, REINIT_RULES)
        scaling.scale_of(1, 1, 1, "softmax_topk", "relu", self.scale)
        if not 0 <= self.reinit <= 1:
            raise ValueError(f"reinit is a share between 0 and 1, got {self.reinit}")
        for name in ("router_std", "init_std", "noise"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is finite and not negative, got {value}")

    def factors(self, target: Target) -> Factors:
        """Return what the target's expert matrices are multiplied by."""
        return scaling.scale_of(
            target.expansion, target.granularity, target.top_k, target.order, target.activation, self.scale
        )

    def halves(self, target: Target) -> bool:
        """Whether hidden units that shared experts hold as well are shared out (on down, so for any activation).

        With shared = G both halves then carry half of the output at step 0. Ours: the paper does not say. Plain copies
        (scale "none" or a number) are left as they are.
        """
        return bool(target.shared) and isinstance(self.scale, str) and self.scale != "none"


@dataclass(frozen=True)
class Receipt:
    """What was done: keys by kind, C and the factors, parameter counts, and what to know before trusting the start.

    `router_sigma` is the spread of the router's logits for inputs of unit RMS, None where the router's is not known.
    """

    copied: tuple[str, ...]
    derived: tuple[str, ...]
    new: tuple[str, ...]
    correction: float
    factors: Factors
    parameters_before: int
    parameters_after: int
    router_sigma: float | None = None
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for a JSON file."""
        return dataclasses.asdict(self)


def cautions(target: Target, recipe: Recipe, sigma: float | None, untied: bool) -> tuple[str, ...]:
    """Return what makes step 0 differ from the dense model, or is easily overlooked."""
    found = []
    expansion, granularity, top_k = target.expansion, target.granularity, target.top_k
    missing = scaling.correction(expansion, granularity, top_k, target.order)
    error = scaling.expected_error(expansion, granularity, top_k, recipe.init)
    if error and recipe.init == "virtual_group":
        rest = top_k % granularity
        held = f"every shard {top_k // granularity} times and " if top_k >= granularity else ""
        found.append(
            f"top_k={top_k} is not divisible by granularity={granularity}: a token's picks hold {held}only {rest} of the "
            f"{granularity} shards once more, which ones is a matter of ties; step 0 is expected to be off by "
            f"{error:.2f} of the dense output"
        )
    elif error:
        found.append(
            f"a random router does not pick one of each of the {granularity} shards: step 0 is expected to be off by "
            f"{error:.2f} of the dense output"
        )
    if not scaling.preserves(recipe.scale, target.activation, missing):
        found.append(
            f"scale={recipe.scale!r} does not multiply a {target.activation} MLP by C={missing:g} exactly: step 0 differs "
            "from the dense model (scale='exact' does not)"
        )
    if target.order == "softmax_topk" and sigma is not None and sigma > SIGMA_LIMIT and expansion > 1:
        gain = scaling.expected_gain(expansion, granularity, top_k, sigma)
        found.append(
            f"router logits spread by about {sigma:.2g} for inputs of unit RMS: the kept probabilities exceed 1/N and "
            f"step 0 is about {gain:.2g} times too large (first order)"
        )
    if target.output == "layernorm":
        found.append("a norm after the experts sets their scale itself: step 0 is not the dense model")
    elif recipe.scale != "output" and target.output_value != 1 and target.output != "none":
        found.append(f"the output factor {target.output_value:g} comes on top of scale={recipe.scale!r}")
    if recipe.reinit or recipe.noise:
        found.append("re-initialised or noisy experts: step 0 is not the dense model")
    if recipe.permute and granularity > 1:
        found.append(
            "permuted replicas: shard j holds other units in every replica, purity no longer implies the parent"
        )
    if expansion == 1:
        found.append(
            "expansion 1: one replica of every shard, so there is nothing to choose between and none to diverge"
        )
    if untied:
        found.append(
            "the parent ties its head to the embedding and the target does not: the head starts as a copy of it"
        )
    return tuple(found)
