"""What both readers of XLA's text give: functions of instructions with attributes under one set of names.

=====================  ========================================================================================================
dot_general            lhs_contract, rhs_contract, lhs_batch, rhs_batch
transpose, broadcast   dims
reduce                 dims; applies: the opcode that its region consists of, or None
convolution            labels (lhs, rhs, out: "b", "f", "i", "o" and digits), stride, low, high, lhs_dilate, rhs_dilate, groups,
                       batch_groups
gather, scatter        offset_dims (update_window_dims), collapsed (inserted), index_map, index_vector_dim, slice_sizes
slice, pad             start, limit, stride; low, high, interior
concatenate, iota      dim
compare                direction
constant               value, of a splat
custom_call            target
=====================  ========================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DTYPES = {
    **{"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "i1": "bool", "pred": "bool"},
    **{"f8E4M3FN": "float8_e4m3fn", "f8e4m3fn": "float8_e4m3fn", "f8E5M2": "float8_e5m2", "f8e5m2": "float8_e5m2"},
    **{f"{letter}{bits}": f"int{bits}" for letter in ("i", "s", "si") for bits in (8, 16, 32, 64)},
    **{f"{letter}{bits}": f"uint{bits}" for letter in ("u", "ui") for bits in (8, 16, 32, 64)},
    **{"c64": "complex64", "c128": "complex128", "complex<f32>": "complex64", "complex<f64>": "complex128"},
}


class HloError(ValueError):
    """Text that is not a program, or a program that cannot become a graph."""


@dataclass(frozen=True)
class Type:
    """Shape and dtype (torch's name) of a value."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        results: names of its values, as they are referred to.
        types: of the results.
        callee: the function that a call or a fusion stands for.
        note: the name stack that JAX leaves in the metadata, "jit(step)/transpose(jvp(mlp))/dot_general".
    """

    results: tuple[str, ...]
    opcode: str
    operands: tuple[str, ...]
    types: tuple[Type, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    callee: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Argument:
    """An argument of a function: name, type, the label JAX gave it ("params['w']"), the result it is donated to."""

    name: str
    type: Type
    label: str = ""
    aliased: int | None = None


@dataclass(frozen=True)
class Function:
    """Arguments, instructions in order, names of the returned values and the labels of these."""

    name: str
    arguments: tuple[Argument, ...]
    body: tuple[Instruction, ...]
    returns: tuple[str, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Module:
    """Functions by name, and which one is the program."""

    name: str
    functions: Mapping[str, Function]
    entry: str


def dtype_of(text: str, line: str) -> str:
    """Torch's name of an element type.

    Raises:
        HloError: none that plans know.
    """
    if text not in DTYPES:
        raise HloError(f"element type {text!r} is not one that plans know, in: {short(line)}")
    return DTYPES[text]


def short(line: str) -> str:
    """A line, cut for a message."""
    line = " ".join(line.split())
    return line if len(line) <= 100 else line[:97] + "..."


def numbers(text: str) -> list[int]:
    """All whole numbers in a text, in order."""
    return [int(n) for n in re.findall(r"-?\d+", text)]


def matching(text: str, at: int) -> int:
    """Index of the bracket that closes the one at `at`; strings are skipped.

    Raises:
        HloError: it is never closed.
    """
    pairs = {"(": ")", "{": "}", "[": "]", "<": ">"}
    opening, closing, depth, i = text[at], pairs[text[at]], 0, at
    while i < len(text):
        if text[i] == '"':
            i = text.find('"', i + 1)
            if i < 0:
                break
        elif text[i] == opening:
            depth += 1
        elif text[i] == closing and not (closing == ">" and text[i - 1] == "-"):
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise HloError(f"a {opening!r} is never closed in: {short(text[at:])}")


def split_top(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are inside no bracket; empty parts are left out."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "([{<":
            depth += 1
        elif letter in ")]}" or (letter == ">" and text[i - 1] != "-"):
            depth -= 1
        elif letter == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def spatial(values: list[int] | None, count: int, default: int) -> list[int]:
    """A setting of each spatial dim; the default where it is not written."""
    return values if values else [default] * count


def splat(text: str) -> dict[str, float]:
    """The value of a constant that is one number throughout, as the attribute `value`; else nothing.

    Infinities and what is not a number are left out, as JSON has neither.
    """
    text = text.strip()
    if text in ("true", "false"):
        return {"value": float(text == "true")}
    return {"value": float(text)} if re.fullmatch(r"-?[\d.]+(?:[eE][-+]?\d+)?", text) else {}
