"""From torch's operators to the kinds of the graph: names, which arguments are operands, attributes in one form.

Operands keep the order of torch's schema unless `vocabulary` says otherwise. Dims are made non-negative; what says only where
or in which layout a tensor lies is left out; so are running statistics, which nothing in the step reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.planning.vocabulary import REDUCTIONS

Named = dict[str, Any]
Translated = tuple[str, list[Tensor], Named]

SAME = """view reshape _unsafe_view squeeze unsqueeze flatten _reshape_alias unflatten view_as"""
RENAMED = {
    **dict.fromkeys(SAME.split(), "view"),
    **dict.fromkeys(("t", "transpose", "numpy_T", "swapaxes"), "permute"),
    **dict.fromkeys(("detach", "alias", "lift_fresh", "lift", "positive", "lift_fresh_copy"), "alias"),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full"), "full"),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "empty_strided"), "full"),
    **dict.fromkeys(("rand", "randn", "rand_like", "randn_like", "bernoulli", "randint", "randperm"), "random"),
    **{"fill": "full", "zero": "full", "uniform": "random", "normal": "random"},
    **{"new_empty_strided": "full", "arange": "iota", "linspace": "iota", "_to_copy": "cast", "copy": "cast"},
    **{"_softmax": "softmax", "_log_softmax": "log_softmax", "_softmax_backward_data": "softmax_backward"},
    **{"_log_softmax_backward_data": "log_softmax_backward", "native_layer_norm": "layer_norm"},
    **{"native_layer_norm_backward": "layer_norm_backward", "native_group_norm": "group_norm"},
    **{"native_group_norm_backward": "group_norm_backward", "_fused_rms_norm": "rms_norm"},
    **{"_fused_rms_norm_backward": "rms_norm_backward", "native_batch_norm": "batch_norm"},
    **{"_native_batch_norm_legit": "batch_norm", "native_batch_norm_backward": "batch_norm_backward"},
    **{"embedding_dense_backward": "embedding_backward", "nll_loss_forward": "nll_loss"},
    **{"nll_loss2d_forward": "nll_loss", "nll_loss2d_backward": "nll_loss_backward"},
    **{"max_pool2d_with_indices": "max_pool", "max_pool2d_with_indices_backward": "max_pool_backward"},
    **{"avg_pool2d": "avg_pool", "avg_pool2d_backward": "avg_pool_backward", "_adaptive_avg_pool2d": "avg_pool"},
    **{"_adaptive_avg_pool2d_backward": "avg_pool_backward", "split_with_sizes": "split", "unsafe_split": "split"},
    **{"constant_pad_nd": "pad", "_grouped_mm": "grouped_mm", "native_dropout": "dropout", "rsub": "sub"},
    **{"native_dropout_backward": "dropout_backward", "_index_put_impl": "index_put", "unsafe_chunk": "split"},
    **{"__rshift__": "bitwise_right_shift", "__lshift__": "bitwise_left_shift", "__and__": "bitwise_and"},
    **{"__or__": "bitwise_or", "__xor__": "bitwise_xor"},
}
PLACE = """dtype layout device pin_memory memory_format non_blocking implicit running_mean running_var sparse requires_grad
momentum size self_size input_sizes output_size split_size split_sizes input_dtype grad_input_mask bias_sizes generator names
stable"""
IGNORED = frozenset(PLACE.split())
WANTED = {"output_mask": "wanted", "train": "training", "kernel_size": "kernel"}


def arguments_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Named:
    """The arguments of a call by the names in the operator's schema; those left out have their defaults."""
    named = {a.name: a.default_value if a.has_default_value() else None for a in func._schema.arguments}
    named.update(zip(named, args))  # noqa: B905  (trailing defaults are left out of args)
    return named | dict(kwargs)


def base_name(func: Any) -> str:
    """The operator's name without namespace, overload and the underscore of the in-place variant."""
    name = func._schema.name.split("::")[1]
    return name.rstrip("_") if func._schema.is_mutable and name.endswith("_") else name


def translate(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> Translated:
    """Return the kind, the operands in order and the attributes of a call.

    Args:
        outputs: the call's tensors, in order, undefined ones left out.
    """
    named, name = arguments_of(func, args, kwargs), base_name(func)
    kind = RENAMED.get(name, name)
    if name == "copy":  # copy_(target, source): the target's old values are not read
        return copy(named["src"], outputs[0])
    if name == "view" and "dtype" in named:
        return "bitcast", [named["self"]], {}
    if name == "pow" and isinstance(named.get("exponent"), Tensor):
        kind = "power"
    if name == "rsub" and isinstance(named["other"], Tensor):
        named["self"], named["other"] = named["other"], named["self"]
    if isinstance(named.get("value"), Tensor) and name == "fill":
        return "expand", [named["value"]], {"dims": []}
    if kind in ("full", "iota", "random"):
        return kind, [], constant(name, named) if kind == "full" else {}
    if (special := SPECIAL.get(kind)) is not None:
        return kind, *special(named, outputs)
    return kind, operands(named), plain(named)


def operands(named: Named) -> list[Tensor]:
    """Tensor arguments in order, lists spread out, without those that are ignored."""
    found: list[Tensor] = []
    for name, value in named.items():
        if name not in IGNORED:
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
    return found


def plain(named: Named) -> Named:
    """Attributes: numbers, strings and lists of them; `dim` and `dims` non-negative."""
    first = next(iter(operands(named)), None)
    rank = first.ndim if first is not None else 0
    kept: Named = {}
    for name, value in named.items():
        if name in IGNORED or value is None or not _is_plain(value):
            continue
        if name in ("dim", "dims", "dim0", "dim1"):
            single = isinstance(value, int)
            dims = [d % rank if rank else 0 for d in ([value] if single else value)]
            kept["dim" if single else "dims"] = dims[0] if single else dims
        else:
            kept[WANTED.get(name, name)] = list(value) if isinstance(value, (list, tuple)) else value
    return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")  # JSON knows neither
    return isinstance(value, (bool, int, str))


def _permute(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x = named["self"]
    dims = named.get("dims")
    if dims is None:
        dims = list(range(x.ndim))
        first, second = (named.get("dim0", 0), named.get("dim1", 1)) if x.ndim > 1 else (0, 0)
        dims[first], dims[second] = dims[second], dims[first]
    return [x], {"dims": [d % x.ndim for d in dims]}


def _expand(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x, shift = named["self"], outputs[0].ndim - named["self"].ndim
    return [x], {"dims": [d + shift for d in range(x.ndim)]}


def _slice(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x, dim = named["self"], named["dim"] % named["self"].ndim
    start, end, step = slice(named["start"], named["end"], named["step"]).indices(x.shape[dim])
    return [x], {"dim": dim, "start": start, "end": end, "step": step}


def _select(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x, dim = named["self"], named["dim"] % named["self"].ndim
    return [x], {"dim": dim, "index": named["index"] % x.shape[dim]}


def _field(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    """slice_backward and select_backward: where in the output the gradient lies."""
    whole, dim = outputs[0], named["dim"] % outputs[0].ndim
    if "index" in named:
        return [named["grad_output"]], {"dim": dim, "index": named["index"] % whole.shape[dim]}
    start, end, step = slice(named["start"], named["end"], named["step"]).indices(whole.shape[dim])
    return [named["grad_output"]], {"dim": dim, "start": start, "end": end, "step": step}


def _reduction(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x, dims = named["self"], named.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
    return [x], {"dims": sorted(d % x.ndim if x.ndim else 0 for d in dims), "keepdim": bool(named.get("keepdim"))}


def _cat(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    whole = outputs[0]
    parts = [x for x in named["tensors"] if x.ndim == whole.ndim or x.ndim == whole.ndim - 1]  # not legacy empty ones
    return parts, {"dim": named["dim"] % whole.ndim}


def _pad(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x, pad = named["self"], named["pad"]
    low, high = [0] * x.ndim, [0] * x.ndim
    for i in range(len(pad) // 2):
        low[x.ndim - 1 - i], high[x.ndim - 1 - i] = pad[2 * i], pad[2 * i + 1]
    return [x], {"low": low, "high": high}


def _normalized(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    """layer_norm and rms_norm and their gradients."""
    attributes: Named = {"normalized": len(named["normalized_shape"])}
    attributes["affine"] = [isinstance(named.get(name), Tensor) for name in ("weight", "bias") if name in named]
    if "output_mask" in named:
        attributes["wanted"] = [bool(asked) for asked in named["output_mask"]]
    return operands(named), attributes


def _batch_norm(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    training = bool(named.get("training", named.get("train")))
    tensors = operands(named)
    if not training:  # then the running statistics are what it normalises with
        tensors += [t for t in (named["running_mean"], named["running_var"]) if isinstance(t, Tensor)]
    attributes: Named = {"training": training, "affine": [isinstance(named.get(n), Tensor) for n in ("weight", "bias")]}
    if "output_mask" in named:
        attributes["affine"] = [isinstance(named["weight"], Tensor)]
        attributes["wanted"] = [bool(asked) for asked in named["output_mask"]]
    return tensors, attributes


def _index(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x, indices = named["self"], list(named["indices"])
    tensors = [x, *(i for i in indices if i is not None)]
    attributes: Named = {"dims": [d for d, i in enumerate(indices) if i is not None]}
    if "values" in named:
        return [*tensors, named["values"]], {**attributes, "accumulate": bool(named["accumulate"])}
    return tensors, attributes


def _pool(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    attributes = plain(named)
    if "kernel" not in attributes:  # adaptive: the window is the ratio of the sizes
        x = named["self"]
        small = named.get("grad_output", outputs[0])
        attributes["kernel"] = [-(-a // b) for a, b in zip(x.shape[2:], small.shape[2:], strict=True)]
    return operands(named), attributes


def _split(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    x = named["self"]
    return [x], {"dim": named["dim"] % x.ndim}


def _nothing(named: Named, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Named]:
    return operands(named)[:1], {}


SPECIAL: dict[str, Callable[[Named, Sequence[Tensor]], tuple[list[Tensor], Named]]] = {
    **dict.fromkeys(("view", "alias", "cast", "clone"), _nothing),
    **dict.fromkeys(("permute",), _permute),
    **dict.fromkeys(("slice_backward", "select_backward"), _field),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"), _normalized),
    **dict.fromkeys(("batch_norm", "batch_norm_backward"), _batch_norm),
    **dict.fromkeys(("index", "index_put"), _index),
    **dict.fromkeys(("max_pool", "avg_pool", "max_pool_backward", "avg_pool_backward"), _pool),
    **dict.fromkeys(("split", "unbind", "chunk"), _split),
    **{"expand": _expand, "slice": _slice, "select": _select, "pad": _pad},
}


def constant(name: str, named: Named) -> Named:
    """The value that a tensor is filled with, where it has one."""
    if "zero" in name or "one" in name:
        return {"value": int("one" in name)}
    value = next((named[key] for key in ("fill_value", "value", "s") if key in named), None)
    return {"value": value} if value is not None and _is_plain(value) else {}


def copy(source: Tensor, target: Tensor) -> Translated:
    """copy_ converts or broadcasts."""
    if source.shape == target.shape:
        return "clone" if source.dtype == target.dtype else "cast", [source], {}
    return "expand", [source], {"dims": [d + target.ndim - source.ndim for d in range(source.ndim)]}


def addmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """bias + x y in two operations: as one, a product of partial sums would need a bias of partial sums too."""
    product = torch.mm(x, y) if x.ndim == 2 else torch.bmm(x, y)
    product = product if alpha == 1 else product * alpha
    return product + (bias if beta == 1 else bias * beta)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Any:
    """A convolution without bias, and then the bias, for the same reason."""
    if bias is None:
        return NotImplemented
    out = torch.ops.aten.convolution.default(x, weight, None, *rest)
    return out + bias.view(-1, *[1] * (out.ndim - 2))


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any) -> Any:
    """The gradients of both; that of the bias is a sum."""
    *settings, (wants_x, wants_weight, wants_bias) = rest
    if not wants_bias:
        return NotImplemented
    mask = [wants_x, wants_weight, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward.default(grad, x, weight, None, *settings, mask)
    return dx, dweight, grad.sum([0, *range(2, grad.ndim)])


DECOMPOSED: dict[Any, Callable[..., Any]] = {  # these return NotImplemented where there is nothing to take apart
    torch.ops.aten.addmm.default: addmm,
    torch.ops.aten.baddbmm.default: addmm,
    torch.ops.aten.convolution.default: convolution,
    torch.ops.aten.convolution_backward.default: convolution_backward,
}
