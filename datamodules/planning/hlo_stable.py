"""Reads StableHLO as JAX prints it (`jax.jit(f).lower(...).as_text()`), pretty or generic form, with or without locations."""

from __future__ import annotations

import re
from collections.abc import Iterator
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

HEAD = re.compile(r"func\.func\s+(?:public |private |nested )?@([\w.$-]+)\s*\(")
RESULT = re.compile(r'^(%[\w#]+)(?::(\d+))?\s*=\s*"?([\w.]+)"?\s*(.*)$', re.S)
VALUE = re.compile(r"%[\w]+(?:#\d+)?")
LOCATION = re.compile(r'^#loc(\d*)\s*=\s*loc\("((?:[^"\\]|\\.)*)"(?:\(#loc(\d+)\))?', re.M)


def read_stablehlo(text: str) -> Module:
    """Parse a module.

    Raises:
        HloError: no @main, unbalanced brackets, dynamic shapes, unknown element types; with the line.
    """
    notes = _notes(text)
    name = re.search(r"module @([\w.$-]+)", text)
    functions = {f.name: f for f in _functions(text, notes)}
    if not functions:
        raise HloError("no func.func in this text: is it StableHLO?")
    entry = "main" if "main" in functions else next(iter(functions))
    return Module(name.group(1) if name else entry, functions, entry)


def _notes(text: str) -> dict[str, str]:
    """Name stacks by the number of their location; one that only says that it is a call has that of where it is called."""
    found = {number: (name, inside) for number, name, inside in LOCATION.findall(text)}
    return {
        number: found[inside][0] if name.endswith(":") and inside in found else name
        for number, (name, inside) in found.items()
    }


def _functions(text: str, notes: dict[str, str]) -> Iterator[Function]:
    for head in HEAD.finditer(text):
        opened = head.end() - 1
        closed = matching(text, opened)
        arguments = [_argument(part, notes) for part in split_top(text[opened + 1 : closed])]
        body_at = _body_start(text, closed)
        results = text[closed + 1 : body_at]
        body = text[body_at + 1 : matching(text, body_at)]
        instructions, returned = _body(body, notes)
        labels = _result_labels(results)
        yield Function(head.group(1), tuple(arguments), tuple(instructions), returned, labels)


def _body_start(text: str, at: int) -> int:
    """The brace that opens the body: the first one after the results that is not the dictionary of one of them."""
    i = at + 1
    while i < len(text) and text[i] != "{":
        i = matching(text, i) + 1 if text[i] in "(<" else i + 1
    before = text[at:i].rstrip()
    return _body_start(text, matching(text, i)) if before.endswith("attributes") else i


def _argument(text: str, notes: dict[str, str]) -> Argument:
    name, _, rest = text.partition(":")
    aliased = re.search(r"tf\.aliasing_output\s*=\s*(\d+)", rest)
    label = re.search(r'loc\("((?:[^"\\]|\\.)*)"', rest)
    named = label.group(1) if label else notes.get(_location(rest), "")
    return Argument(name.strip(), _types(rest, text)[0], named, int(aliased.group(1)) if aliased else None)


def _location(text: str) -> str:
    found = re.search(r"loc\(#loc(\d*)\)", text)
    return found.group(1) if found else "none"


def _result_labels(text: str) -> tuple[str, ...]:
    arrow = text.find("->")
    listed = text[arrow + 2 :].strip() if arrow >= 0 else ""
    inner = listed[1 : matching(listed, 0)] if listed.startswith("(") else listed
    found = [re.search(r'jax\.result_info\s*=\s*"((?:[^"\\]|\\.)*)"', part) for part in split_top(inner)]
    return tuple(label.group(1) if label else "" for label in found)


def _body(text: str, notes: dict[str, str]) -> tuple[list[Instruction], tuple[str, ...]]:
    instructions: list[Instruction] = []
    returned: tuple[str, ...] = ()
    for statement in statements(text):
        if re.match(r'"?(func\.)?return"?\b|"?stablehlo\.return"?\b', statement):
            returned = tuple(VALUE.findall(statement.split(" : ")[0]))
        elif statement.startswith("%"):
            instructions.append(_instruction(statement, notes))
        elif not statement.startswith(("^", "//", "#")):
            raise HloError(f"not an instruction: {short(statement)}")
    return instructions, returned


def statements(text: str) -> Iterator[str]:
    """Instructions of a body, each with its regions, whatever lines they spread over."""
    lines = [line.strip() for line in text.splitlines()]
    held, depth = "", 0
    for line in lines:
        starts = depth == 0 and re.match(r'%|"?(func\.|stablehlo\.)?return\b|\^', line)
        if starts and held:
            yield held
            held = ""
        held = f"{held}\n{line}" if held else line
        bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
        depth += sum(bare.count(b) for b in "({[") - sum(bare.count(b) for b in ")}]")
    if held.strip():
        yield held.strip()


def _instruction(statement: str, notes: dict[str, str]) -> Instruction:
    match = RESULT.match(statement)
    if match is None:
        raise HloError(f"not an instruction: {short(statement)}")
    name, count, opcode, rest = match.groups()
    note = notes.get(_location(rest[-40:]), "")
    inline = re.search(r'loc\("((?:[^"\\]|\\.)*)"', rest)
    rest, region = _without_regions(re.sub(r"\s*loc\([^()]*(?:\([^()]*\))*[^()]*\)\s*$", "", rest.rstrip()))
    head, signature = _split_signature(rest, statement)
    types = _types(signature.split("->")[-1] if "->" in signature else signature, statement)
    results = (name,) if count is None else tuple(f"{name}#{i}" for i in range(int(count)))
    opcode = opcode.rpartition(".")[2]
    if "->" not in signature:  # elementwise: one type for all; select names its condition's first
        types = types[-1:] * len(results) if opcode == "select" or len(types) < len(results) else types[: len(results)]
    callee = re.match(r"@([\w.$-]+)", head) if opcode in ("call", "composite") else None
    operands = VALUE.findall(re.sub(r"^@[\w.$-]+", "", head))
    attributes = _attributes(opcode, head, region)
    found = note or (inline.group(1) if inline else "")
    return Instruction(results, opcode, tuple(operands), tuple(types), attributes, callee and callee.group(1), found)


def _without_regions(text: str) -> tuple[str, str]:
    """Take out ({...}) and what follows `reducer`; returns the rest and the first region's text."""
    region = ""
    while (at := text.find("({")) >= 0:
        end = matching(text, at)
        region, text = region or text[at:end], text[:at] + text[end + 1 :]
    at = text.find("reducer(")
    return (text, region) if at < 0 else (text[:at].rstrip(), text[at:])


def _split_signature(text: str, line: str) -> tuple[str, str]:
    """What is before the types, and the types: after the last colon outside of brackets."""
    depth, found = 0, -1
    for i, letter in enumerate(text):
        if letter in "({[<":
            depth += 1
        elif letter in ")}]" or (letter == ">" and text[i - 1] != "-"):
            depth -= 1
        elif letter == ":" and depth == 0:
            found = i
    if found < 0:
        raise HloError(f"no types in: {short(line)}")
    return text[:found].strip(), text[found + 1 :].strip()


def _types(text: str, line: str) -> list[Type]:
    found, at = [], 0
    while (at := text.find("tensor<", at)) >= 0:
        end = matching(text, at + 6)
        inner = split_top(text[at + 7 : end])[0]
        if "?" in inner:
            raise HloError(f"dynamic shapes cannot be planned: tensor<{inner}> in: {short(line)}")
        *dims, element = re.findall(r"\d+(?=x)|(?<=x)[^\dx].*$|^[^\d].*$", inner) or [inner]
        found.append(Type(tuple(int(d) for d in dims), dtype_of(element, line)))
        at = end
    if not found:
        raise HloError(f"no tensor type in: {short(line)}")
    return found


def _field(text: str, name: str) -> list[int]:
    """Numbers of `name = [..]`, `name = array<i64: ..>` or `name = dense<..>`."""
    match = re.search(rf"\b{name}\s*=\s*(?:array<i64(?::\s*|>)|dense<|\[)?([-\d,\s\[\]x]*)", text)
    return numbers(match.group(1)) if match else []


def _attributes(opcode: str, head: str, region: str) -> dict[str, Any]:
    match opcode:
        case "dot_general":
            return _dot(head)
        case "transpose" | "broadcast_in_dim":
            return {"dims": _field(head, "dims") or _field(head, "permutation") or _field(head, "broadcast_dimensions")}
        case "reduce":
            applies = re.search(r"applies stablehlo\.(\w+)", head) or re.search(r"stablehlo\.(?!return)(\w+)", region)
            return {"dims": _field(head, "dimensions"), "applies": applies.group(1) if applies else None}
        case "compare":
            direction = re.search(r"\b(EQ|NE|LT|LE|GT|GE)\b", head)
            return {"direction": direction.group(1) if direction else "EQ"}
        case "convolution":
            return _convolution(head)
        case "gather" | "scatter":
            return _indexing(head, region)
        case "slice":
            return _slice(head)
        case "pad":
            return {key: _field(head, f"(?:edge_padding_)?{key}(?:_padding)?") for key in ("low", "high", "interior")}
        case "concatenate" | "iota":
            dim = _field(head, "dim") or _field(head, "dimension") or _field(head, "iota_dimension")
            return {"dim": dim[0] if dim else 0}
        case "constant":
            value = re.search(r"dense<([^>]*)>", head)
            return splat(value.group(1)) if value else {}
        case "custom_call":
            target = re.search(r"@([\w.$-]+)", head) or re.search(r'call_target_name\s*=\s*"([^"]+)"', head)
            return {"target": target.group(1) if target else ""}
    return {}


def _pair(text: str, name: str) -> tuple[list[int], list[int]]:
    match = re.search(rf"\b{name}\s*=\s*\[([^\]]*)\]\s*x\s*\[([^\]]*)\]", text)
    return (numbers(match.group(1)), numbers(match.group(2))) if match else ([], [])


def _dot(head: str) -> dict[str, Any]:
    contract, batch = _pair(head, "contracting_dims"), _pair(head, "batching_dims")
    if contract == ([], []):  # the generic form
        contract = (_field(head, "lhs_contracting_dimensions"), _field(head, "rhs_contracting_dimensions"))
        batch = (_field(head, "lhs_batching_dimensions"), _field(head, "rhs_batching_dimensions"))
    return dict(zip(("lhs_contract", "rhs_contract", "lhs_batch", "rhs_batch"), (*contract, *batch), strict=True))


def _convolution(head: str) -> dict[str, Any]:
    labels = re.search(r"\[([^\]]*)\]\s*x\s*\[([^\]]*)\]\s*->\s*\[([^\]]*)\]", head)
    if labels is None:
        raise HloError(f"a convolution without dim_numbers: {short(head)}")
    names = [[part.strip() for part in group.split(",")] for group in labels.groups()]
    count = len(names[0]) - 2
    pad = re.search(r"\bpad(?:ding)?\s*=\s*(?:dense<)?\[(\[.*?\])\]", head)
    flat = numbers(pad.group(1)) if pad else [0] * 2 * count
    groups = [re.search(rf"{key}_group_count\s*=\s*(\d+)", head) for key in ("feature", "batch")]
    dilate = [_field(head, f"{side}_dilat(?:e|ion)") for side in ("lhs", "rhs")]
    return {
        "labels": ["".join(n) for n in names],
        "stride": spatial(_field(head, r"(?:window_)?strides?"), count, 1),
        "low": flat[::2],
        "high": flat[1::2],
        "lhs_dilate": spatial(dilate[0], count, 1),
        "rhs_dilate": spatial(dilate[1], count, 1),
        "groups": int(groups[0].group(1)) if groups[0] else 1,
        "batch_groups": int(groups[1].group(1)) if groups[1] else 1,
    }


def _indexing(head: str, region: str) -> dict[str, Any]:
    applies = re.search(r"stablehlo\.(?!return)(\w+)", region)
    vector = _field(head, "index_vector_dim")
    return {
        "offset_dims": _field(head, "offset_dims") or _field(head, "update_window_dims"),
        "collapsed": _field(head, "collapsed_slice_dims") or _field(head, "inserted_window_dims"),
        "index_map": _field(head, "start_index_map") or _field(head, "scatter_dims_to_operand_dims"),
        "index_vector_dim": vector[0] if vector else 0,
        "slice_sizes": _field(head, "slice_sizes"),
        "applies": applies.group(1) if applies else None,
    }


def _slice(head: str) -> dict[str, Any]:
    spans = re.search(r"%[\w#]+\s*\[([^\]]*)\]", head)
    if spans is None:
        return {key: _field(head, name) for key, name in zip(("start", "limit", "stride"), SLICE, strict=True)}
    rows = [numbers(part) for part in spans.group(1).split(",")]
    return {
        "start": [r[0] for r in rows],
        "limit": [r[1] for r in rows],
        "stride": [r[2] if len(r) > 2 else 1 for r in rows],
    }


SLICE = ("start_indices", "limit_indices", "strides")
