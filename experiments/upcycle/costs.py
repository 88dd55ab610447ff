"""What named sizes cost, as rows; nothing is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.errors import UserError
from experiments.schema import nearest
from lit_modules.nets.moe import Experts
from lit_modules.nets.pricing import SIZES, Price, price


def priced(
    size: str, expansion: int | None, granularity: int, top_k: int, order: Any, context: int, precision: Any
) -> Iterator[tuple[str, Price]]:
    """Yield (name, price) of a named size or of all, dense and, where an expansion is given, as a mixture.

    Raises:
        UserError: an unknown size, or what cannot be built.
    """
    if size != "all" and size not in SIZES:
        raise UserError(f"unknown size '{size}'{nearest(size, [*SIZES, 'all'])}")
    for name in SIZES if size == "all" else [size]:
        try:
            yield name, price(SIZES[name], context, precision)
            if expansion is not None:
                spec = Experts(expansion, granularity, top_k, order)
                label = f"{name} E{expansion}G{granularity}T{top_k}"
                yield label, price(dataclasses.replace(SIZES[name], experts=spec), context, precision)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
