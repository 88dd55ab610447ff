"""StableHLO and HLO text as a Graph: the second front end, for programs of JAX, TensorFlow or whatever XLA compiles.

The program should be a whole training step, as the paper has it: it returns the loss and the gradients (or the new values)
of its trainable arguments. Which arguments these are is told, or found from the names that JAX prints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.planning.assemble import assemble
from datamodules.planning.graph import Graph, Parameter
from datamodules.planning.hlo_kinds import Writer, refuse, write
from datamodules.planning.hlo_module import Argument, Function, HloError, Instruction, Module
from datamodules.planning.hlo_stable import read_stablehlo
from datamodules.planning.hlo_text import read_hlo

DEPTH = 64  # of calls within calls


def load_hlo(path: Path | str, parameters: Mapping[int, int | None] | None = None) -> Graph:
    """Return the graph of a file; see `import_hlo`."""
    path = Path(path)
    return import_hlo(path.read_text(), parameters, path.stem)


def import_hlo(text: str, parameters: Mapping[int, int | None] | None = None, name: str = "") -> Graph:
    """Return the graph of a StableHLO or HLO module, calls and fusions spread out.

    Args:
        parameters: number of each trainable argument of the program -> number of the result that is its gradient, or None.
            Left out, an argument is trainable if a result of its shape bears the same name in JAX's pytrees
            ("params['w']" and "result[1]['w']"), or if it is donated to a result (tf.aliasing_output), or, without names, if
            results are a scalar and then as many as there are leading arguments of their shapes (value_and_grad's order).
        name: of the graph; the module's own if empty.
    Raises:
        HloError: not such a text; dynamic shapes, loops, branches, communication; no trainable argument found.
    """
    module = read_stablehlo(text) if "func.func" in text else read_hlo(text)
    main = module.functions[module.entry]
    writer = Writer()
    values = {a.name: writer.tensor(_name(a, i), a.type) for i, a in enumerate(main.arguments)}
    arguments = [values[a.name] for a in main.arguments]
    results = _results(writer, module, main, values)
    ties = check_ties(main, results, parameters) if parameters is not None else find_ties(writer, main, results)
    trained = tuple(
        Parameter(writer.tensors[arguments[a]].name, arguments[a], None if r is None else results[r])
        for a, r in sorted(ties.items())
    )
    inputs = [t for i, t in enumerate(arguments) if i not in ties]
    outputs = list(dict.fromkeys(results))
    return assemble(name or module.name, writer.tensors, writer.ops, trained, inputs, outputs)


def _name(argument: Argument, index: int) -> str:
    return argument.label or f"arg{index}"


def _results(writer: Writer, module: Module, function: Function, values: dict[str, int]) -> list[int]:
    """Write a function's body; returns the numbers of what it returns."""
    found = _walk(writer, module, function, {name: [t] for name, t in values.items()}, "", DEPTH)
    return [t for group in found for t in group]


def _walk(
    writer: Writer, module: Module, function: Function, values: dict[str, list[int]], note: str, depth: int
) -> list[list[int]]:
    """Like _results; a value may be several tensors (HLO's tuples), and `note` is that of the call."""
    if depth == 0:
        raise HloError(f"{function.name} calls itself")
    for inner in function.body:
        refuse(inner)
        instruction = replace(inner, note=join_notes(note, inner.note))
        groups = [_look_up(values, operand, function) for operand in instruction.operands]
        if instruction.opcode == "get_tuple_element":
            made = [groups[0][instruction.attributes["index"]]]
        elif instruction.callee is not None:
            made = _call(writer, module, instruction, groups, depth)
        else:
            made = write(writer, instruction, [t for group in groups for t in group])
        values[instruction.results[0].partition("#")[0]] = made
        values |= {result: [t] for result, t in zip(instruction.results, made, strict=False)}
    return [_look_up(values, name, function) for name in function.returns]


def _look_up(values: Mapping[str, list[int]], name: str, function: Function) -> list[int]:
    found = values.get(name) or values.get(name.partition("#")[0])
    if found is None:
        raise HloError(f"{function.name} reads {name}, which nothing before it makes")
    return found


def _call(
    writer: Writer, module: Module, instruction: Instruction, groups: Sequence[list[int]], depth: int
) -> list[int]:
    callee = module.functions.get(instruction.callee or "")
    if callee is None:
        raise HloError(f"{instruction.results[0]} calls {instruction.callee}, which is not in this module")
    if len(callee.arguments) != len(groups):
        raise HloError(
            f"{callee.name} takes {len(callee.arguments)} arguments, {instruction.results[0]} gives {len(groups)}"
        )
    inner = {a.name: group for a, group in zip(callee.arguments, groups, strict=True)}
    return [t for group in _walk(writer, module, callee, inner, instruction.note, depth - 1) for t in group]


def join_notes(outer: str, inner: str) -> str:
    """The name stack of an instruction in a called function: its own if that is a whole one, else that of the call first."""
    whole = not outer or inner.split("/")[0] == outer.split("/")[0]
    return inner if whole else f"{outer}/{inner}"


def check_ties(main: Function, results: Sequence[int], ties: Mapping[int, int | None]) -> Mapping[int, int | None]:
    """Refuse numbers that are none of an argument or a result.

    Raises:
        HloError: which.
    """
    for argument, result in ties.items():
        if not 0 <= argument < len(main.arguments):
            raise HloError(f"parameters: there is no argument {argument}; there are {len(main.arguments)}")
        if result is not None and not 0 <= result < len(results):
            raise HloError(f"parameters: there is no result {result}; there are {len(results)}")
    return ties


def find_ties(writer: Writer, main: Function, results: Sequence[int]) -> dict[int, int | None]:
    """Arguments and results that JAX's pytree names, or donations, tie to each other.

    Raises:
        HloError: there are none.
    """
    by_path: dict[str, list[int]] = {}
    for i, label in enumerate(main.labels):
        by_path.setdefault(keys_of(label), []).append(i)
    ties: dict[int, int | None] = {}
    for i, argument in enumerate(main.arguments):
        path = keys_of(argument.label)
        fitting = [r for r in by_path.get(path, []) if writer.tensors[results[r]].shape == argument.type.shape]
        if path and len(fitting) == 1:
            ties[i] = fitting[0]
        elif argument.aliased is not None:
            ties[i] = argument.aliased
    return ties or _ties_by_order(writer, main, results)


def _ties_by_order(writer: Writer, main: Function, results: Sequence[int]) -> dict[int, int | None]:
    """A loss, and then as many results as there are leading arguments of the same shapes: value_and_grad without names."""
    shapes = [writer.tensors[r].shape for r in results]
    gradients, leading = shapes[1:], [a.type.shape for a in main.arguments[: len(results) - 1]]
    if shapes[:1] == [()] and gradients and gradients == leading:
        return {i: i + 1 for i in range(len(gradients))}
    raise HloError(
        "no trainable arguments found: no result is named after an argument, none is donated, and results are not a loss "
        "and the gradients of the first arguments; pass parameters={argument: result of its gradient}"
    )


def keys_of(label: str) -> str:
    """The pytree keys of a name, without what they are keys of: ['a']['b'] of params['a']['b'] and of result[1]['a']['b']."""
    return "".join(re.findall(r"\[\\?'[^']*'\]|\[\"[^\"]*\"\]|\.\w+", label.replace("\\'", "'")))
