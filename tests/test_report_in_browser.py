"""Claims about the report in a real browser: it fits, asks for nothing, runs nothing, and can be read by all."""

import itertools

import pytest

from tests.browser import Browser
from tests.reporting import HOSTILE, train_two, write_hostile_shards, written
from tests.track.conftest import write_run

OVERFLOWING = """[...document.querySelectorAll('body *')].filter(element =>
    !element.closest('.scroll') && element.getBoundingClientRect().right > innerWidth + 0.5
).map(element => element.outerHTML.slice(0, 80))"""
TEXTS_OUTSIDE = """[...document.querySelectorAll('svg text')].filter(text => {
    const inner = text.getBoundingClientRect(), outer = text.closest('svg').getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
}).map(text => text.textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    """Reports of every kind: one real run, two beside each other, a long one with many restarts, one without rows."""
    shards = write_hostile_shards(tmp_path_factory.mktemp("shards"))
    runs = train_two(shards, tmp_path_factory.mktemp("runs"))
    folder = tmp_path_factory.mktemp("reports") / HOSTILE.replace("/", "")
    folder.mkdir()
    restarts = [(1 + i // 3, i % 3, 90 * i) for i in range(1, 9)]
    long = write_run(folder / ("long" * 30), epochs=100, epochs_done=100, restarts=restarts)
    empty = write_run(folder / "empty", epochs_done=0)
    made = {"one": [runs / "gated"], "two": [runs / "gated", runs / "full"], "long": [long], "empty": [empty]}
    for name, folders in made.items():
        written(*folders, "--out", folder / f"{name}.html")
    return folder


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["one", "two", "long", "empty"])
def test_the_page_fits_its_window_and_asks_for_nothing(pages, browser, name, width):
    page = browser.open(pages / f"{name}.html", width)
    page.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.value("document.documentElement.scrollWidth") <= page.value("innerWidth") == width
    assert page.value(OVERFLOWING) == []
    assert page.value(TEXTS_OUTSIDE) == []
    assert page.errors == []
    asked = [url for url in page.requests if not url.startswith("data:image/jpeg;base64,")]
    assert asked == [(pages / f"{name}.html").as_uri()]
    assert page.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_no_name_of_a_file_becomes_markup(pages, browser):
    page = browser.open(pages / "two.html", 1280)
    assert page.value("document.querySelectorAll('script, [onerror], img:not([src^=\"data:image/jpeg\"])').length") == 0
    assert page.value("document.title") == "Report: gated and full", "nothing ran"
    names = page.value("[...document.querySelectorAll('.thumbs figcaption')].map(caption => caption.textContent)")
    assert len(names) >= 48 and all(name.count(HOSTILE) == 2 for name in names), "class and key, each as it is"


def test_the_page_can_be_read_without_seeing_it(pages, browser):
    page = browser.open(pages / "two.html", 390)
    levels = page.value("[...document.querySelectorAll('h1, h2, h3, h4')].map(heading => +heading.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert (
        page.value("document.querySelectorAll('img:not([alt]), th:not([scope]), table:not(:has(caption))').length") == 0
    )
    assert page.value("document.querySelectorAll('svg:not([aria-hidden]):not([role=img][aria-label])').length") == 0
    assert page.value("document.documentElement.lang") == "en"
    ids = page.value("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(set(ids)) == len(ids)
    targets = page.value("[...document.querySelectorAll('nav a')].map(link => link.hash.slice(1))")
    assert targets and set(targets) <= set(ids)


CONTRAST = """(() => {
    const light = text => { const parts = text.match(/[\\d.]+/g).slice(0, 3).map(value => {
        const share = value / 255; return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4 });
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const of = color => { const own = light(color);
        return (Math.max(own, paper) + 0.05) / (Math.min(own, paper) + 0.05) };
    const texts = [...document.querySelectorAll('p, dt, dd, a, th, summary')].map(e => of(getComputedStyle(e).color));
    const lines = [...document.querySelectorAll('.line')].map(e => of(getComputedStyle(e).stroke));
    return [Math.min(...texts), Math.min(...lines)] })()"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_lines_stand_out_in_the_light_and_in_the_dark(pages, browser, dark):
    texts, lines = browser.open(pages / "one.html", 1280, dark=dark).value(CONTRAST)
    assert texts >= 4.5 and lines >= 3, "the contrasts that WCAG 2.2 asks for"
