"""A weight mapping as data: every target key is covered by exactly one rule, every source key is used, or it is an error.

The idea of a mapping as a list of rules is vmoe's, the strictness is that of OLMo's upcycling script; both as described,
neither read for code. Nothing here knows about experts: `lit_modules.ops.upcycling` writes the rules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_modules.ops.upcycling_experts import Draws

Kind = Literal["copied", "derived", "new"]
Shape = tuple[int, ...]


class UpcycleError(ValueError):
    """A checkpoint and a target that do not fit; the message names every key that does not, one a line."""


@dataclass(frozen=True)
class Call:
    """What a rule may look at besides its parent: the key it makes, random streams, and the target's own fresh tensor."""

    key: str
    draws: Draws
    fresh: Tensor | None


@dataclass(frozen=True)
class Rule:
    """One line of the mapping.

    Attributes:
        pattern: regular expression that a target key matches as a whole; its named groups fill `source`.
        kind: "copied" (the parent as it is), "derived" (computed from it) or "new" (only its width and dtype are read).
        source: the parent's key, for example "blocks.{layer}.mlp.up.weight".
        shape: the target's shape out of the parent's; raises ValueError with a reason where there is none.
        make: the tensor, a new one unless the rule copies.
    """

    pattern: str
    kind: Kind
    source: str
    shape: Callable[[Shape], Shape]
    make: Callable[[Tensor, Call], Tensor]


@dataclass(frozen=True)
class Step:
    """A rule applied to one target key."""

    key: str
    source: str
    shape: Shape
    rule: Rule


def copy_rule(pattern: str, source: str = "{key}") -> Rule:
    """Return the rule that hands a tensor over as it is: the very object, not a clone."""
    return Rule(pattern, "copied", source, lambda shape: shape, lambda parent, call: parent)


def match(
    source_shapes: Mapping[str, Sequence[int]], target_shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule]
) -> tuple[Step, ...]:
    """Return one step per target key, in the target's order; no tensor is touched.

    Raises:
        UpcycleError: a target key that no rule or several rules cover, whose parent is missing or whose shape comes out
            otherwise, or a source key that nothing uses; all of them in one message.
    """
    steps: list[Step] = []
    problems: list[str] = []
    for key, wanted in target_shapes.items():
        found = _step(key, tuple(wanted), source_shapes, rules)
        if isinstance(found, Step):
            steps.append(found)
        else:
            problems.append(found)
    # a key whose step failed has been named already: do not name its parent as unused as well
    if not problems:
        used = {step.source for step in steps if step.rule.kind != "new"}
        problems = [f"source key {key!r} is used by no target key" for key in source_shapes if key not in used]
    if problems:
        raise UpcycleError("\n".join(problems))
    return tuple(steps)


def _step(key: str, wanted: Shape, sources: Mapping[str, Sequence[int]], rules: Sequence[Rule]) -> Step | str:
    """Return the step for one key, or what is wrong with it."""
    hits = [(rule, hit) for rule in rules if (hit := re.fullmatch(rule.pattern, key))]
    if len(hits) != 1:
        several = ", ".join(rule.pattern for rule, _ in hits)
        return f"target key {key!r} is covered by {f'several rules: {several}' if hits else 'no rule'}"
    rule, hit = hits[0]
    source = rule.source.format(key=key, **hit.groupdict())
    if source not in sources:
        near = difflib.get_close_matches(source, list(sources), n=1, cutoff=0.6)
        hint = f" (nearest: {near[0]!r})" if near else ""
        return f"target key {key!r} needs source key {source!r}, which the checkpoint has not{hint}"
    parent = tuple(sources[source])
    try:
        shape = rule.shape(parent)
    except ValueError as error:
        return f"target key {key!r} from source key {source!r} of shape {parent}: {error}"
    if shape != wanted:
        return f"target key {key!r} has shape {wanted}, but source key {source!r} of shape {parent} gives {shape}"
    return Step(key, source, shape, rule)


def tensors(
    steps: Sequence[Step],
    state: Mapping[str, Tensor],
    generator: torch.Generator,
    fresh: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) one by one, so that a converter never holds more than one made tensor.

    Args:
        steps: what `match` returned.
        state: the parent; may be a lazy mapping, each access is one tensor read.
        generator: one number is drawn from it, on the first step.
        fresh: the target's own freshly initialised tensors. Where given, dtypes are compared with it.
    Raises:
        UpcycleError: a tensor whose shape is not what was announced, or whose dtype is not the target's (nothing is
            cast silently), or a rule that needs a fresh tensor and has none.
    """
    draws = Draws(generator)
    for step in steps:
        own = None if fresh is None else fresh.get(step.key)
        made = step.rule.make(state[step.source], Call(step.key, draws, own))
        if tuple(made.shape) != step.shape:
            raise UpcycleError(f"target key {step.key!r} came out as {tuple(made.shape)}, not {step.shape}")
        if own is not None and made.dtype != own.dtype:
            raise UpcycleError(
                f"target key {step.key!r} is {own.dtype}, but source key {step.source!r} gives {made.dtype}: "
                "cast the checkpoint or the net first, nothing is cast silently"
            )
        yield step.key, made
