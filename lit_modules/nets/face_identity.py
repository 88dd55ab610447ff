"""Whether a restored face is still the same person's.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_modules.nets.perceptual import FrozenFeatures, WeightsUnavailable

SIDE = 160  # pixels, of what FaceNet was trained on


class FaceIdentity:
    """FaceNet's embedding of a face and the cosine distance of two; frozen and kept apart, see FrozenFeatures.

    Args:
        weights: file with facenet-pytorch's InceptionResnetV1 state dict (VGGFace2 or CASIA-WebFace); None where there is
            none. It is never downloaded from here.
    Raises:
        WeightsUnavailable: no path, no file there, or a file that does not hold this network: then the column is "not
            available", and no other distance takes its name.
    Source: FaceNet (arXiv 1503.03832) in facenet-pytorch's form; images (255 x - 127.5) / 128 at 160 pixels.
    """

    def __init__(self, weights: str | Path | None) -> None:
        if weights is None or not Path(weights).is_file():
            where = "no path was given" if weights is None else f"there is no file {weights}"
            raise WeightsUnavailable(f"the identity distance is not available: it needs FaceNet's weights, and {where}")
        from facenet_pytorch import InceptionResnetV1

        with torch.device("meta"):
            net = InceptionResnetV1(pretrained=None)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("logits.")}
        try:
            net.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise WeightsUnavailable(f"{weights} does not hold FaceNet's InceptionResnetV1: {error}") from error
        self.network = FrozenFeatures("facenet", [net], scale=(255 / 128,))

    def embedding(self, x_BCHW: Tensor) -> Tensor:
        """Return unit vectors (B, 512) of face crops (B, 3, H, W) in [0, 1], enlarged or shrunk to 160 pixels."""
        x_BCHW = F.interpolate(x_BCHW.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self.network.features(x_BCHW)[0]

    def identity_distance(self, restored_BCHW: Tensor, sharp_BCHW: Tensor) -> Tensor:
        """Return 1 - the cosine of the two embeddings of each pair, (B,), in [0, 2]."""
        return 1 - F.cosine_similarity(self.embedding(restored_BCHW), self.embedding(sharp_BCHW))
