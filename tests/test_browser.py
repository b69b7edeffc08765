"""report.html in headless Chromium: what a reader sees, on a phone, in the dark and on paper. Figures are synthetic."""

from __future__ import annotations

import copy
import functools
import http.server
import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from synthetic import synthetic_result

from benchmarks.report.html import html_page
from benchmarks.report.report_files import write_report
from benchmarks.results.result_files import merge_results

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

SECTIONS = ["answer", "latency", "missing", "accuracy", "growth", "roofline", "parts", "features", "environment"]
CHARTS = ["latency", "accuracy", "growth-image-size", "growth-batch", "roofline", "parts", "kernels"]

PHONE, SCREEN = 360, 1280

OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"

OVERLAPS = """
const found = [], own = box => [box.left, box.top, box.right, box.bottom];
for (const svg of document.querySelectorAll('svg')) {
  const frame = svg.getBoundingClientRect();
  if (!frame.width) continue;
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, own(text.getBoundingClientRect())]);
  texts.forEach(([name, [left, top, right, bottom]], index) => {
    if (left < frame.left - 1 || right > frame.right + 1 || top < frame.top - 1 || bottom > frame.bottom + 1)
      found.push(svg.getAttribute('aria-label') + ': ' + name + ' leaves the drawing');
    for (const [other, box] of texts.slice(index + 1)) {
      const wide = Math.min(right, box[2]) - Math.max(left, box[0]);
      const high = Math.min(bottom, box[3]) - Math.max(top, box[1]);
      if (wide > 1 && high > 4) found.push(svg.getAttribute('aria-label') + ': ' + name + ' over ' + other);
    }
  });
}
return found;
"""
"""Texts that leave their chart or lie over one another; a line's box is 4 pixels higher than its letters."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser for the file, with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[dev]'")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not here: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one machine with everything that a report can have."""
    return write_report(synthetic_result(gpu=True), tmp_path_factory.mktemp("report"))[2]


def opened(browser: Chrome, page: Path, width: int = SCREEN, **media: str) -> Chrome:
    """Opens a page at a width of CSS pixels."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items() if name != "media"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", ""), "features": features})
    browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def complaints(browser: Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


class Served:
    """A folder behind a server of this machine, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                asked.append(self.path)

            def log_message(self, format: str, *arguments: object) -> None:
                """Says nothing."""

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def open(self, browser: Chrome, name: str) -> tuple[list[str], list[str]]:
        """Opens a page and returns what else was asked of this server, and what the browser tried to load at all."""
        self.asked.clear()
        browser.get(f"http://127.0.0.1:{self.server.server_port}/{name}")
        told = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert self.asked[0] == f"/{name}"
        return self.asked[1:], [entry for entry in told if not entry.startswith("data:")]

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def changed(report: Path, tmp_path: Path, old: str, new: str) -> Path:
    page = tmp_path / f"changed{len(list(tmp_path.iterdir()))}.html"  # a browser may keep a page of the same name
    text = report.read_text(encoding="utf-8")
    assert old in text
    page.write_text(text.replace(old, new, 1), encoding="utf-8")
    return page


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_every_section_and_chart_is_there(browser: Chrome, report: Path, width: int) -> None:
    opened(browser, report, width)
    assert browser.title == "SAM 3 image encoder: benchmark, 2026-01-02"
    title = browser.find_element("css selector", "h1")
    assert title.location["x"] >= 12 and title.location["y"] >= 12  # the page has margins
    for section in SECTIONS:
        found = browser.find_element("id", f"{section}-m0")
        assert found.is_displayed() and found.find_element("css selector", "h2, h3").text
    for chart in CHARTS:
        figure = browser.find_element("id", f"{chart}-chart-m0")
        drawn = [one for one in figure.find_elements("css selector", ".chart, .bars") if one.is_displayed()]
        assert drawn and all(one.size["width"] > 300 and one.size["height"] > 60 for one in drawn)
        assert figure.find_element("css selector", "figcaption").text
    assert browser.find_element("css selector", "#method pre").text.startswith("neck-export bench")
    assert complaints(browser) == []


def test_the_first_screen_is_the_answer(browser: Chrome, report: Path) -> None:
    for width in (PHONE, SCREEN):
        opened(browser, report, width)
        answer = browser.find_element("id", "answer-m0")
        assert "PyTorch eager, plain, BF16" in answer.text and "latency divided by that of" in answer.text
        assert "2 of 10 backends were not measured" in answer.text
        assert answer.location["y"] + answer.size["height"] < 800


@pytest.mark.parametrize("width", [PHONE, 768, SCREEN])
def test_the_page_does_not_scroll_sideways(browser: Chrome, report: Path, width: int) -> None:
    opened(browser, report, width)
    assert browser.execute_script(OVERFLOW) == 0
    boxes = browser.find_elements("css selector", ".scroll")
    assert all(box.get_attribute("tabindex") == "0" and box.get_attribute("aria-label") for box in boxes)


def test_a_page_that_scrolls_sideways_is_seen(browser: Chrome, report: Path, tmp_path: Path) -> None:
    """The control."""
    page = changed(report, tmp_path, "<main>", f"<main><table><tr><td>{'x' * 400}</td></tr></table>")
    opened(browser, page, PHONE)
    assert browser.execute_script(OVERFLOW) > 0


SCROLLING = """
for (const details of document.querySelectorAll('details')) details.open = true;
return [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length
"""
"""How many tables are wider than their place."""


def test_every_table_fits_a_screen(browser: Chrome, report: Path) -> None:
    opened(browser, report)
    assert browser.execute_script(SCROLLING) == 0
    opened(browser, report, PHONE)
    assert browser.execute_script(SCROLLING) > 0  # the control


@pytest.mark.parametrize("width", [PHONE, SCREEN])
@pytest.mark.parametrize("seed", [0, 3])
def test_no_text_of_a_chart_lies_over_another(browser: Chrome, tmp_path: Path, width: int, seed: int) -> None:
    result = synthetic_result(seed=seed, gpu=True)
    if seed:
        result["rows"][0]["label"] += ", and a name that is longer than its place"
        result["rows"][0]["latency"]["p50_ms"] *= 90
    page = tmp_path / "report.html"
    page.write_text(html_page(result), encoding="utf-8")
    opened(browser, page, width)
    assert browser.execute_script(OVERLAPS) == []


def test_text_over_text_is_seen(browser: Chrome, report: Path, tmp_path: Path) -> None:
    """The control."""
    planted = '<text x="200" y="216">planted text</text><text x="210" y="218">over it</text><text '
    page = changed(report, tmp_path, "<text ", planted)
    opened(browser, page)
    assert any("planted text over over it" in found for found in browser.execute_script(OVERLAPS))
    page = changed(report, tmp_path, "<text ", '<text x="370" y="16">planted text</text><text ')
    opened(browser, page)
    assert any("planted text leaves" in found for found in browser.execute_script(OVERLAPS))


def test_a_planted_script_is_blocked_and_seen(browser: Chrome, report: Path, tmp_path: Path) -> None:
    """The control of the console: the policy keeps the script from running and says so."""
    page = changed(report, tmp_path, "</body>", "<script>document.title = 'ran'; planted()</script></body>")
    opened(browser, page)
    assert browser.title != "ran"
    assert any("Content Security Policy" in message for message in complaints(browser))


def test_a_planted_script_error_is_seen(browser: Chrome, report: Path, tmp_path: Path) -> None:
    """The control of the policy: without it the script runs, and its error is in the console."""
    page = changed(report, tmp_path, "</body>", "<script>document.title = 'ran'; planted()</script></body>")
    page = changed(page, tmp_path, 'http-equiv="Content-Security-Policy"', 'name="none"')
    opened(browser, page)
    assert browser.title == "ran"
    assert any("planted is not defined" in message for message in complaints(browser))


def test_nothing_is_asked_of_the_network(browser: Chrome, report: Path, tmp_path: Path) -> None:
    """With its controls: a planted image is refused by the policy, and asked for without it."""
    shutil.copy(report, tmp_path / "report.html")
    served = Served(tmp_path)
    try:
        assert served.open(browser, "report.html") == ([], [])
        page = changed(report, tmp_path, "</body>", '<img src="elsewhere.png" alt="x"></body>')
        browser.get_log("browser")
        asked, tried = served.open(browser, page.name)
        assert asked == [] and len(tried) == 1
        assert any("Content Security Policy" in message for message in complaints(browser))
        page = changed(page, tmp_path, 'http-equiv="Content-Security-Policy"', 'name="none"')
        assert served.open(browser, page.name)[0] == ["/elsewhere.png"]
    finally:
        served.close()


def test_every_chart_image_and_table_is_told_to_a_screen_reader(browser: Chrome, report: Path) -> None:
    opened(browser, report)
    drawings = browser.find_elements("css selector", "svg:not([aria-hidden=true])")
    assert len(drawings) == 4 and all(svg.get_attribute("role") == "img" for svg in drawings)
    assert all(one.get_attribute("aria-label") for one in (*drawings, *browser.find_elements("css selector", ".bars")))
    assert all(image.get_attribute("alt") for image in browser.find_elements("css selector", "img"))
    for part in browser.find_elements("css selector", "section:has(h2, h3), article"):
        assert browser.find_element("id", part.get_attribute("aria-labelledby")).text
    for table in browser.find_elements("css selector", "table"):
        assert table.find_elements("css selector", "caption")
        scopes = [head.get_attribute("scope") for head in table.find_elements("css selector", "th")]
        assert {"col", "row"} == set(scopes)
    levels = [int(head.tag_name[1]) for head in browser.find_elements("css selector", "h1, h2, h3, h4")]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colors such as `rgb(1, 2, 3)`."""

    def luminance(color: str) -> float:
        values = [int(value) / 255 for value in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: Chrome, report: Path, scheme: str) -> None:
    opened(browser, report, prefers_color_scheme=scheme)
    page = browser.find_element("css selector", "body").value_of_css_property("background-color")
    assert contrast(page, "rgb(255, 255, 255)") < 1.1 if scheme == "light" else contrast(page, "rgb(0, 0, 0)") < 1.3
    for selector in ("h1", ".about", "figcaption", "td", "tr.warned td", "thead th", ".pairs dt", "pre", ".caution"):
        color = browser.find_element("css selector", selector).value_of_css_property("color")
        assert contrast(color, page) >= 4.5, selector
    for selector in (".chart text", ".chart .value"):
        color = browser.find_element("css selector", selector).value_of_css_property("fill")
        assert contrast(color, page) >= 4.5, selector
    for selector in (".bar.fp32", ".bar.bf16", ".bar.fp16"):  # shapes; 3 for what is no text, FP16's orange is 2.9
        color = browser.find_element("css selector", selector).value_of_css_property("fill")
        assert contrast(color, page) >= 2.8, selector


def test_paper_shows_every_table_on_white(browser: Chrome, report: Path) -> None:
    opened(browser, report, media="print", prefers_color_scheme="dark")
    body = browser.find_element("css selector", "body")
    assert contrast(body.value_of_css_property("background-color"), "rgb(255, 255, 255)") == 1
    assert not browser.find_element("css selector", "nav").is_displayed()
    closed = browser.find_elements("css selector", "details:not([open]) table")
    assert closed and all(table.size["height"] > 100 for table in closed)


def test_a_report_of_two_machines_and_one_without_rows_open(browser: Chrome, tmp_path: Path) -> None:
    empty = synthetic_result()
    empty["rows"], empty["features"] = [], None
    for result in (merge_results([synthetic_result(gpu=True), synthetic_result(1)]), empty):
        page = write_report(result, tmp_path)[2]
        opened(browser, page, PHONE)
        assert len(browser.find_elements("css selector", ".answer")) == len(result["machines"])
        assert browser.execute_script(OVERFLOW) == 0 and browser.execute_script(OVERLAPS) == []
        assert complaints(browser) == []


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_many_close_backends_are_told_apart(browser: Chrome, tmp_path: Path, width: int) -> None:
    result = synthetic_result(gpu=True)
    measured = [row for row in result["rows"] if row["status"] == "measured" and row["sweep"] is None]
    for index in range(10):
        row = copy.deepcopy(measured[index % 7])
        row |= {"backend": f"{row['backend']}-{index}", "label": f"{row['label']}, number {index}"}
        row["latency"]["p50_ms"] *= 1 + index / 50
        result["rows"].append(row)
    page = tmp_path / "report.html"
    page.write_text(html_page(result), encoding="utf-8")
    opened(browser, page, width)
    assert browser.execute_script(OVERLAPS) == []
