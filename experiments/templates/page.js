"use strict";
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}
const unpacked = unpack(document.getElementById("doors").textContent);
const panel = document.getElementById("panel"), body = document.getElementById("panel-body");
const make = (tag, text, name) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (name) e.className = name; return e; };
const digits = value => value === null || value === undefined ? "missing" : String(+value.toPrecision(6));

// Drawings come packed with the numbers; what the address points at may have moved by their height.
unpacked.then(papers => {
  for (const [paper, doors] of Object.entries(papers)) for (const [name, svg] of Object.entries(doors.drawings || {})) {
    const figure = document.getElementById("figure-" + paper + "-" + name);
    if (figure) figure.innerHTML = svg;
  }
  document.querySelectorAll(".scroll, .drawing.broad").forEach(box => region(box,
    box.closest("figure")?.querySelector("figcaption")?.textContent || box.querySelector("svg")?.getAttribute("aria-label") || "Table"));
  document.documentElement.dataset.drawn = "yes";
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
});

// Where `make ui` serves; another address can be given as report.html?mlflow=http://127.0.0.1:5001
const asked = new URLSearchParams(location.search).get("mlflow") || "";
const mlflow = /^https?:\/\//.test(asked) ? asked.replace(/\/+$/, "") : "http://127.0.0.1:5000";
function runLink(run) {
  if (!/^[0-9a-f]{32}$/.test(run)) return document.createTextNode(run);
  const a = make("a", run.slice(0, 12), "run"); a.title = run; a.href = mlflow + "/#/runs/" + run; a.target = "_blank"; a.rel = "noopener"; return a;
}

function grid(names, rows, title) {
  const box = make("div", undefined, "scroll"), table = make("table"), head = make("tr"), inside = make("tbody");
  names.forEach(n => { const th = make("th", n); th.scope = "col"; head.append(th); });
  rows.forEach(row => { const tr = make("tr"); row.forEach(v => { const td = make("td"); td.append(v); tr.append(td); }); inside.append(tr); });
  table.append(make("thead"), inside); table.tHead.append(head); box.append(table); region(box, title); return box;
}
function region(box, title) { box.tabIndex = 0; box.setAttribute("role", "region"); box.setAttribute("aria-label", title); }

function showGroup(group, values, unit) {
  const names = ["seed", ...(values ? ["value (" + unit + ")"] : []), "MLflow run", "signature", "commit", "weights", "seconds"];
  const rows = group.runs.map((run, i) => [run.seed, ...(values ? [digits(values[i])] : []), runLink(run.run), run.signature, run.commit, run.weights, run.seconds ?? ""]);
  body.append(grid(names, rows, "The runs"), make("p", "Run it again, in the project's folder:"), make("pre", ".venv/bin/" + group.command));
  if (group.config) { const details = make("details", undefined, "more"); details.append(make("summary", "Resolved configuration"), make("pre", group.config)); body.append(details); }
}
async function open(button) {
  const doors = (await unpacked)[button.closest("section").id]; body.replaceChildren();
  const title = document.getElementById("panel-title");
  if (button.dataset.door) {
    const n = doors.numbers[button.dataset.door], [ablation, data] = n.group.split("|");
    title.textContent = n.label + ": " + ablation + " on " + data;
    if (n.ci[0] !== null) body.append(make("p", "mean " + digits(n.mean) + " " + n.unit + ", 95% interval " + digits(n.ci[0]) + " to " + digits(n.ci[1])));
    showGroup(doors.groups[n.group], n.values, n.unit);
  } else {
    const claim = doors.claims[button.dataset.claim];
    title.textContent = "The runs behind " + button.dataset.claim;
    body.append(make("p", claim.text));
    claim.groups.forEach(g => { body.append(make("h4", g.replace("|", " on "))); showGroup(doors.groups[g]); });
  }
  body.append(make("p", "Run ids open in the MLflow UI at " + mlflow + " while `make ui` serves it over the runs of this machine.", "soft"));
  panel.showModal(); panel.scrollTop = 0;
}
document.querySelectorAll("button.door").forEach(b => b.addEventListener("click", () => open(b)));
panel.querySelector(".close").addEventListener("click", () => panel.close());
panel.addEventListener("click", event => { if (event.target === panel) panel.close(); });

// Every seed's numbers under a verdict, made when it is unfolded.
async function showSeeds(details) {
  const doors = (await unpacked)[details.closest("section").id], claim = doors.claims[details.dataset.seeds];
  const shown = (claim && claim.numbers || []).map(name => doors.numbers[name]).filter(Boolean);
  if (!shown.length || details.querySelector("table")) return;
  const seeds = [...new Set(shown.flatMap(n => doors.groups[n.group].runs.map(r => r.seed)))].sort((a, b) => a - b);
  const rows = shown.map(n => { const at = new Map(doors.groups[n.group].runs.map((r, i) => [r.seed, n.values[i]]));
    return [n.group.replace("|", " on "), n.label, n.unit, ...seeds.map(s => at.has(s) ? digits(at.get(s)) : "—"), digits(n.mean)]; });
  details.append(grid(["net", "metric", "unit", ...seeds.map(s => "seed " + s), "mean"], rows, "Every seed's numbers"));
}
document.querySelectorAll("details[data-seeds]").forEach(d => d.addEventListener("toggle", () => d.open && showSeeds(d)));

// Tables sort by any column: numbers as numbers, what is missing last either way.
const number = text => { const found = text.replace(/,/g, "").replace(/[−–]/g, "-").match(/^[^\d]*?(-?\d+(\.\d+)?(e[-+]?\d+)?)/i); return found ? +found[1] : null; };
function sort(table, column, th) {
  const down = th.getAttribute("aria-sort") === "ascending", rows = [...table.tBodies[0].rows];
  const texts = new Map(rows.map(r => [r, r.cells[column].textContent.trim()]));
  const words = column === 0 || rows.every(r => number(texts.get(r)) === null);
  const key = r => words ? texts.get(r) : number(texts.get(r));
  rows.sort((a, b) => { const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (words ? x.localeCompare(y, "en", { numeric: true }) : x - y) * (down ? -1 : 1); });
  table.querySelectorAll("[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", down ? "descending" : "ascending"); table.tBodies[0].append(...rows);
}
document.querySelectorAll("figure.table table").forEach(table => [...table.tHead.rows[0].cells].forEach((th, column) => {
  const button = make("button", th.textContent, "sort"); button.type = "button"; th.replaceChildren(button);
  button.addEventListener("click", () => sort(table, column, th));
}));
// On a phone the list of contents would fill the first screen.
if (matchMedia("(max-width: 40rem)").matches) document.querySelector("nav details").open = false;
