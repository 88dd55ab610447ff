"""Laws of motion: what is drawn, presets, and laws that are none."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from datamodules.blur_motion import PRESETS, Motion, draw, of_face, preset
from datamodules.counter_random import key_of


def _keys(count: int, seed: int = 0) -> Tensor:
    return key_of(seed, "test", torch.arange(count))


def test_draws_fill_their_ranges() -> None:
    motion = Motion(exposures=(0.5, 1.0), angle=(90, 180))
    drawn = draw(motion, _keys(4000), 100)
    for values, low, high in (
        (drawn.size, 8, 22),
        (drawn.turn, 0.25, 0.5),
        (drawn.inertia, 0, 0.7),
        (drawn.gaussian, 0, 10),
        (drawn.impulse, 0, 0.2),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(float(values.mean()) - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * 4000)
    for values, options in ((drawn.anxiety, motion.anxiety), (drawn.exposure, motion.exposures)):
        shares = [float((values == option).double().mean()) for option in options]
        assert sum(shares) == pytest.approx(1)
        assert all(abs(share - 1 / len(options)) < 5 * math.sqrt(0.25 / 4000) for share in shares)
    assert torch.corrcoef(torch.stack(list(drawn))).sub(torch.eye(7)).abs().max() < 5 / math.sqrt(4000)


def test_presets() -> None:
    assert PRESETS["near_linear"].extent == pytest.approx((0.25 * 0.54, 0.45 * 0.54))
    assert of_face(0.5, 1.0) == pytest.approx((0.27, 0.54))
    assert [PRESETS[name].anxiety for name in ("near_linear", "mild", "severe")] == [(0.0, 0.001, 0.003)] * 3
    drawn = draw(PRESETS["deblurgan"], _keys(300), 256)
    assert drawn.size.tolist() == [60.0] * 300
    assert set(drawn.exposure.tolist()) == {0.1, 0.5, 1.0}
    assert preset("mild", samples=50) == replace(PRESETS["mild"], samples=50)
    with pytest.raises(ValueError, match="unknown preset 'near-linear', nearest: 'near_linear'; known: near_linear, "):
        preset("near-linear")
    as_read = {f.name: getattr(PRESETS["deblurgan"], f.name) for f in fields(Motion)}
    as_read = {name: list(value) if isinstance(value, tuple) else value for name, value in as_read.items()}
    assert {PRESETS["deblurgan"]: 1}[Motion(**as_read)] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "shaky"}, "unknown kind 'shaky'; known: shake, linear"),
        ({"parametrise": "width"}, "unknown parametrise 'width'"),
        ({"extent": (0.3, 0.2)}, r"extent must be a range \(a, b\) with 0 <= a <= b <= 1, got \(0.3, 0.2\)"),
        ({"extent": (0.1, 1.2)}, "extent must be"),
        ({"extent": (math.nan, 0.2)}, "extent must be"),
        ({"length": (0.1, 0.2, 0.3)}, "length must be a range"),
        ({"angle": (0, 400)}, "angle must be"),
        ({"gaussian": (-1, 2)}, "gaussian must be"),
        ({"impulse": (0, 1.5)}, "impulse must be"),
        ({"anxiety": ()}, r"anxiety must list numbers in \[0, 1\], got \(\)"),
        ({"anxiety": (0.1, 2)}, "anxiety must list"),
        ({"anxiety": 0.003}, "anxiety must be a list of numbers, got 0.003"),
        ({"extent": "0.1"}, "extent must be a list of numbers, got '0.1'"),
        ({"samples": 1}, "samples must lie in .*, got 1"),
        ({"exposures": (0.001,)}, r"exposures must list numbers in \[2 / samples = 0.004, 1\]"),
        ({"exposures": (1.1,)}, "exposures must list"),
        ({"kind": "disk", "parametrise": "length"}, "'disk' has no path length: set parametrise to 'extent'"),
    ],
)
def test_laws_that_are_none(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Motion(**changes)


def test_kinds_share_their_draws() -> None:
    lines, shakes = (draw(Motion(kind=kind), _keys(9), 64) for kind in ("linear", "shake"))
    assert all(torch.equal(a, b) for a, b in zip(lines, shakes, strict=True))


def test_a_draw_does_not_depend_on_the_batch_and_a_side_is_needed() -> None:
    whole, part = (draw(Motion(), keys_B, 64) for keys_B in (_keys(9), _keys(9)[[4, 1]]))
    assert all(torch.equal(a[[4, 1]], b) for a, b in zip(whole, part, strict=True))
    with pytest.raises(ValueError, match="side must be at least 1 pixel, got 0"):
        draw(Motion(), _keys(2), 0)
