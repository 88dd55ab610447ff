"""Copies of a few numbers at once for the kernels of `_tropical_direct`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def block_copy(size: int) -> Any:
    """Return copy(source, i, into, j): `size` numbers in one load and one store, which LLVM does not find by itself.

    Both arrays are contiguous, of one dimension and one type, and hold the numbers: nothing is checked. numba's cache does
    not notice a change in this file, so that what the copy means must stay.
    """

    @intrinsic
    def copy(_typing: Any, source: Any, i: Any, into: Any, j: Any) -> Any:
        def build(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            number = context.get_value_type(source.dtype)
            block, align = ir.VectorType(number, size).as_pointer(), context.get_abi_sizeof(number)
            places = []
            for kind, array, index in ((source, *values[:2]), (into, *values[2:])):
                data = context.make_array(kind)(context, builder, array).data
                places.append(builder.bitcast(builder.gep(data, [index]), block))
            builder.store(builder.load(places[0], align=align), places[1], align=align)
            return context.get_dummy_value()

        return types.void(source, types.intp, into, types.intp), build

    return copy
