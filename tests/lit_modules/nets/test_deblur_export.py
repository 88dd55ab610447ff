"""Generators leave PyTorch with H and W free, odd ones too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from lit_modules.nets.deblur_layers import Generator
from lit_modules.nets.deblur_naf import DeblurNAF
from lit_modules.nets.deblur_resnet import DeblurResNet
from lit_modules.nets.deblur_unet import DeblurFPN, DeblurUNet

NETS: dict[str, Callable[[], Generator]] = {
    "resnet": lambda: DeblurResNet(width=4, blocks=1),
    "resnet_transposed": lambda: DeblurResNet(width=4, blocks=1, upsample="transposed", norm="batch"),
    "naf": lambda: DeblurNAF(width=4, encoder=[1, 1], middle=0, decoder=[0, 1]),
    "unet": lambda: DeblurUNet(width=4, levels=2, upsample="pixel_shuffle"),
    "fpn": lambda: DeblurFPN(width=4, levels=3, pyramid=8),
}
SHAPES = ((1, 3, 40, 24), (2, 3, 33, 50), (3, 3, 17, 29))
FREE = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)


def _net(name: str) -> Generator:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("name", NETS)
def test_the_exported_program_takes_any_size(name: str) -> None:
    net = _net(name)
    program = torch.export.export(net, (torch.rand(2, 3, 21, 34),), dynamic_shapes=FREE).module()
    for shape in SHAPES[1:]:
        x = torch.rand(*shape)
        torch.testing.assert_close(program(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "naf", "unet", "fpn"])
def test_onnx_runtime_restores_the_same_images(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    net, file = _net(name), tmp_path / "net.onnx"
    example = (torch.rand(2, 3, 21, 34),)
    torch.onnx.export(net, example, file, dynamo=True, dynamic_shapes=FREE, input_names=["blurred"], verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        x = torch.rand(*shape)
        (y,) = session.run(None, {"blurred": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=0, atol=1e-5)
