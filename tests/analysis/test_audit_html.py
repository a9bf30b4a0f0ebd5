"""The audit's page in a real browser: whole, silent, offline, usable from the keyboard, inert."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from audits import HOSTILE, make_audit
from peft_fsrl.analysis import Audit, Setting
from peft_fsrl.analysis.plots import draw_audit
from peft_fsrl.analysis.rendering import render_audit_html, render_card_section
from peft_fsrl.analysis.rendering.formats import between, signed_seen
from peft_fsrl.analysis.report import render_audit
from peft_fsrl.records import Interval

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class Outline(HTMLParser):
    """Ids, links to them, and tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name in ("href", "src", "xlink:href"):
                if str(value).startswith("#"):
                    self.targets.append(str(value)[1:])
                else:
                    self.addresses.append(str(value))


@pytest.fixture(scope="module")
def page_of_all() -> str:
    audit = make_audit()
    return render_audit_html(audit, draw_audit(audit))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens HTML from disk; fails if the page says anything or asks the network for anything."""
    said: list[str] = []
    pages = []

    def open_html(text: str, **context: Any) -> Any:
        path = tmp_path / f"audit-{len(pages)}.html"
        path.write_text(text, "utf-8")
        page = browser.new_page(**context)
        pages.append(page)
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))

        def requested(request: Any) -> None:
            if request.url not in (path.as_uri(), "data:,"):
                said.append(f"request: {request.url}")

        page.on("request", requested)
        page.goto(path.as_uri())
        return page

    yield open_html
    for page in pages:
        page.close()
    assert said == []


def test_the_page_is_one_file_and_whole(page_of_all: str) -> None:
    outline = Outline(page_of_all)
    assert len(outline.ids) == len(set(outline.ids)), "an id stands twice"
    assert set(outline.targets) <= set(outline.ids)
    outside = {each for each in outline.addresses if not each.startswith("data:")}
    assert all(each.startswith("https://www.neuronpedia.org/") for each in outside)
    assert not {"iframe", "img", "object", "embed", "form"} & set(outline.tags)
    assert outline.tags.count("script") == 2, "the data and the page's own script"
    assert outline.tags.count("h1") == 1
    for figure in ("rank_frequencies", "static_dynamic", "curves"):
        assert figure in draw_audit(make_audit())
    assert page_of_all.count('class="plot"') == 3


def test_figures_follow_the_theme(page_of_all: str) -> None:
    plots = re.findall(r'<svg class="plot".*?</svg>', page_of_all, flags=re.DOTALL)
    for plot in plots:
        assert "var(--series-1)" in plot
        assert "currentColor" in plot
        assert not re.search(r"#000000|#ffffff|#c2571a", plot)
        assert "<text" in plot, "words, not outlines"


def test_every_figure_of_the_verdict_is_there(page_of_all: str) -> None:
    audit = make_audit()
    for finding in audit.findings:
        assert finding.answer in page_of_all
    assert f"{audit.base.loss:.3f}" in page_of_all
    assert f"{audit.trained.loss:.3f}" in page_of_all
    assert audit.info.fingerprint in page_of_all


def test_parts_without_data_say_why() -> None:
    from dataclasses import replace

    bare = replace(
        make_audit(),
        coherence=(),
        concentration=None,
        compositions=(),
        magnitudes=(),
        ablations=(),
        single=None,
        static_dynamic=None,
        mirror=None,
        generations=(),
        promoted=(),
        suppressed=(),
        agreements=(),
        robustness=(),
        curves=None,
        rank_frequencies=(),
        label_source=None,
        notes=(Setting("ablations", "Nobody labeled <anything>."),),
    )
    page = render_audit_html(bare, draw_audit(bare))
    assert "Nobody labeled &lt;anything&gt;." in page
    assert page.count('class="absent"') == 10
    assert Outline(page).tags.count("section") == 14


@needs_browser
def test_hovering_or_focusing_a_token_shows_its_features(
    open_page: Callable[..., Any], page_of_all: str
) -> None:
    page = open_page(page_of_all)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    tokens = page.locator("details[open] .token")
    first = tokens.nth(0)
    features = re.findall(r"(\d+):", first.get_attribute("data-steered"))
    first.hover()
    assert tip.is_visible()
    assert [row.split("\t")[0] for row in tip.locator("tr").all_inner_texts()] == features
    assert "bold words and lists (style)" in tip.inner_text() or "topic" in tip.inner_text()
    page.locator("h1").hover()
    assert tip.is_hidden()

    first.focus()
    assert tip.is_visible()
    assert first.get_attribute("aria-describedby") == "tip"
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("token => token === document.activeElement")
    assert first.get_attribute("aria-describedby") is None
    page.keyboard.press("Tab")
    assert tokens.nth(2).evaluate("token => token === document.activeElement")
    page.keyboard.press("Escape")
    assert tip.is_hidden()


@needs_browser
def test_the_tip_stays_inside_a_narrow_window(
    open_page: Callable[..., Any], page_of_all: str
) -> None:
    page = open_page(page_of_all, viewport={"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    tokens = page.locator("details[open] .token")
    for number in range(0, tokens.count(), 7):
        tokens.nth(number).focus()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


@needs_browser
def test_everything_can_be_reached_from_the_keyboard(
    open_page: Callable[..., Any], page_of_all: str
) -> None:
    page = open_page(page_of_all)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
    closed = page.locator("#ablations summary")
    assert not closed.evaluate("summary => summary.parentElement.open")
    closed.focus()
    page.keyboard.press("Enter")
    assert closed.evaluate("summary => summary.parentElement.open")
    outline = closed.evaluate("summary => getComputedStyle(summary).outlineStyle")
    assert outline == "solid", "focus must be seen"


@needs_browser
def test_light_dark_and_back(open_page: Callable[..., Any], page_of_all: str) -> None:
    page = open_page(page_of_all, color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(shade)
    button = page.locator("#theme")
    button.click()
    assert "light" in button.inner_text()
    light = page.evaluate(shade)
    assert light != dark
    button.click()
    assert page.evaluate(shade) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(shade) == dark, "chosen by hand"
    button.click()
    assert page.evaluate(shade) == light


def luminance(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_paper(
    open_page: Callable[..., Any], page_of_all: str, scheme: str
) -> None:
    page = open_page(page_of_all, color_scheme=scheme)
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    places = ("p", ".meta", "caption", ".badge", "a[href^=https]", ".contents a", ".card h4 .n")
    for place in places:
        color = page.locator(place).first.evaluate("e => getComputedStyle(e).color")
        ratio = sorted([paper + 0.05, luminance(color) + 0.05])
        assert ratio[1] / ratio[0] >= 4.5, (place, color)


@needs_browser
def test_print_shows_everything_and_no_controls(
    open_page: Callable[..., Any], page_of_all: str
) -> None:
    page = open_page(page_of_all)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#theme").is_hidden()
    assert page.locator("nav").is_hidden()
    white = luminance("rgb(255, 255, 255)")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgba(0, 0, 0, 0)" or luminance(paper) == white
    assert luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.05
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert page.pdf().startswith(b"%PDF")


@needs_browser
def test_nothing_that_an_audit_carries_can_act(open_page: Callable[..., Any]) -> None:
    audit = make_audit(text=HOSTILE)
    page = open_page(render_audit_html(audit, draw_audit(audit)))
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert "{{ 7*7 }}" in page.locator("h1").inner_text()
    assert "</script>" in page.locator("h1").inner_text()
    token = page.locator("details[open] .token").first
    token.hover()
    tip = page.locator("#tip")
    assert "<script>" in tip.inner_text()
    assert tip.locator("script, img").count() == 0
    assert page.evaluate("window.pwned") is None


@needs_browser
def test_the_policy_stops_what_would_get_through(
    open_page: Callable[..., Any], browser: Any, page_of_all: str, tmp_path: Path
) -> None:
    injected = page_of_all.replace(
        "</h1>", "</h1><script>window.pwned = 1</script><img src='https://example.org/x.png'>", 1
    )
    path = tmp_path / "injected.html"
    path.write_text(injected, "utf-8")
    page = browser.new_page()
    sent: list[str] = []
    # The browser reports the attempt; what it may not do is to finish it.
    page.on("response", lambda response: sent.append(response.url))
    page.goto(path.as_uri())
    assert page.evaluate("window.pwned") is None
    assert sent in ([], [path.as_uri()], [path.as_uri(), "data:,"])
    page.close()


@needs_browser
def test_a_megabyte_without_a_space_does_not_stall_the_page(open_page: Callable[..., Any]) -> None:
    audit = make_audit(text="x" * 1_000_000)
    text = render_audit_html(audit, draw_audit(audit))
    assert len(text) < 30_000_000, "it stands in more than a thousand places"
    assert "(990,000 more characters)" in text
    # Browser and test wait for thirty seconds.
    assert open_page(text).evaluate("document.body.offsetHeight") > 0


def test_half_a_character_stops_neither_page_nor_text(tmp_path: Path) -> None:
    audit = make_audit(text="half \ud800 and \x1b[31m \x9b31m")
    for render in (render_audit_html, render_audit, render_card_section):
        text = render(audit)
        text.encode()
        assert "half \ufffd and" in " ".join(text.replace("\\", "").split())
        assert not re.search("[\x1b\x9b]", text)


def test_links_lead_to_https_only() -> None:
    from dataclasses import replace

    audit = make_audit()
    card = replace(audit.promoted[0], url="javascript:alert(1)")
    page = render_audit_html(replace(audit, promoted=(card,), suppressed=()))
    assert "javascript:" not in page


@needs_browser
def test_the_example_in_the_documentation(open_page: Callable[..., Any]) -> None:
    path = Path(__file__).parents[2] / "docs" / "examples" / "organism_audit.html"
    text = path.read_text("utf-8")
    assert len(text) < 1_000_000
    page = open_page(text)
    assert page.locator(".finding").count() == 5
    page.locator("details[open] .token").first.hover()
    assert page.locator("#tip").is_visible()


def wide_audit() -> Audit:
    """What an adapter on an SAE of 65,536 features leaves, with the defaults of the command."""
    return make_audit(d_sae=65_536, n_pairs=2000, n_features=200, n_generations=4)


def test_a_wide_sae_gives_a_small_page() -> None:
    audit = wide_audit()
    assert len(render_audit_html(audit, draw_audit(audit)).encode()) < 5_000_000


@needs_browser
def test_a_wide_sae_gives_a_page_that_opens(open_page: Callable[..., Any]) -> None:
    audit = wide_audit()
    page = open_page(render_audit_html(audit, draw_audit(audit)))
    assert page.locator("section").count() == 14
    assert page.locator("#known").evaluate("e => Object.keys(JSON.parse(e.textContent)).length") > 0


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (-3.2e-6, "\N{MINUS SIGN}3e\N{MINUS SIGN}06"),
        (4.9e-5, "+5e\N{MINUS SIGN}05"),
        (5.1e-5, "+0.0001"),
        (0.0, "+0.0000"),
        (-0.5, "\N{MINUS SIGN}0.5000"),
        (float("nan"), "\N{EN DASH}"),
    ],
)
def test_what_is_not_zero_does_not_look_it(value: float, seen: str) -> None:
    assert signed_seen(value, 4) == seen
    assert between(Interval(value, value, value), "seen", 4) == f"{seen} [{seen}, {seen}]"
