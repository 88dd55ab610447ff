"""The convolution nets that plans are made for: VGG-19 written plainly, ResNet-50 and Inception v3 from torchvision.

Legend: B batch, C channels, H height and width, N classes.

Dropout is left out, so that a planned step can be compared with an unplanned one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.planning.trace import Step

VGG19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class Vgg(nn.Module):
    """VGG (arXiv 1409.1556): blocks of 3 x 3 convolutions, a pooling after each, three full layers named as in Table 4."""

    def __init__(self, blocks: Sequence[tuple[int, int]], size: int, hidden: int, classes: int) -> None:
        super().__init__()
        channels = 3
        self.features = nn.ModuleDict()
        for i, (width, count) in enumerate(blocks):
            for j in range(count):
                self.features[f"conv{i + 1}_{j + 1}"] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
        self.counts = [count for _, count in blocks]
        side = size >> len(blocks)
        if side < 1:
            raise ValueError(f"{len(blocks)} poolings leave nothing of images of size {size}")
        self.fc1 = nn.Linear(channels * side * side, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.predictions = nn.Linear(hidden, classes)

    def forward(self, x_BCHH: Tensor) -> Tensor:
        """Return logits (B, N)."""
        layers = iter(self.features.values())
        for count in self.counts:
            for _ in range(count):
                x_BCHH = F.relu(next(layers)(x_BCHH))
            x_BCHH = F.max_pool2d(x_BCHH, 2)
        x = x_BCHH.flatten(1)
        return self.predictions(F.relu(self.fc2(F.relu(self.fc1(x)))))


def class_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; Inception's auxiliary head counts 0.4 (arXiv 1512.00567 leaves the weight open; torchvision's choice)."""
    out = model(images)
    if isinstance(out, Tensor):
        return F.cross_entropy(out, labels)
    return F.cross_entropy(out.logits, labels) + 0.4 * F.cross_entropy(out.aux_logits, labels)


def images(batch: int, size: int, classes: int) -> dict[str, Tensor]:
    """Random images (B, 3, H, H) and labels (B,)."""
    return {"images": torch.randn(batch, 3, size, size), "labels": torch.randint(0, classes, (batch,))}


def vgg19(batch: int, size: int, hidden: int = 4096, classes: int = 1000, divide: int = 1) -> Step:
    """A VGG-19 step.

    Args:
        divide: by how much its convolutions are narrower.
    """
    blocks = [(width // divide, count) for width, count in VGG19]
    return Step(Vgg(blocks, size, hidden, classes), images(batch, size, classes), class_loss)


def resnet50(batch: int, size: int, classes: int = 1000, blocks: Sequence[int] = (3, 4, 6, 3)) -> Step:
    """A ResNet-50 step (arXiv 1512.03385), its batch normalisation with the statistics of the whole batch."""
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, list(blocks), num_classes=classes)
    return Step(model, images(batch, size, classes), class_loss)


def inception_v3(batch: int, size: int, classes: int = 1000) -> Step:
    """An Inception v3 step (arXiv 1512.00567) with its auxiliary head.

    Raises:
        ValueError: images under 75 pixels, of which nothing is left on the way.
    """
    from torchvision.models import inception_v3 as build

    if size < 75:
        raise ValueError(f"Inception v3 needs images of at least 75 pixels, got {size}")
    # the auxiliary head needs 17 x 17 features, which smaller images do not have
    model = build(weights=None, num_classes=classes, init_weights=False, aux_logits=size >= 299, transform_input=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Step(model, images(batch, size, classes), class_loss)
