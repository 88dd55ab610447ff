"""Drawings in the page are what matplotlib drew: every point in its place, every style, and far fewer bytes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from factory import paper, records
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import figures
from experiments.claims import Figure
from experiments.page_drawings import inline, outline
from experiments.verdict import estimates

POINT = st.tuples(st.floats(-2000, 2000), st.floats(-2000, 2000))


def _points(d: str) -> list[tuple[float, float]]:
    """Where a path of M, L, l, h, v and z goes, by a second reading of SVG's rules."""
    found, at, start, command, numbers = [], (0.0, 0.0), (0.0, 0.0), "", []
    for token in [*re.findall(r"[A-Za-z]|-?\d*\.?\d+(?:e-?\d+)?", d), "end"]:
        if token.isalpha():
            if command == "z":
                at = start
            command, numbers = token, []
            continue
        numbers.append(float(token))
        if len(numbers) < (1 if command in "hv" else 2):
            continue
        x, y = (*numbers, 0.0)[:2]
        at = {"h": (at[0] + x, at[1]), "v": (at[0], at[1] + x), "l": (at[0] + x, at[1] + y)}.get(command, (x, y))
        start = at if command == "M" else start
        found.append(at)
        numbers = []
    return found


@settings(deadline=None)
@given(st.lists(POINT, min_size=1, max_size=30), st.sampled_from([1, 2]))
def test_no_point_of_an_outline_moves_by_more_than_half_a_unit(points: list[tuple[float, float]], places: int) -> None:
    drawn = "M " + "\nL ".join(f"{x:.6f} {y:.6f}" for x, y in points)
    kept = _points(outline(drawn, places))
    rounded = [tuple(round(float(f"{v:.6f}") * 10**places) for v in point) for point in points]
    # Steps of no length are left out, wherever they are.
    moved = [p for i, p in enumerate(rounded) if i == 0 or p != rounded[i - 1]]
    assert [tuple(round(v * 10**places) for v in point) for point in kept] == moved
    assert len(outline(drawn, places)) <= len(drawn)


def test_closed_outlines_go_on_from_where_they_began() -> None:
    assert outline("M 0 0\nL 10 0\nL 10 10\nz\nL 5 5") == "M0 0h10v10zl5 5"
    assert outline("M 0 2\nC 0.53 2 1.04 1.78 1.41 1.41\nz", 2) == "M0 2C.53 2 1.04 1.78 1.41 1.41z"


def _drawn(kind: str = "noise") -> str:
    spec = paper()
    made = records({"a": [95.0, 96.0], "b": [92.0, 93.0]})
    noisy = [
        r for n in ("0.1", "0.5") for r in records({"a": [80.0, 82.0], "b": [70.0, 75.0]}, f"noise/gaussian_{n}/acc")
    ]
    svg = figures.draw(
        spec,
        Figure("f", kind, "Title & more", "mnist", ("a", "b"), "b"),
        estimates(spec, [*made, *noisy]),
        [],
        made,
        False,
    )
    assert svg is not None
    return svg


@pytest.mark.parametrize("kind", ["noise", "forest"])
def test_a_drawing_keeps_its_texts_and_marks_in_half_the_bytes(kind: str) -> None:
    svg = _drawn(kind)
    before, found = ElementTree.fromstring(svg), inline(svg, "toy-f", "Title & <more>")
    after = ElementTree.fromstring(found.svg)
    texts = lambda root: ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")]  # noqa: E731
    marks = lambda root: sum(e.tag.endswith("}use") or e.tag == "use" for e in root.iter())  # noqa: E731
    assert texts(after) == texts(before)
    assert marks(after) == marks(before)
    assert len(found.svg) < 0.55 * len(svg)
    assert after.attrib["aria-label"] == "Title & <more>"
    assert inline(svg, "toy-f", "Title & <more>") == found


def test_ids_are_of_the_drawing_and_lead_somewhere() -> None:
    one, two = (inline(_drawn(), name, "t").svg for name in ("paper-one", "paper-two"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, two)]
    assert not ids[0] & ids[1]
    for svg, known in zip((one, two), ids, strict=True):
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {(i, "") for i in known} | {
            ("", i) for i in known
        }


def test_every_class_is_declared_and_black_follows_the_scheme() -> None:
    found = inline(_drawn("forest"), "toy-f", "t")
    assert set(re.findall(r'class="([^"]+)"', found.svg)) == set(found.styles)
    said = " ".join(found.styles.values())
    assert found.follows
    assert "#000000" not in said
    assert "var(--ink)" in said
    assert "font-family" not in said


def _with_picture(written: str) -> str:
    import io

    import matplotlib.pyplot as plt

    from experiments.figure_style import STYLE

    with plt.rc_context({**STYLE, "svg.fonttype": "none"}):
        canvas, axes = plt.subplots(figsize=(2, 2))
        axes.imshow(np.random.default_rng(0).random((80, 80, 3)), interpolation="none")
        axes.text(1, 1, "face", color=written)
        out = io.StringIO()
        canvas.savefig(out, format="svg")
        plt.close(canvas)
    return out.getvalue()


def test_what_writes_in_white_on_pictures_keeps_its_colours() -> None:
    white, black = (inline(_with_picture(colour), "p", "t") for colour in ("white", "black"))
    assert not white.follows
    assert black.follows
    assert "var(--" not in " ".join(white.styles.values())


def test_photographs_become_smaller_and_stay_what_they_show() -> None:
    import base64
    import io

    from PIL import Image

    svg = _with_picture("white")
    before, after = (re.search(r'data:image/(\w+);base64,([^"]+)', text) for text in (svg, inline(svg, "p", "t").svg))
    assert before is not None
    assert after is not None
    assert after.group(1) == "webp"
    was, now = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(m.group(2)))).convert("RGB"), float) for m in (before, after)
    )
    assert was.shape == now.shape
    assert len(after.group(2)) < 0.6 * len(before.group(2))
    assert np.abs(was.mean((0, 1)) - now.mean((0, 1))).max() < 8


def test_what_is_no_svg_is_refused() -> None:
    with pytest.raises(ValueError, match="'toy-x' is no SVG"):
        inline("<svg", "toy-x", "t")
