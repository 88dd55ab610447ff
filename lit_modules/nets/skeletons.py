"""The shapes that plain and tropical nets share: two strided layers, LeNet-5, ResNet-18. They know no layer kind.

A `layer` argument is a function (in_channels, out_channels, kernel_size, stride=, padding=) -> module.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Layer = Callable[..., nn.Module]


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for any size that is not an int of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def activation(name: str) -> nn.Module | None:
    """Return the module of "relu" or "sigmoid", or None for "none".

    Raises:
        ValueError: anything else.
    """
    known = {"none": None, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}
    if name not in known:
        raise ValueError(f"activation must be one of {', '.join(known)}; got {name!r}")
    kind = known[name]
    return kind() if kind else None


def strided(side: int) -> int:
    """Side of a 3x3, stride-2, padding-1 layer's output."""
    return (side - 1) // 2 + 1


def two_layer_net(
    layer1: Layer,
    layer2: Layer,
    *,
    width: int,
    in_channels: int,
    image_size: int,
    num_classes: int,
    act: str = "none",
    batch_norm: bool = False,
) -> nn.Sequential:
    """Return two 3x3 layers of stride 2 and padding 1 with `width` channels each, flatten, one linear layer.

    Raises:
        ValueError: a size that is not an int of at least 1, or an unknown activation.
    Source: the co-author's code of arXiv 2103.02096, net0 to net6; activation and batch norm are ours.
    """
    check_sizes(width=width, in_channels=in_channels, image_size=image_size, num_classes=num_classes)
    features = width * strided(strided(image_size)) ** 2
    stages: list[nn.Module | None] = []
    for layer, channels in ((layer1, in_channels), (layer2, width)):
        stages += [layer(channels, width, 3, stride=2, padding=1)]
        stages += [nn.BatchNorm2d(width) if batch_norm else None, activation(act)]
    stages += [nn.Flatten(), nn.Linear(features, num_classes)]
    return nn.Sequential(*[stage for stage in stages if stage is not None])


def lenet5(
    layer1: Layer, layer2: Layer, *, conv_act: str, head_act: str, in_channels: int, image_size: int, num_classes: int
) -> nn.Sequential:
    """Return LeNet-5: 5x5 layers of 6 and 16 channels (the first padded by 2), average pooling, 120, 84, classes.

    Args:
        layer1, layer2: makers of the two 5x5 layers.
        conv_act, head_act: activations behind them and in the fully connected part, see `activation`.
        in_channels, image_size, num_classes: the data's.
    Raises:
        ValueError: a size that is not an int of at least 1, an image of fewer than 12 pixels a side, or an unknown
            activation.
    Source: OpenTCNN's experiments (arXiv 2504.06881), after d2l.ai.
    """
    check_sizes(in_channels=in_channels, image_size=image_size, num_classes=num_classes)
    side = (image_size // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"image_size must be at least 12 for LeNet-5, got {image_size}")
    stages: list[nn.Module | None] = [
        *(layer1(in_channels, 6, 5, padding=2), activation(conv_act), nn.AvgPool2d(2)),
        *(layer2(6, 16, 5), activation(conv_act), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * side * side, 120), activation(head_act)),
        *(nn.Linear(120, 84), activation(head_act), nn.Linear(84, num_classes)),
    ]
    return nn.Sequential(*[stage for stage in stages if stage is not None])


class ResidualBlock(nn.Module):
    """Two 3x3 layers with batch norm and a residual sum; `relu` puts ReLU after the first and after the sum."""

    def __init__(self, layer1: Layer, layer2: Layer, channels: int, out: int, stride: int, relu: bool) -> None:
        super().__init__()
        self.layer1, self.norm1 = layer1(channels, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out)
        self.layer2, self.norm2 = layer2(out, out, 3, stride=1, padding=1), nn.BatchNorm2d(out)
        self.act: nn.Module = nn.ReLU() if relu else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out, H / stride, W / stride)."""
        hidden = self.act(self.norm1(self.layer1(x_BCHW)))
        return self.act(self.norm2(self.layer2(hidden)) + self.shortcut(x_BCHW))


def resnet18(
    layer1: Layer, layer2: Layer, *, relu: bool, in_channels: int, image_size: int, num_classes: int, width: int = 64
) -> nn.Sequential:
    """Return ResNet-18 in torchvision's layout: 7x7 stem of stride 2, max-pool, four stages of two blocks, linear.

    Args:
        layer1, layer2: makers of the two 3x3 layers of each block.
        relu: whether blocks have ReLU; the stem always has.
        in_channels, image_size, num_classes: the data's.
        width: channels of the first stage, doubled by each of the others (published: 64).
    Raises:
        ValueError: a size that is not an int of at least 1, or an image of fewer than 17 pixels a side: five layers of
            stride 2 follow each other, and the last must have more than one pixel to halve.
    Source: torchvision's layout as OpenTCNN uses it for 32x32 images too (arXiv 2504.06881).
    """
    check_sizes(in_channels=in_channels, image_size=image_size, num_classes=num_classes, width=width)
    if image_size < 17:
        raise ValueError(f"image_size must be at least 17 for ResNet-18's five strides of 2, got {image_size}")
    stem = [nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks: list[nn.Module] = []
    channels = width
    for stage in range(4):
        out = width * 2**stage
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(ResidualBlock(layer1, layer2, channels, out, stride, relu))
            channels = out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1), *blocks, *head)
