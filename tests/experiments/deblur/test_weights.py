"""The right run is found by any of its names, its weights are the tested ones, and nothing else is run or believed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from deblur import making

from experiments.deblur.weights import Restorer, device_of, facts_of, find, load, load_net
from experiments.errors import UserError

CPU = torch.device("cpu")


def sign(letter: str) -> str:
    return letter * 20


def test_by_default_the_best_finished_run_of_naf_full(home: Path) -> None:
    making.run(home, making.identity, sign("a"), gain=1.0)
    best = making.run(home, making.identity, sign("b"), gain=2.0)
    making.run(home, making.identity, sign("c"), gain=9.0, profile="smoke")
    making.run(home, making.identity, sign("d"), gain=9.0, finished=False)
    making.run(home, making.identity, sign("e"), gain=9.0, ablation="naf")
    making.run(home, making.identity, sign("f"), gain=9.0, paper="tropical_cnn")
    (home / "runs" / "damaged").mkdir()
    (home / "runs" / "damaged" / "manifest.json").write_text("{")
    assert find(None, home / "runs") == best / "best.ckpt"
    large = making.run(home, making.identity, sign("1"), gain=0.5, profile="paper")
    assert find(None, home / "runs") == large / "best.ckpt"


def test_without_any_it_says_how_to_get_one(home: Path) -> None:
    with pytest.raises(UserError, match=r"`make reproduce-paper-2` trains all of paper 2 in minutes.*--only naf_full"):
        find(None, home / "runs")
    smoke = making.run(home, making.identity, profile="smoke")
    assert find(None, home / "runs").parent == smoke


def test_by_folder_file_ablation_and_start_of_signature(home: Path) -> None:
    runs = home / "runs"
    old = making.run(home, making.identity, sign("a"), ablation="naf")
    new = making.run(home, making.identity, sign("b"), ablation="naf")
    os.utime(old / "done.json", (1e9, 1e9))
    for word in (str(new), str(new / "best.ckpt"), "naf", "bbbb", sign("b")):
        assert find(word, runs) == new / "best.ckpt"
    os.utime(new / "done.json", (1e8, 1e8))
    assert find("naf", runs) == old / "best.ckpt"


def test_other_words_are_refused_with_the_nearest(home: Path) -> None:
    runs = home / "runs"
    making.run(home, making.identity, sign("a"), paper="tropical_cnn")
    untrained = making.run(home, making.identity, sign("b"), ablation="wiener")
    (untrained / "best.ckpt").unlink()
    for word, why in {
        "naf_ful": "no ablation of paper 2 .nearest valid: 'naf_full'",
        "nowhere.onnx": "there is no file nowhere.onnx",
        "aaaa": "is of another paper: tropical_cnn",
        "bbbb": "holds no best.ckpt: what it tested is computed, not trained",
        "cccc": "no run under .* starts with 'cccc'",
        str(untrained / "config.yaml"): "neither a checkpoint .* nor an exported generator",
        "fpn": "no finished run of fpn",
    }.items():
        with pytest.raises(UserError, match=why):
            find(word, runs)


def test_the_averaged_generator_is_taken_where_there_is_one(home: Path) -> None:
    folder = making.run(home, making.identity, averaged=making.brighter)
    x = torch.full((1, 3, 20, 20), 0.5)
    torch.testing.assert_close(load_net(folder / "best.ckpt")[0](x), x + 26 / 255)
    plain = making.run(home, making.identity, sign("c"))
    assert torch.equal(load_net(plain / "best.ckpt")[0](x), x)
    assert load_net(folder / "best.ckpt")[0](x + 0.45).max() == 1  # clamped, as it is tested


def test_files_that_do_not_fit_are_refused_and_no_foreign_code_is_run(home: Path) -> None:
    folder = making.run(home, making.identity, target="os.system")
    with pytest.raises(UserError, match=r"not of a generator of paper 2, but of os\.system"):
        load_net(folder / "best.ckpt")
    folder = making.run(home, making.identity, sign("c"))
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("width: 4", "width: 8"))
    with pytest.raises(UserError, match=r"does not fit .*config\.yaml.*size mismatch"):
        load_net(folder / "best.ckpt")
    file.unlink()
    with pytest.raises(UserError, match="a checkpoint must lie in its run's folder"):
        load_net(folder / "best.ckpt")

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, ("touch evil",)

    other = making.run(home, making.identity, sign("d"))
    torch.save({"state_dict": Evil()}, other / "best.ckpt")
    with pytest.raises(UserError, match="does not fit"):
        load_net(other / "best.ckpt")


def test_grey_goes_in_as_three_channels_and_comes_out_as_one(home: Path) -> None:
    making.run(home, making.shaken)
    restorer = load(None, home / "runs", CPU)
    grey = np.random.default_rng(0).random((2, 40, 33, 1), dtype=np.float32)
    colour = restorer(np.repeat(grey, 3, -1))
    assert colour.shape == (2, 40, 33, 3)
    np.testing.assert_allclose(restorer(grey)[..., 0], colour.mean(-1), atol=1e-6)


def test_what_is_not_finite_is_no_image() -> None:
    facts = facts_of(Path("nowhere"), {"seed": 0, "data": {"name": "faces"}, **_card_config()}, 1)
    restorer = Restorer(lambda x: x / 0 - x / 0, CPU, facts)
    with pytest.raises(FloatingPointError, match="not finite"):
        restorer(np.ones((1, 4, 4, 3), np.float32))


def _card_config() -> dict:
    return {"net": {"_target_": "a.Net"}, "datamodule": {"size": 64, "motion": "deblurgan"}}


def test_the_card_says_what_it_is_and_what_it_is_not_for(home: Path) -> None:
    folder = making.run(home, making.identity)
    _, facts = load_net(folder / "best.ckpt")
    card = " ".join(facts.card.split())
    for words in (
        "naf_full of paper 2",
        "DeblurNAF, 5,759 parameters",
        "faces, photographs, licence: CC BY 4.0; aligned, 64 x 64 pixels",
        "preset 'training' (kind shake), 1.92 to 15.4 pixels wide at that size, which is 0.06 to 0.44 face widths",
        "5,600 pairs",
        "test set near_linear: PSNR 22 blurred, 23 restored (dB)",
        "PSNR of 33 dB against what it was",
        "may invent detail",
        "Not for identification",
    ):
        assert words in card
    assert "strength" not in card
    assert facts.licence == "code Apache-2.0; faces: CC BY 4.0"
    unknown = " ".join(facts_of(Path("x"), {"seed": 0, "data": {"name": "faces"}, **_card_config()}, 1).card.split())
    assert "unknown faces" in unknown
    assert "paths of 15 to 15 pixels" in unknown
    assert "an unknown number of pairs" in unknown


def test_devices() -> None:
    assert device_of("cpu") == CPU
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device 'gpu9' cannot be used"):
        device_of("gpu9")
