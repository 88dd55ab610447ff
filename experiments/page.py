"""results/report.html: one page in which every verdict says how it came about and every number opens its runs."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments import report, tables
from experiments.claims import PAPERS, PaperSpec
from experiments.numbers import amount, signed
from experiments.page_drawings import Drawing, inline
from experiments.page_explain import explained
from experiments.page_sweeps import sweeps_of
from experiments.records import Record
from experiments.report import Paper
from experiments.store import write_atomically
from experiments.verdict import VERDICTS, EstimateRow, Verdict, estimates

SHAPES = dict(zip(VERDICTS, "●■◆○", strict=True))  # told apart without colour
SECTION = re.compile(r'<section id="(\w+)" data-number="(\d+)">.*?</section>', re.S)
STYLE = re.compile(r"\.(s[0-9a-f]{6})\{(.*?)\}")


@dataclass(frozen=True)
class Entry:
    """A paper as the contents list names it."""

    key: str
    number: int
    title: str
    words: Counter[str]  # claims of each verdict
    sweeps: bool


class Rendered(NamedTuple):
    """A paper's part of the page."""

    html: str
    doors: dict[str, Any]
    styles: dict[str, str]


def write_html(papers: Sequence[Paper], path: Path) -> None:
    """Write the page; nothing outside it is needed to read what it says of papers.

    Sections of other papers that the page already has stay in it as they are. Searches are shown as their folders beside
    the page have them (<paper>/sweeps/<space>/), whoever wrote those; their drawings are read from there.
    """
    sections, doors, styles = kept(path)
    for paper in papers:
        spec = paper[0]
        found = rendered(spec, _view(*paper), path.parent)
        sections[spec.number, spec.key], doors[spec.key] = found.html, found.doors
        styles |= found.styles
    for number, key in sections:
        sections[number, key], drawings = without_drawings(key, sections[number, key])
        doors[key]["drawings"] = doors[key].get("drawings", {}) | drawings
    ordered = [(key, number, text) for (number, key), text in sorted(sections.items())]
    sweeps = {key: sweeps_of(key, path.parent) for key, _, _ in ordered}
    drawn = "".join(svg for key, _, _ in ordered for svg in doors[key]["drawings"].values())
    used = set(re.findall(r'class="(s[0-9a-f]{6})"', drawn))
    page = _templates().get_template("report.html.j2")
    text = page.render(
        entries=[entry(key, number, text, bool(sweeps[key])) for key, number, text in ordered],
        sections=[(Markup(text), key, sweeps[key]) for key, _, text in ordered],
        doors=Markup(_packed(doors)),
        drawn=Markup("".join(f".{name}{{{css}}}" for name, css in sorted(styles.items()) if name in used)),
        verdicts=VERDICTS,
    )
    write_atomically(path, text)


def rendered(spec: PaperSpec, view: dict[str, Any], folder: Path) -> Rendered:
    """Return a paper's section from all that it shows; files beside the page are linked where `folder` has them."""
    doors, drawings = view.pop("doors"), view.pop("drawings")
    styles: dict[str, str] = {}
    for _, drawing in drawings:
        styles |= drawing.styles
    files = [name for name in ("estimates.csv", "verdicts.json") if (folder / spec.key / name).is_file()]
    section = _templates().get_template("section.html.j2")
    text = section.render(paper=view | {"spec": spec, "drawings": drawings, "files": files}).strip()
    return Rendered(text, doors, styles)


def kept(path: Path) -> tuple[dict[tuple[int, str], str], dict[str, Any], dict[str, str]]:
    """Return the sections, doors and styles of drawings of an earlier page of ours; nothing where there is none."""
    if not path.is_file():
        return {}, {}, {}
    page = path.read_text()
    doors = doors_of(page)
    drawn = re.search(r'<style id="drawn">(.*?)</style>', page, re.S)
    found = {(int(m.group(2)), m.group(1)): m.group(0) for m in SECTION.finditer(page) if m.group(1) in doors}
    return found, doors, dict(STYLE.findall(drawn.group(1))) if drawn else {}


def without_drawings(key: str, section: str) -> tuple[str, dict[str, str]]:
    """Return a section with its drawings taken out, and those by name: packed with the doors they take a quarter of the bytes.

    The page's script puts them back as it opens.
    """
    inside = re.compile(
        rf'(<figure class="drawing[^"]*" id="figure-{re.escape(key)}-([^"]*)">)(<svg.*?</svg>)(?=</figure>)', re.S
    )
    drawings = {match.group(2): match.group(3) for match in inside.finditer(section)}
    return inside.sub(r"\1", section), drawings


def entry(key: str, number: int, section: str, sweeps: bool) -> Entry:
    """Return what the contents list says of a section, read from the section itself: it may be of an earlier page."""
    title = re.search(r"<h2[^>]*>(?:Paper \d+: )?(.*?)</h2>", section, re.S)
    words = re.findall(r'<span class="word [^"]*">\S ([a-z ]+)</span>', section)
    return Entry(key, number, unescape(title.group(1)) if title else key, Counter(words), sweeps)


def _packed(doors: dict[str, Any]) -> str:
    """JSON, compressed and as text: a tenth of the size, and browsers unpack it."""
    raw = json.dumps(doors, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(raw, mtime=0)).decode()


def doors_of(page: str) -> dict[str, Any]:
    """Return what stands behind the numbers of a page of ours, by paper; nothing where there is none."""
    blob = re.search(r'<script type="text/plain" id="doors">(.*?)</script>', page, re.S)
    return json.loads(gzip.decompress(base64.b64decode(blob.group(1)))) if blob else {}


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.globals |= {"amount": amount, "signed": signed, "shapes": SHAPES}
    return environment


def _view(spec: PaperSpec, records: Sequence[Record], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """All that a paper's section shows."""
    rows, profile = estimates(spec, records), report.profile_of(records)
    drawings = report.drawings(spec, rows, verdicts, records, profile, text_as_paths=False)
    return view(spec, records, verdicts, rows, {name: inlined(spec, name, *drawn) for name, drawn in drawings.items()})


def inlined(spec: PaperSpec, name: str, title: str, svg: str) -> Drawing:
    """Return a figure of a paper for the page."""
    return inline(svg, f"{spec.key}-{name}", title)


def view(
    spec: PaperSpec,
    records: Sequence[Record],
    verdicts: Sequence[Verdict],
    rows: Sequence[EstimateRow],
    drawings: dict[str, Drawing],
) -> dict[str, Any]:
    """Return what a paper's section shows, from its runs, its verdicts, its estimates and its figures."""
    profile, done = report.profile_of(records), [record for record in records if record.state == "done"]
    models = report.models(spec, rows, records, profile)
    shown = {cell.door for model in models for row in model.rows for cell in row}
    shown |= {f"{name}|{o.data}|{o.metric}" for c in spec.claims for o in c.operands for name in o.ablations}
    how = explained(spec, verdicts)
    return {
        "profile": profile,
        "verdicts": verdicts,
        "how": how,
        "counts": Counter(v.verdict for v in verdicts),
        "tables": [Markup(tables.html(model, spec.key)) for model in models],
        "drawings": list(drawings.items()),
        "cards": report.data_cards(records),
        "hardware": report.distinct(done, "hardware"),
        "versions": report.distinct(done, "versions"),
        "commit": report.distinct(done, "commit"),
        "deviations": deviations(spec.key),
        "runs": len(done),
        "doors": _doors(spec, [row for row in rows if tables.door(row) in shown], records, verdicts),
    }


def _doors(
    spec: PaperSpec, rows: Sequence[EstimateRow], records: Sequence[Record], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """What stands behind every number, for the page's script: seeds' values, run ids, configuration and command."""
    members: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.key):
        if record.state == "done":
            members[record.key.ablation, record.key.data].append(record)
    groups = {f"{a}|{d}": _group(found) for (a, d), found in members.items()}
    numbers = {
        tables.door(row): {
            "label": spec.metric(row.metric).label,
            "unit": row.unit,
            "group": f"{row.ablation}|{row.data}",
            "mean": _shortened(row.mean),
            "ci": [_shortened(row.ci_low), _shortened(row.ci_high)],
            "values": [_shortened(record.metrics.get(row.metric)) for record in members[row.ablation, row.data]],
        }
        for row in rows
    }
    return {"groups": groups, "numbers": numbers, "claims": _claim_doors(spec, records, verdicts, numbers)}


def _claim_doors(
    spec: PaperSpec, records: Sequence[Record], verdicts: Sequence[Verdict], numbers: Iterable[str]
) -> dict[str, Any]:
    """The groups of runs behind each claim, and the numbers that it weighs, which have doors of their own."""
    where = {record.run_id: f"{record.key.ablation}|{record.key.data}" for record in records}
    weighed = {
        claim.id: [f"{name}|{o.data}|{o.metric}" for o in claim.operands for name in o.ablations]
        for claim in spec.claims
    }
    known = set(numbers)
    return {
        v.id: {
            "text": v.text,
            "groups": list(dict.fromkeys(where[run] for run in v.runs if run in where)),
            "numbers": [name for name in dict.fromkeys(weighed.get(v.id, [])) if name in known],
        }
        for v in verdicts
    }


def _shortened(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.8g}")


def _group(found: list[Record]) -> dict[str, Any]:
    config = found[0].path / "config.yaml"
    text = config.read_text() if config.is_file() else ""
    if text:
        shown = yaml.safe_load(text)
        shown["seed"] = shown["datamodule"]["seed"] = "as listed"
        text = yaml.safe_dump(shown, sort_keys=False)
    command = str(found[0].manifest.get("command", ""))
    return {
        "command": re.sub(r"--seed \d+ ?", "", command).strip(),
        "config": text,
        "runs": [
            {
                "seed": record.key.seed,
                "run": record.run_id,
                "signature": record.signature,
                "commit": (record.manifest.get("commit") or "")[:10],
                "weights": str(record.done.get("weights_sha256", ""))[:12],
                "seconds": record.done.get("seconds"),
            }
            for record in found
        ],
    }


def deviations(key: str) -> list[Markup]:
    """Return the numbered deviations of a paper's README.md as HTML, in order."""
    readme = PAPERS / key / "README.md"
    if not readme.is_file():
        return []
    section = re.search(r"^## Deviations\n(.*?)(?=^## |\Z)", readme.read_text(), re.S | re.M)
    if section is None:
        return []
    items = re.split(r"^\d+\. ", section.group(1), flags=re.M)[1:]
    return [Markup(_inline_markdown(" ".join(item.split()))) for item in items]


def _inline_markdown(text: str) -> str:
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", safe)
