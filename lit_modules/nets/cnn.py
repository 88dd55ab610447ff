"""Ordinary convolutional nets of the tropical nets' shapes: the baselines. Nothing here reaches tropical code."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from lit_modules.nets.skeletons import lenet5, resnet18, two_layer_net


class TwoLayerCNN(nn.Module):
    """net0 of the published code: two 3x3 convolutions of stride 2 and a linear layer.

    With activation "none", as published, it is a linear classifier; "relu" is the fair baseline.

    Args:
        activation: "none" or "relu", after both convolutions.
        width: channels of both (published: 4).
        bias: of the convolutions (published: yes).
        batch_norm: BatchNorm after both.
        in_channels, image_size, num_classes: the data's.
    Raises:
        ValueError: impossible sizes or activation.
    Source: the co-author's code of arXiv 2103.02096, net0; ReLU, width and batch norm are ours.
    """

    def __init__(
        self,
        activation: str = "none",
        width: int = 4,
        bias: bool = True,
        batch_norm: bool = False,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        layer = partial(nn.Conv2d, bias=bias)
        shape = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.body = two_layer_net(layer, layer, width=width, act=activation, batch_norm=batch_norm, **shape)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.body(x_BCHW)


class LeNet5(nn.Module):
    """LeNet-5 with ordinary convolutions: `lenet` (sigmoid everywhere) and `lenet_relu` (ReLU everywhere).

    Args:
        activation: "sigmoid", "relu" or "none", behind the convolutions and in the fully connected part.
        in_channels, image_size, num_classes: the data's; images of at least 12 pixels a side.
    Raises:
        ValueError: impossible sizes or activation.
    Source: OpenTCNN's experiments (arXiv 2504.06881).
    """

    def __init__(
        self, activation: str = "sigmoid", in_channels: int = 1, image_size: int = 28, num_classes: int = 10
    ) -> None:
        super().__init__()
        shape = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.body = lenet5(nn.Conv2d, nn.Conv2d, conv_act=activation, head_act=activation, **shape)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.body(x_BCHW)


class ResNet18(nn.Module):
    """Plain ResNet-18, the follow-up's "type 0".

    Args:
        in_channels, image_size, num_classes: the data's; images of at least 17 pixels a side.
        width: channels of the first stage, doubled by each of the others (published: 64).
    Raises:
        ValueError: impossible sizes.
    Source: torchvision's layout (He et al. 2016).
    """

    def __init__(self, in_channels: int = 3, image_size: int = 32, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        layer = partial(nn.Conv2d, bias=False)
        shape = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.body = resnet18(layer, layer, relu=True, width=width, **shape)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.body(x_BCHW)
