"""The identity distance is FaceNet's, and without its weights there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_modules.nets.face_identity import FaceIdentity
from lit_modules.nets.perceptual import WeightsUnavailable


def test_it_is_the_cosine_of_facenets_embeddings(tmp_path: Path) -> None:
    """With random weights in a file of the published keys, which hold a classifier too."""
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    net = InceptionResnetV1(pretrained=None).eval()
    file = tmp_path / "facenet.pt"
    torch.save(net.state_dict() | {"logits.weight": torch.zeros(1), "logits.bias": torch.zeros(1)}, file)
    state = torch.random.get_rng_state()
    identity = FaceIdentity(file)
    assert torch.equal(torch.random.get_rng_state(), state)
    x, y = torch.rand(2, 1, 3, 160, 160)
    with torch.no_grad():
        first, second = (net((255 * image - 127.5) / 128) for image in (x, y))
        torch.testing.assert_close(identity.embedding(x), first, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(identity.identity_distance(x, y), 1 - (first * second).sum(1), rtol=0, atol=1e-5)
        assert identity.identity_distance(x, x).item() == pytest.approx(0, abs=1e-5)
        small = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        assert identity.embedding(small).norm(dim=1).item() == pytest.approx(1, abs=1e-5)
    assert not any(m.training for m in identity.network.stages.modules())
    assert not any(p.requires_grad for p in identity.network.stages.parameters())


def test_without_weights_it_is_not_available(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"identity distance is not available.*no path was given"):
        FaceIdentity(None)
    with pytest.raises(WeightsUnavailable, match=r"there is no file .*missing\.pt"):
        FaceIdentity(tmp_path / "missing.pt")
    other = tmp_path / "other.pt"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    with pytest.raises(WeightsUnavailable, match=r"other\.pt does not hold FaceNet's InceptionResnetV1"):
        FaceIdentity(other)
