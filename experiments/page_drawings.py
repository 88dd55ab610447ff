"""A drawing for use inside the page: small, its styles shared, its colours those of the page's scheme, its ids its own."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html import escape
from typing import NamedTuple
from xml.etree import ElementTree

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
SCHEME = {"#000000": "var(--ink)", "#dddddd": "var(--grid)"}
WHITE = "#ffffff"
BACKGROUND = {"fill": WHITE}  # of the whole drawing and of its axes: the page has its own
PHOTOGRAPH = 4000  # bytes from which on a picture is worth another format
PLACES, FINE = 1, 2  # decimals of a point: an eye cannot tell a tenth; outlines of markers are drawn closer
LARGER, BROAD = 1.2, 300  # how much larger than on paper; the width in points from which on one column is too narrow
NUMBER = r"-?\d*\.?\d+(?:e-?\d+)?"
Styles = dict[str, str]


class Drawing(NamedTuple):
    """The SVG element, the classes it uses with their declarations, whether its colours follow the scheme, and whether it
    wants the whole width.
    """

    svg: str
    styles: Styles
    follows: bool
    broad: bool


def inline(svg: str, name: str, title: str) -> Drawing:
    """Return a drawing of matplotlib, with text as text, for the page.

    Coordinates are to a tenth of a point. Black and the grid's grey take the scheme's colours, except in a
    drawing that writes in white, on pictures: that one keeps its colours and needs a white ground.

    Args:
        svg: a whole SVG document.
        name: unique in the page; ids start with its digest.
        title: said to people who do not see it.
    Raises:
        ValueError: it is no SVG document.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"the drawing '{name}' is no SVG: {error}") from None
    follows = not any(_declarations(text.get("style", "")).get("fill") == WHITE for text in root.iter(f"{SVG}text"))
    writer = _Writer(hashlib.sha256(name.encode()).hexdigest()[:6], follows)
    body = "".join(writer.element(child) for child in root)
    box = [float(number) for number in root.attrib["viewBox"].split()]
    width, height = (_short(LARGER * side) for side in box[2:])
    head = f'<svg role="img" aria-label="{escape(title)}" viewBox="{" ".join(map(_short, box))}"'
    return Drawing(f'{head} width="{width}pt" height="{height}pt">{body}</svg>', writer.styles, follows, box[2] > BROAD)


class _Writer:
    """Writes elements as text, and gathers the styles they use."""

    def __init__(self, prefix: str, follows: bool) -> None:
        self.prefix, self.follows = prefix, follows
        self.styles: Styles = {}
        self._ids: dict[str, str] = {}

    def element(self, element: ElementTree.Element, places: int = PLACES) -> str:
        tag = element.tag.removeprefix(SVG)
        declared = _declarations(element.get("style", ""))
        if tag in ("metadata", "style") or (tag == "path" and declared == BACKGROUND):
            return ""
        if tag == "defs":
            places = FINE
        inner = "".join(self.element(child, places) for child in element)
        if tag in ("text", "tspan"):
            inner = escape(element.text or "", quote=False) + inner
        elif not inner and tag in ("g", "defs"):
            return ""
        attributes = self._attributes(element, tag, declared, places)
        if tag == "g" and not attributes:
            return inner
        tail = escape(element.tail or "", quote=False) if tag == "tspan" else ""
        return f"<{tag}{attributes}>{inner}</{tag}>{tail}" if inner else f"<{tag}{attributes}/>{tail}"

    def _attributes(self, element: ElementTree.Element, tag: str, declared: Styles, places: int) -> str:
        values: dict[str, str] = {}
        for key, value in element.attrib.items():
            local = key.removeprefix(LINK)
            if local == "style" or (local == "id" and tag not in ("path", "clipPath")):
                continue
            values[local] = self._value(local, value, places)
        if declared:
            values["class"] = self._style(declared)
        return "".join(f' {key}="{escape(value)}"' for key, value in values.items() if value)

    def _value(self, name: str, value: str, places: int) -> str:
        if name == "d":
            return outline(value, places)
        if name == "id":
            return self._id(value)
        if name == "href":
            return f"#{self._id(value[1:])}" if value.startswith("#") else _picture(value)
        if name == "clip-path":
            return f"url(#{self._id(value[5:-1])})"
        if name == "transform" and re.fullmatch(rf"rotate\(-?0(?: {NUMBER})*\)", value):
            return ""
        # The scale of a transform is a factor, and no place: to a tenth, text would jump.
        kept = 4 if name == "transform" and "scale" in value else places
        return re.sub(NUMBER, lambda match: _short(float(match.group()), kept), value)

    def _id(self, value: str) -> str:
        return self._ids.setdefault(value, f"d{self.prefix}-{len(self._ids)}")

    def _style(self, declared: Styles) -> str:
        colours = SCHEME if self.follows else {}
        text = ";".join(f"{name}:{colours.get(value, value)}" for name, value in sorted(declared.items()))
        name = "s" + hashlib.sha256(text.encode()).hexdigest()[:6]
        self.styles[name] = text
        return name


def _declarations(style: str) -> Styles:
    """What a style says, less what the page says of all drawings."""
    pairs = (part.partition(":")[::2] for part in style.split(";") if part.strip())
    found = {name.strip(): value.strip() for name, value in pairs}
    found.pop("font-family", None)
    return found


def outline(d: str, places: int = PLACES) -> str:
    """Return the same path in fewer characters, every point within half a unit of the last place."""
    tokens = re.findall(rf"[A-Za-z]|{NUMBER}", d)
    if set("".join(t for t in tokens if t.isalpha())) - set("MLz"):
        return _joined([t if t.isalpha() else _short(float(t), places) for t in tokens])
    return _polyline(tokens, places)


def _polyline(tokens: list[str], places: int) -> str:
    """Moves and lines, as steps from point to point. Points are rounded before they are subtracted: no error adds up."""
    words: list[str] = []
    at = start = (0, 0)
    command, index = "", 0
    while index < len(tokens):
        if tokens[index].isalpha():
            command, index = tokens[index], index + 1
        if command == "z":
            words.append("z")
            at = start
            continue
        x, y = (round(float(t) * 10**places) for t in tokens[index : index + 2])
        index += 2
        if command == "M":
            words += ["M", _scaled(x, places), _scaled(y, places)]
            start = (x, y)
        else:
            words += _step(x - at[0], y - at[1], places)
        at = (x, y)
    return _joined(words)


def _step(dx: int, dy: int, places: int) -> list[str]:
    if not dx and not dy:
        return []
    if not dy:
        return ["h", _scaled(dx, places)]
    return ["v", _scaled(dy, places)] if not dx else ["l", _scaled(dx, places), _scaled(dy, places)]


def _joined(words: list[str]) -> str:
    """Words of a path with as few spaces as may be, and no command twice in a row."""
    out, command, last = [], "", ""
    for word in words:
        if word.isalpha():
            if word == command and word in "lLhvCQ":
                continue
            command = word
            out.append(word)
        else:
            out.append(word if not last or last.isalpha() or word.startswith("-") else f" {word}")
        last = word if word.isalpha() else "0"
    return "".join(out)


def _scaled(value: int, places: int) -> str:
    return _short(value / 10**places, places)


def _short(value: float, places: int = PLACES) -> str:
    text = f"{value:.{places}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return {"-0": "0", "": "0"}.get(text, text.replace("0.", ".", 1) if re.match(r"-?0\.", text) else text)


def _picture(address: str) -> str:
    """A photograph's data URI as WebP where that is smaller; other pictures as they are."""
    head, _, data = address.partition(",")
    raw = base64.b64decode(data)
    if not head.startswith("data:image/png;base64") or len(raw) < PHOTOGRAPH:
        return "".join(address.split())
    from PIL import Image

    with Image.open(io.BytesIO(raw)) as image:
        out = io.BytesIO()
        image.save(out, "WEBP", quality=80, method=6)
    if len(out.getvalue()) >= len(raw):
        return "".join(address.split())
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
