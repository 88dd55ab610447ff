"""Reads XLA's own HLO text (`lowered.compiler_ir("hlo").as_hlo_text()`, dumps of XLA), with or without % and operand types."""

from __future__ import annotations

import re
from typing import Any

from datamodules.planning.hlo_module import (
    Argument,
    Function,
    HloError,
    Instruction,
    Module,
    Type,
    dtype_of,
    matching,
    numbers,
    short,
    spatial,
    splat,
    split_top,
)

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{\s*$")
INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*)$")
ELEMENT = re.compile(r"^([a-z]\w*)\[([^\]]*)\]")
OPCODES = {"dot": "dot_general", "broadcast": "broadcast_in_dim", "custom-call": "custom_call", "copy": "copy"}


def read_hlo(text: str) -> Module:
    """Parse a module.

    Raises:
        HloError: no ENTRY computation, a line that is no instruction, dynamic shapes; with the line.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith(("HloModule", "//", "#")):
            continue
        if head := COMPUTATION.match(line):
            current = head.group(2)
            bodies[current] = []
            entry = current if head.group(1) else entry
        elif line == "}":
            current = ""
        elif current:
            bodies[current].append(line)
    if not entry:
        raise HloError("no ENTRY computation in this text: is it HLO?")
    applied = {name: _applied(lines) for name, lines in bodies.items()}
    functions = {name: _function(name, lines, applied) for name, lines in bodies.items()}
    title = re.search(r"^HloModule ([\w.\-]+)", text, re.M)
    return Module(title.group(1) if title else entry, functions, entry)


def _applied(lines: list[str]) -> str | None:
    """The opcode of a computation of two scalars, as reductions apply them."""
    inner = [
        m.group(1) for line in lines if (m := re.search(r" = \S+ ([\w\-]+)\(", line)) and m.group(1) != "parameter"
    ]
    return inner[0] if len(inner) == 1 else None


def _function(name: str, lines: list[str], applied: dict[str, str | None]) -> Function:
    parsed = [(bool(root), _instruction(line, applied)) for line in lines for root in [line.startswith("ROOT ")]]
    given = [i for _, i in parsed if i.opcode == "parameter"]
    given.sort(key=lambda i: i.attributes["index"])
    arguments = tuple(Argument(i.results[0], i.types[0], i.note) for i in given)
    body = tuple(i for _, i in parsed if i.opcode != "parameter")
    root = next((i for marked, i in parsed if marked), parsed[-1][1] if parsed else None)
    if root is None:
        raise HloError(f"computation {name} is empty")
    return Function(name, arguments, body, root.results)


def _instruction(line: str, applied: dict[str, str | None]) -> Instruction:
    match = INSTRUCTION.match(line)
    if match is None:
        raise HloError(f"not an instruction: {short(line)}")
    name, rest = match.group(2), match.group(3)
    types, rest = _type(rest, line)
    opened = rest.find("(")
    if opened < 0:
        raise HloError(f"not an instruction: {short(line)}")
    opcode = rest[:opened].strip()
    closed = matching(rest, opened)
    inside, after = rest[opened + 1 : closed], rest[closed + 1 :]
    fields = _fields(after)
    operands = () if opcode in ("constant", "parameter", "iota") else tuple(_operand(o) for o in split_top(inside))
    callee = fields.get("calls") or (fields.get("to_apply") if opcode == "call" else None)
    note = re.search(r'op_name="((?:[^"\\]|\\.)*)"', after)
    attributes = _attributes(opcode, inside, fields, len(types[0].shape), applied)
    named = OPCODES.get(opcode, opcode.replace("-", "_"))
    results = (name,) if len(types) == 1 else tuple(f"{name}#{i}" for i in range(len(types)))
    label = note.group(1).replace("\\'", "'") if note else ""
    return Instruction(results, named, operands, types, attributes, callee and callee.lstrip("%"), label)


def _type(text: str, line: str) -> tuple[tuple[Type, ...], str]:
    """The result's types and what follows."""
    if text.startswith("("):
        end = matching(text, 0)
        return tuple(_one(part, line) for part in split_top(text[1:end])), text[end + 1 :].strip()
    kind, _, rest = text.partition(" ")
    return (_one(kind, line),), rest.strip()


def _one(text: str, line: str) -> Type:
    text = re.sub(r"/\*.*?\*/", "", text).strip()
    match = ELEMENT.match(text)
    if match is None:
        raise HloError(f"{short(text)!r} is not an array type, in: {short(line)}")
    if "<=" in match.group(2) or "?" in match.group(2):
        raise HloError(f"dynamic shapes cannot be planned: {match.group(0)} in: {short(line)}")
    return Type(tuple(numbers(match.group(2))), dtype_of(match.group(1), line))


def _operand(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text).split()[-1].lstrip("%")


def _fields(text: str) -> dict[str, str]:
    found = {}
    for part in split_top(text.lstrip(", ")):
        key, equals, value = part.partition("=")
        if equals:
            found[key.strip()] = value.strip()
    return found


def _attributes(
    opcode: str, inside: str, fields: dict[str, str], rank: int, applied: dict[str, str | None]
) -> dict[str, Any]:
    def listed(key: str) -> list[int]:
        return numbers(fields.get(key, ""))

    applies = applied.get(fields.get("to_apply", "").lstrip("%"))
    match opcode:
        case "parameter":
            return {"index": int(inside)}
        case "dot":
            sides = [
                (f"{s}_{n}", f"{s}_{k}_dims") for n, k in (("contract", "contracting"), ("batch", "batch")) for s in LR
            ]
            return {key: listed(name) for key, name in sides}
        case "transpose" | "broadcast":
            return {"dims": listed("dimensions")}
        case "reduce":
            return {"dims": listed("dimensions"), "applies": applies}
        case "compare":
            return {"direction": fields.get("direction", "EQ")}
        case "convolution":
            return _convolution(fields)
        case "gather" | "scatter":
            return _indexing(fields, applies)
        case "slice":
            rows = [numbers(part) for part in fields.get("slice", "").strip("{}").split(",")]
            ends = [r[2] if len(r) > 2 else 1 for r in rows]
            return {"start": [r[0] for r in rows], "limit": [r[1] for r in rows], "stride": ends}
        case "pad":
            rows = [numbers(part.replace("_", " ")) for part in fields.get("padding", "").split("x")]
            inner = [r[2] if len(r) > 2 else 0 for r in rows]
            return {"low": [r[0] for r in rows], "high": [r[1] for r in rows], "interior": inner}
        case "concatenate":
            return {"dim": (listed("dimensions") or [0])[0]}
        case "iota":
            return {"dim": (listed("iota_dimension") or [0])[0]}
        case "constant":
            return splat(inside)
        case "custom-call":
            return {"target": fields.get("custom_call_target", "").strip('"')}
        case "get-tuple-element":
            return {"index": int(fields.get("index", "0"))}
    return {}


LR = ("lhs", "rhs")


def _indexing(fields: dict[str, str], applies: str | None) -> dict[str, Any]:
    def first(*keys: str) -> list[int]:
        return next((numbers(fields[key]) for key in keys if key in fields), [])

    return {
        "offset_dims": first("offset_dims", "update_window_dims"),
        "collapsed": first("collapsed_slice_dims", "inserted_window_dims"),
        "index_map": first("start_index_map", "scatter_dims_to_operand_dims"),
        "index_vector_dim": (first("index_vector_dim") or [0])[0],
        "slice_sizes": first("slice_sizes"),
        "applies": applies,
    }


def _convolution(fields: dict[str, str]) -> dict[str, Any]:
    labels = re.split(r"_|->", fields.get("dim_labels", ""))
    if len(labels) != 3:
        raise HloError(f"a convolution with dim_labels {fields.get('dim_labels')!r}")
    count = len(labels[0]) - 2
    window = dict(re.findall(r"(\w+)=([\w\-]+)", fields.get("window", "")))
    pad = [numbers(part.replace("_", " ")) for part in window.get("pad", "").split("x") if part]
    return {
        "labels": labels,
        "stride": spatial(numbers(window.get("stride", "").replace("x", " ")), count, 1),
        "low": [row[0] for row in pad] or [0] * count,
        "high": [row[1] for row in pad] or [0] * count,
        "lhs_dilate": spatial(numbers(window.get("lhs_dilate", "").replace("x", " ")), count, 1),
        "rhs_dilate": spatial(numbers(window.get("rhs_dilate", "").replace("x", " ")), count, 1),
        "groups": int(fields.get("feature_group_count", "1")),
        "batch_groups": int(fields.get("batch_group_count", "1")),
    }
