"""One table model, four forms: Markdown, LaTeX, HTML and CSV. A number in it is a door: a key to the runs behind it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape

from rich.table import Table as RichTable

from experiments.claims import Column, PaperSpec, Table
from experiments.numbers import signed, with_half_width
from experiments.records import Record
from experiments.verdict import EstimateRow, Verdict

MISSING = "—"


@dataclass(frozen=True)
class TableCell:
    """What one cell shows, and the door behind it: "ablation|data|metric", or None where there is nothing to open."""

    text: str
    door: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class TableModel:
    """A finished table: header, rows (the first cell is the ablation's name), and the lines under it."""

    id: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    notes: tuple[str, ...]
    left: tuple[int, ...] = (0,)  # columns of words; the others hold numbers and are set to the right


def door(row: EstimateRow) -> str:
    """Return the key that opens an estimate's runs."""
    return f"{row.ablation}|{row.data}|{row.metric}"


def number(row: EstimateRow) -> str:
    """Return an estimate as people read it: exact counts with thousands, means with the half-width of their interval."""
    if row.sd == 0 or (row.metric.startswith("cost/") and row.mean == round(row.mean)):
        return f"{row.mean:,.0f}" if row.mean == round(row.mean) else f"{row.mean:,.4g}"
    if row.ci_high is None:
        return f"{row.mean:.4g} (one run)"
    return with_half_width(row.mean, row.ci_high - row.mean, row.unit)


def build(
    spec: PaperSpec, table: Table, estimates: Sequence[EstimateRow], records: Sequence[Record], notes: Sequence[str]
) -> TableModel:
    """Fill a table from estimates. A value that is not there shows a dash and why, never a number."""
    found = {(e.ablation, e.data, e.metric): e for e in estimates}
    states: dict[tuple[str, str], list[str]] = {}
    for record in records:
        states.setdefault((record.key.ablation, record.key.data), []).append(record.state)
    rows = []
    for name in table.rows:
        cells = [TableCell(name)]
        for column in table.columns:
            cells.append(_cell(found.get((name, column.data, column.metric)), states.get((name, column.data), [])))
        rows.append(tuple(cells))
    header = ("net", *(_heading(spec, column, table.columns) for column in table.columns))
    under = [f"Source: {table.source}.", table.note, _seeds_note(table, found), *notes]
    return TableModel(table.id, table.title, header, tuple(rows), tuple(line for line in under if line))


def listing(spec: PaperSpec, estimates: Sequence[EstimateRow]) -> RichTable:
    """Return what some cells measured, for the terminal: a row for each ablation, data set and metric."""
    shown = RichTable(box=None, header_style="bold", pad_edge=False)
    for name in ("ablation", "data", "metric", "mean ± half the 95% interval", "unit", "seeds"):
        shown.add_column(name, justify="right" if name.startswith(("mean", "seeds")) else "left", no_wrap=True)
    for row in estimates:
        shown.add_row(row.ablation, row.data, spec.metric(row.metric).label, number(row), row.unit, str(row.n))
    return shown


def claims(verdicts: Sequence[Verdict], notes: Sequence[str]) -> TableModel:
    """Return the table that says what became of every claim."""
    header = ("claim", "verdict", "estimate", "95% interval", "margin", "seeds", "what the claim says")
    rows = []
    for v in verdicts:
        exact = v.kind == "identity"
        estimate = MISSING if v.estimate is None else f"{v.estimate:.3g}" if exact else signed(v.estimate, v.unit)
        interval = MISSING if v.ci is None or exact else f"{signed(v.ci[0], v.unit)} to {signed(v.ci[1], v.unit)}"
        numbers = (estimate, interval, MISSING if exact else f"{v.margin:g}", str(v.n) if v.n else MISSING)
        rows.append(tuple(TableCell(text) for text in (v.id, v.verdict, *numbers, v.text)))
    under = [
        "An estimate is a difference in the claim's unit, positive as the claim says. An exact statement has no interval: its "
        "estimate is the ratio of the counts, or the smallest slack of any run.",
        *notes,
    ]
    return TableModel("claims", "What became of each claim", header, tuple(rows), tuple(under), left=(0, 1, 6))


def _cell(estimate: EstimateRow | None, states: list[str]) -> TableCell:
    if estimate is not None and (not states or all(state == "done" for state in states)):
        return TableCell(number(estimate), door(estimate))
    for state in ("failed", "running", "stale", "not run"):
        if state in states:
            return TableCell(state, None, f"{states.count(state)} of {len(states)} seeds: {state}")
    return TableCell(MISSING, None, "not measured" if states else "not run under this profile")


def _heading(spec: PaperSpec, column: Column, columns: Sequence[Column]) -> str:
    metric = spec.metric(column.metric)
    several = len({c.data for c in columns}) > 1
    said = metric.unit in metric.label or metric.label in metric.unit
    unit = "%" if metric.unit == "points" else "" if said else metric.unit
    name = metric.label + (f", {column.data}" if several else "")
    return f"{name} ({unit})" if unit else name


def _seeds_note(table: Table, found: dict[tuple[str, str, str], EstimateRow]) -> str:
    counts = {
        found[key].n for key in ((r, c.data, c.metric) for r in table.rows for c in table.columns) if key in found
    }
    if not counts:
        return ""
    n = str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Mean ± half the 95% Student interval over {n} seeds; a number without ± is exact."


def markdown(model: TableModel) -> str:
    """Return an aligned Markdown table with its notes."""
    lines = [list(model.header), *[[cell.text for cell in row] for row in model.rows]]
    columns = range(len(model.header))
    widths = [max(len(line[i]) for line in lines) for i in columns]
    text = [f"# {model.title}", ""]
    for index, line in enumerate(lines):
        text.append("| " + " | ".join(_padded(line[i], widths[i], i in model.left) for i in columns) + " |")
        if index == 0:
            rules = [
                "-" * (widths[i] + (2 if i in model.left else 1)) + ("" if i in model.left else ":") for i in columns
            ]
            text.append("|" + "|".join(rules) + "|")
    return "\n".join([*text, "", *(f"{note}  " for note in model.notes)]).rstrip() + "\n"


def _padded(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


TEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "±": r"$\pm$", "—": "---"}
TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"$<$", ">": r"$>$"}


def tex(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(TEX.get(character, character) for character in text)


def latex(model: TableModel) -> str:
    """Return a booktabs table."""
    columns = "".join("l" if i in model.left else "r" for i in range(len(model.header)))
    body = [" & ".join(tex(cell.text) for cell in row) + r" \\" for row in model.rows]
    return "\n".join(
        [
            r"\begin{table}",
            rf"  \caption{{{tex(model.title)}. {' '.join(tex(note) for note in model.notes)}}}",
            rf"  \label{{tab:{model.id}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            "    " + " & ".join(tex(name) for name in model.header) + r" \\",
            r"    \midrule",
            *(f"    {line}" for line in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def html(model: TableModel, prefix: str) -> str:
    """Return the table as HTML in which every number is a button that names its door; `prefix` makes its id unique."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in model.header)
    rows = []
    for first, *rest in model.rows:
        cells = "".join(f"<td>{_html_cell(cell)}</td>" for cell in rest)
        rows.append(f'<tr><th scope="row">{escape(first.text)}</th>{cells}</tr>')
    notes = "".join(f"<p>{escape(note)}</p>" for note in model.notes)
    return (
        f'<figure class="table" id="table-{prefix}-{model.id}"><figcaption>{escape(model.title)}</figcaption>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<div class="notes">{notes}</div></figure>'
    )


def _html_cell(cell: TableCell) -> str:
    if cell.door is None:
        return f'<span title="{escape(cell.reason)}">{escape(cell.text)}</span>'
    return f'<button class="door" data-door="{escape(cell.door)}">{escape(cell.text)}</button>'


def estimates_csv(rows: Sequence[EstimateRow]) -> str:
    """Return estimates.csv: one row per ablation, data set and metric; a missing value is empty."""
    names = ["paper", "ablation", "data", "metric", "unit", "n", "mean", "sd", "ci_low", "ci_high", "profile", "runs"]
    assert names == [f.name for f in fields(EstimateRow)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_plain(getattr(row, name)) for name in names])
    return text.getvalue()


def _plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
