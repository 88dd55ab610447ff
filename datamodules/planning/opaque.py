"""Operations of torch that stay one operation in the graph, forward and backward, whatever torch would make of them.

Legend: B batch, H heads, S queries, T keys, k head width, D width.

Each is a function of shapes alone: it returns empty tensors and writes to the recorder what it would read and make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from datamodules.planning.recorder import Recorder, TraceError


@contextmanager
def opaque(recorder: Recorder) -> Iterator[None]:
    """Inside, attention and RMSNorm are one operation each, called from Python or from torch's own modules."""
    original = F.scaled_dot_product_attention
    instead: dict[Any, Callable[..., Any]] = {original: attention_of(recorder), F.rms_norm: rms_norm_of(recorder)}

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return instead.get(func, func)(*args, **(kwargs or {}))

    # F.multi_head_attention_forward reaches the mode as a whole, and then calls what this name holds
    F.scaled_dot_product_attention = instead[original]
    try:
        with Mode():
            yield
    finally:
        F.scaled_dot_product_attention = original


def attention_of(recorder: Recorder) -> Callable[..., Tensor]:
    """Return torch's scaled_dot_product_attention as one recorded operation."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise TraceError(f"attention of shapes that do not fit (query, key, value): {shapes}")
        return _Attention.apply(query, key, value, attn_mask, recorder, is_causal, scale)

    return attention


def rms_norm_of(recorder: Recorder) -> Callable[..., Tensor]:
    """Return torch's rms_norm as one recorded operation."""

    def rms_norm(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if tuple(input.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
            raise TraceError(f"rms_norm over {tuple(normalized_shape)} of a tensor of shape {tuple(input.shape)}")
        return _RmsNorm.apply(input, weight, recorder, len(normalized_shape))

    return rms_norm


class _Attention(torch.autograd.Function):
    """Attention as shapes alone: what it reads and what it makes, in one operation each way."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        """Return an empty tensor of the output's shape and record `sdpa`."""
        recorder, causal, scale = rest
        with recorder.paused():
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        attributes = {"causal": bool(causal), "mask": mask is not None, "scale": scale or q.shape[-1] ** -0.5}
        recorder.emit("sdpa", [q, k, v] if mask is None else [q, k, v, mask], [out, lse], attributes)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.recorder, ctx.attributes = recorder, attributes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return empty gradients and record `sdpa_backward`; the mask has one only if it is asked for."""
        q, k, v, out, lse, mask = ctx.saved_tensors
        wanted = [True, True, True, ctx.needs_input_grad[3]]
        with ctx.recorder.paused():
            made = [torch.empty_like(t) if w else None for t, w in zip((q, k, v, mask), wanted, strict=True)]
        inputs = [grad, q, k, v, out, lse] + ([] if mask is None else [mask])
        attributes = {**ctx.attributes, "wanted": wanted}
        ctx.recorder.emit("sdpa_backward", inputs, [t for t in made if t is not None], attributes)
        return (*made, None, None, None)


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dims, as shapes alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, recorder: Recorder, dims: int) -> Tensor:
        """Return an empty tensor of x's shape and record `rms_norm`."""
        with recorder.paused():
            out = torch.empty_like(x)
            rstd = x.new_empty(*x.shape[:-dims], *[1] * dims, dtype=torch.promote_types(x.dtype, torch.float32))
        attributes = {"normalized": dims, "affine": [weight is not None]}
        recorder.emit("rms_norm", [x] if weight is None else [x, weight], [out, rstd], attributes)
        ctx.save_for_backward(x, rstd, weight)
        ctx.recorder, ctx.attributes = recorder, attributes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return empty gradients and record `rms_norm_backward`."""
        x, rstd, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        with ctx.recorder.paused():
            made = [torch.empty_like(t) if w else None for t, w in zip((x, weight), wanted, strict=True)]
        inputs = [grad, x, rstd] + ([] if weight is None else [weight])
        attributes = {**ctx.attributes, "wanted": wanted}
        ctx.recorder.emit("rms_norm_backward", inputs, [t for t in made if t is not None], attributes)
        return (*made, None, None)
