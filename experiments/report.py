"""Results as files: estimates, verdicts, tables, figures, and one page in which every number opens its runs."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments import figures, tables
from experiments.claims import PAPERS, PaperSpec
from experiments.numbers import signed
from experiments.records import Record
from experiments.store import write_atomically
from experiments.verdict import EstimateRow, Verdict, estimates

Paper = tuple[PaperSpec, Sequence[Record], Sequence[Verdict]]


def write_paper(spec: PaperSpec, records: Sequence[Record], verdicts: Sequence[Verdict], out_dir: Path) -> None:
    """Write results/<paper>/: estimates.csv, verdicts.json, tables as Markdown and LaTeX, figures as SVG.

    Every file is written whole; files of an earlier report that no longer belong are removed. The same records give
    the same bytes.
    """
    rows = estimates(spec, records)
    profile = _profile(records)
    written = {out_dir / "estimates.csv": tables.estimates_csv(rows)}
    verdict_file = _verdict_file(spec, records, verdicts, profile)
    written[out_dir / "verdicts.json"] = json.dumps(verdict_file, indent=2, ensure_ascii=False) + "\n"
    about = [*_data_notes(records, {record.key.data for record in records}), f"Profile: {records[0].key.scale}."]
    for model in [tables.claims(verdicts, about), *_models(spec, rows, records, profile)]:
        written[out_dir / f"table_{model.id}.md"] = tables.markdown(model)
        written[out_dir / f"table_{model.id}.tex"] = tables.latex(model)
    for name, (_, svg) in _drawings(spec, rows, verdicts, records, profile).items():
        written[out_dir / "figures" / f"{name}.svg"] = svg
    for path, content in written.items():
        write_atomically(path, content)
    ours = [*out_dir.glob("table_*.md"), *out_dir.glob("table_*.tex"), *out_dir.glob("figures/*.svg")]
    for old in set(ours) - set(written):
        old.unlink()


def write_html(papers: Sequence[Paper], path: Path) -> None:
    """Write the self-contained page: no file or address outside it is needed to read it.

    Sections of other papers that the page already has stay in it as they are.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.globals["signed"] = signed
    section = environment.get_template("section.html.j2")
    sections, doors = _kept(path)
    for paper in papers:
        view = _view(*paper)
        doors[paper[0].key] = view.pop("doors")
        sections[paper[0].number, paper[0].key] = section.render(paper=view).strip()
    blob = _packed(doors)
    ordered = [Markup(text) for _, text in sorted(sections.items())]
    page = environment.get_template("report.html.j2").render(sections=ordered, doors=Markup(blob))
    write_atomically(path, page)


def _kept(path: Path) -> tuple[dict[tuple[int, str], str], dict[str, Any]]:
    """The sections and doors of an earlier page of ours, by paper; nothing where there is none."""
    if not path.is_file():
        return {}, {}
    page = path.read_text()
    doors = doors_of(page)
    found = re.findall(r'(<section id="(\w+)" data-number="(\d+)">.*?</section>)', page, re.S)
    return {(int(number), key): text for text, key, number in found if key in doors}, doors


def _profile(records: Sequence[Record]) -> str:
    profiles = sorted({record.key.profile for record in records})
    if len(profiles) != 1:
        raise ValueError(f"a report is about one profile, got {', '.join(profiles) or 'no records'}")
    return profiles[0]


def _verdict_file(
    spec: PaperSpec, records: Sequence[Record], verdicts: Sequence[Verdict], profile: str
) -> dict[str, Any]:
    done = [record for record in records if record.state == "done"]
    newest = max(done, key=lambda r: r.done.get("finished", ""), default=None)
    return {
        "paper": spec.key,
        "profile": profile,
        **({"model": records[0].key.model} if records[0].key.model else {}),
        "hardware": _distinct(done, "hardware"),
        "commit": _distinct(done, "commit"),
        "created": newest.done.get("finished") if newest else None,
        "data": data_cards(records),
        "claims": [verdict.to_dict() for verdict in verdicts],
    }


def _packed(doors: dict[str, Any]) -> str:
    """JSON, compressed and as text: a tenth of the size, and browsers unpack it."""
    raw = json.dumps(doors, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(raw, mtime=0)).decode()


def doors_of(page: str) -> dict[str, Any]:
    """Return what stands behind the numbers of a page of ours, by paper; nothing where there is none."""
    blob = re.search(r'<script type="text/plain" id="doors">(.*?)</script>', page, re.S)
    return json.loads(gzip.decompress(base64.b64decode(blob.group(1)))) if blob else {}


def _distinct(records: Sequence[Record], name: str) -> Any:
    """The one value that all runs share, or the list of them."""
    found = {json.dumps(r.manifest.get(name), sort_keys=True): r.manifest.get(name) for r in records}
    values = [found[key] for key in sorted(found)]
    return values[0] if len(values) == 1 else values or None


def data_cards(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return every DataCard that the runs used, each once."""
    cards = {json.dumps(c, sort_keys=True): c for r in records for c in r.manifest.get("data_cards", [])}
    return [cards[key] for key in sorted(cards)]


def _data_notes(records: Sequence[Record], names: set[str]) -> list[str]:
    """A line on each data set that a table shows: what it is, and whether it is real."""
    cards: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.key.data in names:
            cards |= {c["name"]: c for c in record.manifest.get("data_cards", [])}
    return [
        f"Data: {c['name']}, {c['n']:,} samples in all, real, sha256 {c['sha256'][:12]}."
        if c["real"]
        else f"Data: {c['name']}, generated by {c['source']}, sha256 of the code {c['sha256'][:12]}."
        for _, c in sorted(cards.items())
    ]


def _models(
    spec: PaperSpec, rows: Sequence[EstimateRow], records: Sequence[Record], profile: str
) -> list[tables.TableModel]:
    shown = [table for table in spec.tables if profile in table.profiles]
    models = []
    for table in shown:
        notes = [*_data_notes(records, {column.data for column in table.columns}), f"Profile: {records[0].key.scale}."]
        models.append(tables.build(spec, table, rows, records, notes))
    return models


def _drawings(
    spec: PaperSpec,
    rows: Sequence[EstimateRow],
    verdicts: Sequence[Verdict],
    records: Sequence[Record],
    profile: str,
    text_as_paths: bool = True,
) -> dict[str, tuple[str, str]]:
    found = {}
    for figure in spec.figures:
        if profile not in figure.profiles:
            continue
        if svg := figures.draw(spec, figure, rows, verdicts, records, text_as_paths):
            found[figure.id] = (figure.title, svg)
    return found


def _view(spec: PaperSpec, records: Sequence[Record], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    rows, profile = estimates(spec, records), _profile(records)
    drawings = _drawings(spec, rows, verdicts, records, profile, text_as_paths=False)
    models = _models(spec, rows, records, profile)
    shown = {cell.door for model in models for row in model.rows for cell in row}
    return {
        "spec": spec,
        "profile": profile,
        "verdicts": verdicts,
        "counts": {
            word: sum(v.verdict == word for v in verdicts) for word in dict.fromkeys(v.verdict for v in verdicts)
        },
        "tables": [Markup(tables.html(model, spec.key)) for model in models],
        "figures": [
            (name, title, Markup(_inline(svg, f"{spec.key}-{name}", title))) for name, (title, svg) in drawings.items()
        ],
        "cards": data_cards(records),
        "hardware": _distinct([r for r in records if r.state == "done"], "hardware"),
        "versions": _distinct([r for r in records if r.state == "done"], "versions"),
        "commit": _distinct([r for r in records if r.state == "done"], "commit"),
        "deviations": deviations(spec.key),
        "runs": sum(record.state == "done" for record in records),
        "doors": _doors(spec, [row for row in rows if tables.door(row) in shown], records, verdicts),
    }


def _inline(svg: str, name: str, title: str) -> str:
    """An SVG for use inside the page: no XML header, ids of its own, and a name for people who do not see it."""
    body = "\n".join(line.strip() for line in svg[svg.index("<svg") :].splitlines())
    used = set(re.findall(r'"#([^"]+)"', body)) | set(re.findall(r"url\(#([^)]+)\)", body))
    for identity in set(re.findall(r'id="([^"]+)"', body)) - used:
        body = body.replace(f' id="{identity}"', "")
    for identity in used:
        body = body.replace(f'id="{identity}"', f'id="{name}-{identity}"')
        body = body.replace(f'"#{identity}"', f'"#{name}-{identity}"').replace(
            f"url(#{identity})", f"url(#{name}-{identity})"
        )
    return body.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


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
    claims = {v.id: {"runs": list(v.runs), "text": v.text} for v in verdicts}
    where = {record.run_id: f"{record.key.ablation}|{record.key.data}" for record in records}
    for claim in claims.values():
        claim["groups"] = list(dict.fromkeys(where[run] for run in claim.pop("runs") if run in where))
    return {"groups": groups, "numbers": numbers, "claims": claims}


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
