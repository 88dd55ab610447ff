"""An exported generator is the generator, at any size, and says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deblur import making
from deblur.making import call, opened, saved

from experiments.deblur import onnx_export
from experiments.deblur.weights import load, load_net
from experiments.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(home, file, what the command said)."""
    for package in onnx_export.NEEDED:
        pytest.importorskip(package, reason="the extra onnx is not installed")
    home = tmp_path_factory.mktemp("home")
    run = making.run(home, making.shaken)
    result = call("deblur-export", run, home / "net.onnx")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return home, home / "net.onnx", result.output


def test_it_gives_what_pytorch_gives_at_every_shape(exported: tuple[Path, Path, str]) -> None:
    home, file, said = exported
    net, facts = load_net(home / "runs" / ("ab12" + 16 * "0") / "best.ckpt")
    restorer = load(str(file), home / "runs", CPU)
    for shape in ((1, 3, 8, 8), (2, 3, 61, 40), (1, 3, 130, 7)):
        x = torch.rand(shape)
        with torch.inference_mode():
            torch.testing.assert_close(restorer.run(x), net(x), rtol=0, atol=onnx_export.TOLERANCE)
            assert (net(x) - x).abs().max() > 0.01  # it does something
    assert restorer.facts == facts
    assert said.count("differs from PyTorch by at most") == len(onnx_export.SHAPES)


def test_it_says_what_it_is(exported: tuple[Path, Path, str]) -> None:
    import onnx

    model = onnx.load(exported[1])
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["paper"] == "face_deblur"
    assert (told["ablation"], told["signature"], told["commit"], told["size"]) == (
        "naf_full",
        "ab12" + 16 * "0",
        "c0ffee",
        "64",
    )
    assert "CC BY 4.0" in told["licence"]
    assert "Not for identification" in " ".join(told["card"].split())
    assert max(entry.version for entry in model.opset_import if not entry.domain) >= 17
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    assert not list(exported[1].parent.glob("*.data"))  # weights inside


def test_photographs_are_restored_with_it(exported: tuple[Path, Path, str], tmp_path: Path) -> None:
    home, file, _ = exported
    photo = saved(making.scene(), tmp_path / "a.png")
    for weights, out in ((file, "onnx.png"), (home / "runs" / ("ab12" + 16 * "0"), "torch.png")):
        assert call("deblur", photo, tmp_path / out, "--whole", "--weights", weights, "--device", "cpu").exit_code == 0
    ours, theirs = opened(tmp_path / "onnx.png").astype(int), opened(tmp_path / "torch.png").astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - opened(photo)).max() > 1
    assert "Not for identification" in " ".join(call("deblur", "--card", "--weights", file).output.split())


def test_what_cannot_be_exported_is_refused(
    exported: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file, _ = exported
    monkeypatch.setenv("FIVEFOLD_HOME", str(home))

    def refused(*words: object) -> str:
        result = call("deblur-export", *words)
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)

    assert "is exported already" in refused(file, tmp_path / "b.onnx")
    assert "must end in .onnx" in refused("ab12", tmp_path / "b.pt")
    assert "outputs exist already" in refused("ab12", file)
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert "export needs onnxscript: install the extra, `pip install 'fivefold[onnx]'`" in refused(
        "ab12", tmp_path / "b.onnx"
    )
    assert not (tmp_path / "b.onnx").exists()


def test_one_that_differs_is_not_written(
    exported: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file, _ = exported

    def copy(net: Any, facts: Any, target: Path) -> None:
        target.write_bytes(file.read_bytes())
        with torch.no_grad():
            net.net.ending.bias.add_(0.01)

    monkeypatch.setattr(onnx_export, "_write", copy)
    with pytest.raises(
        UserError, match=r"onnxruntime gives other images than PyTorch \(1 x 3 x 64 x 64: 0\.01.*nothing was"
    ):
        onnx_export.export("ab12", tmp_path / "b.onnx", home / "runs")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_making_is_refused(exported: tuple[Path, Path, str], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(exported[1])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="does not say its ablation: it is not of `fivefold deblur-export`"):
        load(str(tmp_path / "foreign.onnx"), tmp_path, CPU)
    (tmp_path / "words.onnx").write_text("words")
    with pytest.raises(UserError, match="cannot be run"):
        load(str(tmp_path / "words.onnx"), tmp_path, CPU)
