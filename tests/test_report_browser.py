"""The report and the comparison in a real browser, for what only its layout shows.

These tests need the system's Chromium, which `.ci/run` installs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import make_run, rich_run

from profuser.report.comparison import compare_runs
from profuser.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install -e ".[test]"')

NAMES = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"desktop": (1280, 900), "phone": (390, 844)}
A4_WIDTH = 687  # the CSS pixels between margins of 14 mm

# Finds every visible text with its size in pixels and its contrast to the nearest opaque background.
TEXTS = """() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const [low, high] = [luminance(parse(style.color)), luminance(ground(e))].sort((a, b) => a - b);
    found.push({text: text.slice(0, 40), pixels: parseFloat(style.fontSize), contrast: (high + 0.05) / (low + 0.05)});
  }
  return found;
}"""
PICTURES = """() => [...document.images].map(i =>
  ({complete: i.complete, width: i.naturalWidth, dark: i.currentSrc === i.parentElement.querySelector("source").srcset}))"""
TOO_WIDE = """() => [...document.querySelectorAll("main, main *")].filter(e => e.scrollWidth > e.clientWidth + 1
  && e.clientWidth > 0 && getComputedStyle(e).display !== "inline").map(e => e.tagName + "." + e.className)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(*rich_run(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """Four runs, of which one is hard to lay out and was scored on other prompts."""
    root = tmp_path_factory.mktemp("comparison")
    runs = [make_run(root / name, seed=n)[0] for n, name in enumerate(("demo", "a-long_name_of_a_run" * 3, "sft"))]
    return compare_runs([*runs, rich_run(root / "rich")[0]], root / "comparison.html")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"needs Chromium, none of {', '.join(NAMES)} is on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def load(browser, report: Path, width: int, height: int, scheme: str):
    """The page, and a list of all that went wrong while it was loaded."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(30_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def guard(route) -> None:
        if route.request.url == report.as_uri():
            return route.continue_()
        wrong.append(f"request: {route.request.url}")
        return route.abort()

    page.route("**/*", guard)
    page.goto(report.as_uri(), wait_until="load")
    return page, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_page_loads_fits_and_can_be_read(browser, report, view, scheme):
    page, wrong = load(browser, report, *VIEWS[view], scheme)
    pictures = page.evaluate(PICTURES)
    assert len(pictures) == 5
    assert all(p["complete"] and p["width"] > 0 for p in pictures)
    assert all(p["dark"] == (scheme == "dark") for p in pictures)
    width, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room
    texts = page.evaluate(TEXTS)
    assert len(texts) > 500
    assert [t for t in texts if t["pixels"] < 14] == []
    assert [
        t for t in texts if t["contrast"] < (4.5 if t["text"][0] in "✓✗★▼" else 7)
    ] == []  # the limits of WCAG AA and AAA
    assert page.evaluate("document.getAnimations().length") == 0
    assert wrong == []
    page.close()


def test_only_boxes_that_scroll_are_wider_than_their_place(browser, report):
    page, _ = load(browser, report, *VIEWS["phone"], "light")
    assert set(page.evaluate(TOO_WIDE)) <= {"DIV.scroll"}
    assert page.evaluate("[...document.querySelectorAll('nav a, summary')].every(e => e.offsetHeight >= 40)")
    page.close()


def test_print_is_light_and_cuts_nothing_off(browser, report):
    page, _ = load(browser, report, A4_WIDTH, 900, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.wait_for_function(f"({PICTURES})().every(p => p.complete && !p.dark)")
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= A4_WIDTH
    assert page.evaluate("document.querySelector('details pre').offsetHeight") > 100  # the recipe is closed on a screen
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.close()


@pytest.mark.parametrize(("view", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_a_comparison_loads_fits_and_can_be_read(browser, comparison, view, scheme):
    page, wrong = load(browser, comparison, *VIEWS[view], scheme)
    (picture,) = page.evaluate(PICTURES)
    assert picture["complete"]
    assert picture["dark"] == (scheme == "dark")
    assert set(page.evaluate(TOO_WIDE)) <= {"DIV.scroll"}
    width, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room
    texts = page.evaluate(TEXTS)
    assert len(texts) > 200
    assert [t for t in texts if t["pixels"] < 14 or t["contrast"] < 7] == []
    assert wrong == []
    page.close()


@pytest.mark.long
def test_a_printed_comparison_cuts_nothing_off(browser, comparison):
    page, _ = load(browser, comparison, A4_WIDTH, 900, "light")
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= A4_WIDTH
    page.close()
