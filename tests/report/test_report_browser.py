"""The page in a browser: nothing fails or is fetched, keys reach everything, nothing is cut on screen or paper.

Every check is a function that lists complaints; each is tried on a page that deserves one.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from chromium import CHROMIUM, NAMES, Chromium, Tab
from example_release import PRIVATE, distilled_set, full_diagnostic_report, moments
from test_report_page import rendered, report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")

PHONE, DESK, PAPER = 390, 1280, 680  # CSS pixels; A4 less its margins is 180 mm


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    started = Chromium(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


@pytest.fixture
def broken(browser: Chromium, tmp_path: Path) -> Iterator[Callable[[str], Tab]]:
    """Opens a page for one test."""
    tabs: list[Tab] = []

    def open_page(source: str) -> Tab:
        file = tmp_path / "page.html"
        file.write_text(source, encoding="utf-8")
        tabs.append(Tab(browser, file))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        tab.close()


@pytest.fixture(scope="module")
def opened(browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tab]:
    """Opens a page of the report, once."""
    tabs: dict[str, Tab] = {}

    def open_page(name: str) -> Tab:
        if name not in tabs:
            file = tmp_path_factory.mktemp("page") / "report.html"
            file.write_text(PAGES[name](), encoding="utf-8")
            tabs[name] = Tab(browser, file)
        return tabs[name]

    return open_page


# -- checks ----------------------------------------------------------------------------------------------------


def console(tab: Tab) -> list[str]:
    """What the page complained of while it loaded."""
    said = [call["type"] for call in tab.events("Runtime.consoleAPICalled")]
    thrown = [found["exceptionDetails"]["text"] for found in tab.events("Runtime.exceptionThrown")]
    return [*said, *thrown, *(entry["entry"]["text"] for entry in tab.events("Log.entryAdded"))]


def fetched(tab: Tab) -> list[str]:
    """Everything that was asked for but the page and what it holds itself."""
    asked = [request["request"]["url"] for request in tab.events("Network.requestWillBeSent")]
    assert tab.url in asked, "the browser's own record is at work"
    return [url for url in asked if url != tab.url and not url.startswith("data:")]


DESCRIBE = """const named = e =>
  `${e.tagName} ${e.className} ${e.getAttribute('aria-label') || e.textContent}`.slice(0, 90);"""
SCROLLS = """const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)
  && e.scrollWidth > e.clientWidth + 1;"""


def too_wide(tab: Tab, width: int, media: str = "screen") -> list[str]:
    """What lies beyond the page, but for the inside of what can be scrolled."""
    tab.look(width=width, media=media)
    return tab.run(
        DESCRIBE
        + SCROLLS
        + """
        const inside = e => { for (let p = e.parentElement; p; p = p.parentElement) if (scrolls(p)) return true; };
        const out = [...document.querySelectorAll('body *')].filter(e => {
          const box = e.getBoundingClientRect();
          return box.width && (box.right > innerWidth + 1 || (box.left < -1 && !e.matches('.skip'))) && !inside(e);
        });
        if (document.documentElement.scrollWidth > innerWidth) out.push(document.documentElement);
        return out.map(named);"""
    )


def keyboard(tab: Tab) -> list[str]:
    """What keys do not reach, do not show or do not name; on a phone's width, where tables scroll."""
    tab.look(width=PHONE)
    tab.load()
    wanted = tab.run(
        DESCRIBE
        + SCROLLS
        + """
        window.wanted = [...document.querySelectorAll('body *')].filter(e => e.matches('a[href]') || scrolls(e));
        window.reached = new Set();
        return window.wanted.filter(e => scrolls(e)).length;"""
    )
    complaints = [] if wanted else ["nothing scrolls at this width: the check shows nothing"]
    for _ in range(tab.run("return document.querySelectorAll('body *').length;")):
        tab.press("Tab")
        found = tab.run(
            DESCRIBE
            + """
            const e = document.activeElement;
            if (e === document.body || window.reached.has(e)) return null;
            window.reached.add(e);
            const style = getComputedStyle(e), box = e.getBoundingClientRect(), found = [];
            if (style.outlineStyle === 'none' || style.outlineWidth === '0px') found.push('unseen: ' + named(e));
            if (box.right < 0 || box.bottom < 0 || box.left > innerWidth || box.top > innerHeight)
              found.push('out of sight: ' + named(e));
            if (!e.matches('a') && !(e.getAttribute('role') && e.getAttribute('aria-label')))
              found.push('nameless: ' + named(e));
            return found;"""
        )
        if found is None:
            break
        complaints += found
    missed = tab.run(DESCRIBE + "return window.wanted.filter(e => !window.reached.has(e)).map(named);")
    return complaints + [f"not reached: {one}" for one in missed]


def skip_link(tab: Tab) -> list[str]:
    """Whether the first key offers to skip the contents, and then does."""
    tab.load()
    tab.press("Tab")
    first = tab.run("const e = document.activeElement; return [e.className, e.getAttribute('href') || ''];")
    if first[0] != "skip":
        return ["the first stop is no skip link"]
    tab.press("Enter")
    tab.press("Tab")
    inside = tab.run("return document.querySelector('main').contains(document.activeElement);")
    return [] if inside else [f"{first[1]} does not lead into the main part"]


def structure(tab: Tab) -> list[str]:
    """What a screen reader would stumble over, from the tree that it is given."""
    nodes = tab.read_aloud()
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "").strip(), node) for node in nodes]
    complaints = [
        f"nameless {role}" for role, name, _ in roles if role in ("image", "region", "link", "table") and not name
    ]
    levels = [
        value["value"]["value"]
        for role, _, node in roles
        if role == "heading"
        for value in node["properties"]
        if value["name"] == "level"
    ]
    if levels[:1] != [1] or levels.count(1) != 1:
        complaints.append(f"headings begin with {levels[:1]} and have {levels.count(1)} of level 1")
    complaints += [f"heading of level {two} after {one}" for one, two in pairwise(levels) if two > one + 1]
    names = [name for role, name, _ in roles if role == "region"]
    complaints += sorted({f"two regions {name!r}" for name in names if names.count(name) > 1})
    if [role for role, _, _ in roles].count("main") != 1 or not tab.run("return document.documentElement.lang;"):
        complaints.append("no main part or no language")
    return complaints


def contrast(tab: Tab, scheme: str) -> list[str]:
    """Text that is hard to read: WCAG 2.2, 1.4.3 (4.5 to 1; 3 to 1 where it is large)."""
    tab.look(width=DESK, scheme=scheme)
    return tab.run(
        DESCRIBE
        + """
        const parts = text => (text.match(/[\\d.]+/g) || []).map(Number);
        const light = rgb => rgb.slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = e => {
          for (let p = e; p; p = p.parentElement) {
            const rgb = parts(getComputedStyle(p).backgroundColor);
            if (rgb.length && (rgb.length < 4 || rgb[3] > 0)) return rgb;
          }
          return [255, 255, 255];
        };
        const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = new Set();
        for (let n = walk.nextNode(); n; n = walk.nextNode()) {
          const e = n.parentElement;
          if (!n.data.trim() || e.matches('title, style')) continue;
          const style = getComputedStyle(e), size = parseFloat(style.fontSize);
          const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
          const ink = light(parts(e.closest('svg') ? style.fill : style.color)), ground = light(behind(e));
          const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
          if (ratio < (large ? 3 : 4.5)) found.add(named(e));
        }
        return [...found];"""
    )


def paper(tab: Tab) -> list[str]:
    """What would be cut on A4: too wide for the page, or apart on two of them."""
    complaints = too_wide(tab, PAPER, media="print")
    return complaints + tab.run(
        DESCRIBE
        + SCROLLS
        + """
        const whole = [...document.querySelectorAll('tr, img, svg, figure, .stage, .attack, .plot')];
        const apart = whole.filter(e => getComputedStyle(e).breakInside !== 'avoid')
          .map(e => 'may be cut: ' + named(e));
        const cut = [...document.querySelectorAll('body *')].filter(scrolls)
          .map(e => 'scrolls on paper: ' + named(e));
        const joined = [...document.querySelectorAll('main > section')].slice(1, -1)
          .filter(e => getComputedStyle(e).breakBefore !== 'page').map(e => 'begins on no new page: ' + e.id);
        return [...apart, ...cut, ...joined];"""
    )


def printed(tab: Tab) -> list[str]:
    """Whether it prints on several pages of A4 with a tree of its structure in it."""
    pdf = base64.b64decode(tab.send("Page.printToPDF", preferCSSPageSize=True, generateTaggedPDF=True)["data"])
    boxes = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox\s*\[([^\]]*)\]", pdf)}
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    complaints = [] if pages > 1 else [f"{pages} page"]
    if not all(abs(w - 595) < 1.5 and abs(h - 842) < 1.5 for _, _, w, h in boxes) or not boxes:
        complaints.append(f"not A4: {boxes}")
    return complaints if b"/StructTreeRoot" in pdf else [*complaints, "not tagged"]


# -- the report ------------------------------------------------------------------------------------------------

LONG = tuple(
    f"{part}_thickening_with_calcification" for part in ("pleural", "septal", "bronchial", "hilar", "nodal")
)


@cache
def long_names() -> str:
    distilled = distilled_set(LONG, ipc=2, size=12, privacy=PRIVATE)
    command = "medistill run configs/" + "a_long_name_without_any_space_" * 8 + ".yaml"
    found = full_diagnostic_report(distilled)
    return report(distilled, diagnosis=found, commands=(command,), moments=moments(distilled))


PAGES: dict[str, Callable[[], str]] = {
    "everything": lambda: rendered("everything measured, three classes"),
    "long names": long_names,
    "warnings": lambda: rendered("starts from real, invalid, forced"),
    "nothing measured": lambda: rendered("nothing measured"),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_loads_without_a_complaint_and_fetches_nothing(name: str, opened: Callable[[str], Tab]) -> None:
    tab = opened(name)
    assert console(tab) == []
    assert fetched(tab) == []


@pytest.mark.parametrize("name", PAGES)
def test_nothing_lies_beyond_the_page(name: str, opened: Callable[[str], Tab]) -> None:
    tab = opened(name)
    assert too_wide(tab, PHONE) == []
    assert too_wide(tab, DESK) == []
    assert paper(tab) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_screen_reader_is_told_everything(name: str, opened: Callable[[str], Tab]) -> None:
    assert structure(opened(name)) == []


def test_keys_reach_everything_and_show_where_they_are(opened: Callable[[str], Tab]) -> None:
    tab = opened("everything")
    assert keyboard(tab) == []
    assert skip_link(tab) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme: str, opened: Callable[[str], Tab]) -> None:
    tab = opened("everything")
    assert contrast(tab, scheme) == []
    dark = tab.run("return getComputedStyle(document.body).backgroundColor;")
    assert (dark == "rgb(18, 22, 29)") is (scheme == "dark")


def test_it_prints_on_several_pages(opened: Callable[[str], Tab]) -> None:
    assert printed(opened("everything")) == []


# -- pages that deserve a complaint ----------------------------------------------------------------------------

HEAD = '<!DOCTYPE html><html lang="en"><head><title>Broken</title></head><body>'
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'">"""
WIDE = '<div style="width:900px">wide</div>'


def scroller(attributes: str = 'role="region" tabindex="0" aria-label="Table"') -> str:
    return f'{HEAD}<main><h1>x</h1><div style="overflow-x:auto" {attributes}>{WIDE}</div></main>'


BROKEN: dict[str, tuple[Callable[[Tab], list[str]], str, str]] = {
    "script fails": (console, f"{HEAD}<script>throw new Error('broken')</script>", "Uncaught"),
    "something is refused": (console, f'{HEAD}{POLICY}<img src="x.png" alt="x">', "Content Security Policy"),
    "picture from elsewhere": (fetched, f'{HEAD}<img src="http://127.0.0.1:9/x.png" alt="x">', "127.0.0.1:9"),
    "second file": (fetched, f'{HEAD}<link rel="stylesheet" href="style.css">', "style.css"),
    "too wide": (lambda tab: too_wide(tab, PHONE), f"{HEAD}{WIDE}", "wide"),
    "not reached": (keyboard, scroller('role="region" tabindex="-1" aria-label="Table"'), "not reached: DIV"),
    "nameless stop": (keyboard, scroller('tabindex="0"'), "nameless: DIV"),
    "unseen focus": (keyboard, scroller() + "<style>* { outline: none !important }</style>", "unseen: DIV"),
    "nothing scrolls": (keyboard, f"{HEAD}<main>x</main>", "shows nothing"),
    "no skip link": (skip_link, f'{HEAD}<a href="#x">x</a><main id="x"></main>', "no skip link"),
    "skip to nowhere": (
        skip_link,
        f'{HEAD}<a class="skip" href="#y">x</a><a href="#z">z</a><main><a href="#z">z</a></main>',
        "#y does not lead",
    ),
    "picture without words": (structure, f'{HEAD}<main><h1>x</h1><svg role="img"></svg></main>', "nameless image"),
    "level left out": (structure, f"{HEAD}<main><h1>x</h1><h3>y</h3></main>", "heading of level 3 after 1"),
    "two titles": (structure, f"{HEAD}<main><h1>x</h1><h1>y</h1></main>", "2 of level 1"),
    "no main part": (structure, f"{HEAD}<h1>x</h1>", "no main part"),
    "grey on grey": (lambda tab: contrast(tab, "light"), f'{HEAD}<p style="color:#aaa">faint</p>', "faint"),
    "table cut on paper": (paper, f"{HEAD}<table><tr><td>{WIDE}</td></tr></table>", "wide"),
    "row on two pages": (paper, f"{HEAD}<table><tr><td>x</td></tr></table>", "may be cut: TR"),
    "scrolls on paper": (paper, scroller(), "scrolls on paper: DIV"),
    "one page": (printed, f"{HEAD}<p>x</p>", "1 page"),
    "other paper": (printed, f"{HEAD}<style>@page {{ size: A5 }}</style><p>x</p>", "not A4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_complains_of_a_broken_page(name: str, broken: Callable[[str], Tab]) -> None:
    check, source, expected = BROKEN[name]
    assert any(expected in complaint for complaint in check(broken(source)))
