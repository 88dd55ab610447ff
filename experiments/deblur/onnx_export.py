"""`fivefold deblur-export`: a generator as one ONNX file that takes any batch, height and width, checked against PyTorch.

Legend: B batch, H height, W width.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from experiments.deblur.files import check_outputs
from experiments.deblur.weights import Clamped, Facts, find, load_net, load_onnx, told_of
from experiments.errors import UserError
from experiments.store import sync_folder

NEEDED = ("onnx", "onnxruntime", "onnxscript")
OPSET = 18
SHAPES = ((1, 64, 64), (2, 33, 50), (1, 17, 29), (3, 128, 96), (1, 200, 120))  # B, H, W: even and odd, small and large
TOLERANCE = 1e-4  # in images from 0 to 1; a step of 8 bits is 40 times as much
BLURRED, RESTORED = "blurred", "restored"


def export(word: str | None, target: Path, runs: Path, force: bool = False) -> tuple[Facts, list[tuple[str, float]]]:
    """Write a run's generator to an ONNX file, once it gives there what it gives in PyTorch.

    The file takes `blurred`, float32 (batch, 3, height, width) in [0, 1], and gives `restored` of the same shape, in [0, 1]
    too. Its metadata are the facts of `experiments.deblur.weights`, model card and licences among them.

    Args:
        word: see `find`; not an ONNX file.
        target: ends in .onnx.
        runs: where runs lie.
    Returns:
        What is known of the weights, and the largest difference at each shape.
    Raises:
        UserError: the extra `onnx` is not installed; see `find` and `load_net`; a target of another suffix, or one that
            exists, without `force`; results that differ by more than 1e-4.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"export needs {', '.join(missing)}: install the extra, `pip install 'fivefold[onnx]'`")
    if target.suffix != ".onnx":
        raise UserError(f"the file to write must end in .onnx, got {target}")
    source = find(word, runs)
    if source.suffix == ".onnx":
        raise UserError(f"{source} is exported already")
    check_outputs([source], [target], force)
    net, facts = load_net(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        partial = Path(folder) / "net.onnx"
        _write(net, facts, partial)
        differences = compare(net, partial)
        if worst := [f"{shape}: {off:.3g}" for shape, off in differences if not off <= TOLERANCE]:
            raise UserError(f"onnxruntime gives other images than PyTorch ({', '.join(worst)}); nothing was written")
        os.replace(partial, target)
    sync_folder(target.parent)
    return facts, differences


def _write(net: Clamped, facts: Facts, file: Path) -> None:
    import onnx
    from torch.export import Dim

    free = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(
            net,
            (torch.rand(2, 3, 21, 34, generator=torch.Generator().manual_seed(0)),),
            file,
            dynamo=True,
            dynamic_shapes=free,
            input_names=[BLURRED],
            output_names=[RESTORED],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    model = onnx.load(file)
    model.doc_string = facts.card
    onnx.helper.set_model_props(model, told_of(facts))
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.checker.check_model(model)
    onnx.save(model, file)


def compare(net: Clamped, file: Path, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[tuple[str, float]]:
    """Return the largest absolute difference between a generator and its ONNX file on noise of each shape (B, H, W)."""
    generator = torch.Generator().manual_seed(0)
    exported = load_onnx(file, torch.device("cpu"))
    found = []
    for B, H, W in shapes:
        x_BCHW = torch.rand(B, 3, H, W, generator=generator)
        with torch.inference_mode():
            off = (net(x_BCHW) - exported.run(x_BCHW)).abs().max()
        found.append((f"{B} x 3 x {H} x {W}", float(off)))
    return found
