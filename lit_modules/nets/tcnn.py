"""Tropical nets: net1 to net6 of the paper, and the follow-up's LeNet-5 and ResNet-18 families."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from lit_modules.nets.layers import make_layer
from lit_modules.nets.skeletons import lenet5, resnet18, two_layer_net
from lit_modules.ops.tropical import PaddingValue, Ties


class TwoLayerTropicalCNN(nn.Module):
    """net1 to net6 of the published code: two 3x3 layers of stride 2, at least one tropical, and a linear layer.

    net1 MinP-S + MaxP-S, net2 MinP-Max + MaxP-Min, net3 MinP-S + Conv2d, net4 MinP-Min + MaxP-Max, net5 MinP-Min +
    Conv2d, net6 MinP-Max + Conv2d. No activation anywhere, as published.

    Args:
        layer1, layer2: kinds, see `lit_modules.nets.layers.LAYER_KINDS`, or "Conv2d" (with bias, as published).
        width: channels of both layers (published: 4).
        bias: of the tropical layers (published: none).
        init: law of the tropical weights (published: "uniform01").
        padding_value: what padded pixels hold (published: 0).
        ties: who gets the gradient among equals (published: "first").
        batch_norm: BatchNorm after both layers.
        in_channels, image_size, num_classes: the data's.
    Raises:
        ValueError: impossible sizes, an unknown kind, law, padding value or tie rule.
    Source: the co-author's code of arXiv 2103.02096.
    """

    def __init__(
        self,
        layer1: str = "MinP-S",
        layer2: str = "MaxP-S",
        width: int = 4,
        bias: bool = False,
        init: str = "uniform01",
        padding_value: PaddingValue = 0.0,
        ties: Ties = "first",
        batch_norm: bool = False,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "init": init, "padding_value": padding_value, "ties": ties}
        first, second = (partial(make_layer, kind, **options) for kind in (layer1, layer2))
        shape: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.body = two_layer_net(first, second, width=width, batch_norm=batch_norm, **shape)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.body(x_BCHW)


class TropicalLeNet5(nn.Module):
    """LeNet-5 with tropical layers: no activation behind them, ReLU in the fully connected part.

    tcnn1 to tcnn3 mirror net1 to net3; ctcnn are compound, ptcnn parallel, the constant ones have no mixing weights.

    Args:
        layer1, layer2: kinds, see `lit_modules.nets.layers.LAYER_KINDS`, or "Conv2d".
        bias: of the tropical layers (the follow-up: yes).
        init: law of the tropical weights (the follow-up: "fan_in").
        padding_value: what padded pixels hold (the follow-up: 0).
        ties: who gets the gradient among equals (the follow-up: "split").
        in_channels, image_size, num_classes: the data's; images of at least 12 pixels a side.
    Raises:
        ValueError: impossible sizes, an unknown kind, law, padding value or tie rule.
    Source: OpenTCNN's experiments (arXiv 2504.06881); ties are shared there, which "split" is.
    """

    def __init__(
        self,
        layer1: str = "MinP-S",
        layer2: str = "MaxP-S",
        bias: bool = True,
        init: str = "fan_in",
        padding_value: PaddingValue = 0.0,
        ties: Ties = "split",
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "init": init, "padding_value": padding_value, "ties": ties}
        first, second = (partial(make_layer, kind, **options) for kind in (layer1, layer2))
        shape: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.body = lenet5(first, second, conv_act="none", head_act="relu", **shape)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.body(x_BCHW)


class TropicalResNet18(nn.Module):
    """ResNet-18 with tropical 3x3 layers: "type1" has the second of each block tropical, "type2" both. No ReLU in blocks.

    Args:
        kind: of the tropical layers, see `lit_modules.nets.layers.LAYER_KINDS`.
        block: "type1" or "type2".
        in_channels, image_size, num_classes: the data's; images of at least 17 pixels a side.
        width: channels of the first stage, doubled by each of the others (published: 64).
    Raises:
        ValueError: impossible sizes, an unknown kind or block.
    Source: OpenTCNN's experiments (arXiv 2504.06881); the 1x1 shortcuts stay ordinary there too.
    """

    def __init__(
        self,
        kind: str = "Compound-2p",
        block: str = "type1",
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        width: int = 64,
    ) -> None:
        super().__init__()
        if block not in ("type1", "type2"):
            raise ValueError(f"block must be 'type1' or 'type2', got {block!r}")
        tropical = partial(make_layer, kind, init="fan_in", ties="split", conv_bias=False)
        first = tropical if block == "type2" else partial(nn.Conv2d, bias=False)
        shape: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.body = resnet18(first, tropical, relu=False, width=width, **shape)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.body(x_BCHW)
