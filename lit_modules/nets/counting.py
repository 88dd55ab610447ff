"""What a net costs: parameters, and scalar operations of one image's forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lit_modules.ops.counting import (
    OpCount,
    conv2d_ops,
    linear_ops,
    mixed_conv2d_ops,
    tropical_conv2d_ops,
    tropical_linear_ops,
)


def count_params(net: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def count_ops(net: nn.Module, input_shape: tuple[int, ...]) -> OpCount:
    """Return the exact operation count of the layers that hold weights: convolutions, linear and tropical layers.

    Pooling, activations, the residual sum and batch norm (folded into its neighbour at inference) are left out, so
    that nets differ by what the paper exchanges.

    A net that has `scalar_ops` and names its `input_dtype` is asked at once: it counts itself by formula.

    Args:
        net: run once on zeros in evaluation mode; its state does not change.
        input_shape: shape of one sample, (C, H, W) for an image.
    Raises:
        TypeError: a module with weights of its own that is not known here.
    """
    if hasattr(net, "scalar_ops") and hasattr(net, "input_dtype"):
        asked: Any = net
        return asked.scalar_ops(torch.zeros(1, *input_shape, dtype=asked.input_dtype))
    total = OpCount()
    hooks = []

    def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        own = getattr(module, "scalar_ops", None)  # a net that counts what it executes, such as one on integers
        total = total + (own(*inputs) if own else module_ops(module, output))

    for module in net.modules():
        if _counted(module):
            hooks.append(module.register_forward_hook(add))
    training = net.training
    example = next(net.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *input_shape, dtype=example.dtype, device=example.device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return total


def _counted(module: nn.Module) -> bool:
    if hasattr(module, "scalar_ops"):
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return any(True for _ in module.parameters(recurse=False))


def module_ops(module: nn.Module, output: Tensor) -> OpCount:
    """Return the count of one layer that gave `output` (one image, or one row for a linear layer).

    Raises:
        TypeError: the layer has weights and is not known here.
    """
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        rows = output.numel() // module.out_features
        return linear_ops(module.in_features, rows * module.out_features, bias)
    if isinstance(module, nn.Conv2d):
        kernel = math.prod(module.kernel_size)
        return conv2d_ops(output.numel(), module.in_channels // module.groups, kernel, bias)
    return _tropical_ops(module, output, bias)


def _tropical_ops(module: nn.Module, output: Tensor, bias: bool) -> OpCount:
    name = type(module).__name__  # by name, so that counting an ordinary net needs no tropical code
    layer: Any = module
    if name == "TropicalLinear":
        return tropical_linear_ops(layer.in_features, output.numel(), bias)
    if name in ("TropicalConv2d", "CompoundConv2d", "ParallelConv2d"):
        outputs, channels, kernel = output.numel(), layer.in_channels // layer.groups, math.prod(layer.kernel_size)
        if name == "TropicalConv2d":
            return tropical_conv2d_ops(outputs, channels, kernel, layer.outer, bias)
        return mixed_conv2d_ops(outputs, channels, kernel, layer.mode, 1 if name == "CompoundConv2d" else 2, bias)
    raise TypeError(f"no operation count is known for {name}, which has weights of its own")
