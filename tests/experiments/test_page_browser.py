"""results/report.html as people see it: in a real Chromium, wide and narrow, light and dark, by keyboard, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from browser_fixtures import browser, keep, new_page

__all__ = ["browser"]
PAGE = Path(__file__).resolve().parents[2] / "results" / "report.html"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PAGE.exists(), reason="results/report.html is not there")]

# Every text with the colours it has on the ground it has: WCAG's ratio, below 4.5 hard to read.
CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length && (c.length < 4 || c[3] > .99)) return c;
    }
    return [255, 255, 255];
  };
  const bad = [], texts = "p, li, td, th, h1, h2, h3, h4, summary, figcaption, a, button, .word, .numbers span, svg text";
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e.tagName.toLowerCase() === "text";
    if (svg && e.closest(".fixed")) continue;  // writes on pictures, whose ground is not in the page
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(ground(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(e.tagName + " " + e.textContent.trim().slice(0, 40) + " " + ratio.toFixed(2));
  }
  return bad;
}"""
BLACK_IN_THE_DARK = """() => matchMedia("(prefers-color-scheme: dark)").matches
  ? [...document.querySelectorAll(".drawing:not(.fixed) svg :is(use, path)")]
      .filter(e => getComputedStyle(e).stroke === "rgb(0, 0, 0)").length
  : 0"""
ROWS = """rows => document.querySelector("figure.table table").tBodies[0].replaceChildren(...rows.map(cells => {
  const tr = document.createElement("tr");
  cells.forEach(text => tr.append(Object.assign(document.createElement("td"), { textContent: text })));
  return tr;
}))"""


def _open(page: Any) -> None:
    page.goto(PAGE.as_uri())
    page.wait_for_selector("html[data-drawn]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_the_page_is_readable_in_every_size_and_scheme(browser: Any, size: str, scheme: str) -> None:
    page, errors = new_page(browser, size, scheme)
    _open(page)
    keep(page, f"report_{size}_{scheme}")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(BLACK_IN_THE_DARK) == 0, "black lines on a dark ground"
    assert page.locator(".word").count() > 10
    assert page.evaluate("[...document.querySelectorAll('.drawing')].every(f => f.querySelector('svg, img'))")
    narrow = page.evaluate(
        "[...document.querySelectorAll('.drawing svg')].filter(s => s.getBoundingClientRect().width < 200).length"
    )
    assert narrow == 0, "a drawing too small to read"
    assert errors == []
    page.context.close()


def test_the_check_of_contrast_finds_what_is_hard_to_read(browser: Any) -> None:
    page, _ = new_page(browser, scheme="dark")
    _open(page)
    page.add_style_tag(content=".word { color: #555 !important } .drawing svg { fill: #333 !important }")
    found = page.evaluate(CONTRAST)
    assert any(line.startswith("SPAN") for line in found)
    assert any(line.startswith("text") for line in found)
    page.context.close()


def test_every_link_leads_somewhere(browser: Any) -> None:
    page, errors = new_page(browser)
    _open(page)
    links = page.evaluate(
        "[...document.querySelectorAll('a[href], img[src]')].map(a => a.getAttribute('href') || a.getAttribute('src'))"
    )
    assert len(links) > 10
    ids = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
    for link in links:
        parts = urlparse(link)
        if parts.scheme == "data":
            continue
        assert parts.scheme == "", f"{link}: the page is to be read without a network"
        if parts.path:
            assert (PAGE.parent / unquote(parts.path)).exists(), link
        else:
            assert parts.fragment in ids, link
    assert errors == []
    page.context.close()


def test_everything_works_by_keyboard(browser: Any) -> None:
    page, errors = new_page(browser)
    _open(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#results")
    door = page.locator("button.door[data-door]").first
    door.focus()
    page.keyboard.press("Enter")
    page.locator("dialog[open] table tbody tr").first.wait_for()
    assert page.locator("dialog[open] pre").first.text_content().startswith(".venv/bin/fivefold")
    keep(page, "report_runs_behind_a_number")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('dialog').open")
    assert page.evaluate("document.activeElement.dataset.door !== undefined"), "focus does not come back"
    summary = page.locator("details.how[data-seeds] summary").first
    summary.focus()
    page.keyboard.press("Enter")
    page.locator("details.how[open] li").first.wait_for()
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].every(b => b.tabIndex === 0 && b.getAttribute('aria-label'))"
    )
    assert errors == []
    page.context.close()


def test_every_seeds_numbers_lie_under_a_verdict(browser: Any) -> None:
    page, errors = new_page(browser)
    _open(page)
    claim = page.locator("details.how[data-seeds]").first
    assert not claim.evaluate("d => d.open")
    claim.locator("summary").click()
    claim.locator("table tbody tr").first.wait_for()
    assert claim.locator("thead th").all_text_contents()[:3] == ["net", "metric", "unit"]
    assert errors == []
    page.context.close()


def test_tables_sort_by_what_their_cells_mean(browser: Any) -> None:
    page, _ = new_page(browser)
    _open(page)
    minus = "\N{MINUS SIGN}3.5"
    page.evaluate(ROWS, [["b", "1,200", "failed"], ["a10", "95.25 ± 0.20", "3"], ["a9", minus, "20"]])
    table = page.locator("figure.table table").first
    first = lambda: table.locator("tbody tr td:first-child").all_text_contents()  # noqa: E731
    heads = table.locator("thead button.sort")
    heads.nth(1).click()
    assert first() == ["a9", "a10", "b"]
    assert table.locator("thead th").nth(1).get_attribute("aria-sort") == "ascending"
    heads.nth(1).click()
    assert first() == ["b", "a10", "a9"]
    heads.nth(2).focus()
    page.keyboard.press("Enter")
    assert first() == ["a10", "a9", "b"], "what is missing comes last"
    heads.nth(2).click()
    assert first() == ["a9", "a10", "b"], "and last when sorted the other way"
    heads.nth(0).click()
    assert first() == ["a9", "a10", "b"], "names sort as people count"
    page.context.close()
