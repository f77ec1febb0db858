"""A report in a browser: on a phone and on a desktop, light and dark, complete and without network access."""

import shutil

import pytest

from tests.helpers.reports import copies

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra [test]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

SECTIONS = (
    "summary", "accuracy", "density", "time", "classes", "images", "filters", "training", "corruptions", "reproduce",
)  # fmt: skip


@pytest.fixture(scope="module")
def address(program, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browsed")
    program.run("report", *copies(tiny_run[0], folder), f"--out={folder / 'out'}")
    return (folder / "out" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(address, browser):
    """Opens the page at a width with everything unfolded; returns it, its console messages and its requests."""

    def opened(width: int, scheme: str = "light"):
        size = {"width": width, "height": 800}
        page = browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.wait_for_load_state("networkidle")
        return page, said, [url for url in asked if not url.startswith("data:")]

    yield opened
    for context in browser.contexts:
        context.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_complete_at_any_width(opened, address, width):
    page, said, asked = opened(width)
    assert said == []
    assert asked == [address]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    images = page.evaluate("Array.from(document.images, image => [image.alt, image.naturalWidth, image.clientWidth])")
    assert len(images) > 30
    assert [alt for alt, natural, shown in images if not (natural and shown)] == []
    assert all(page.locator(f"h2#{name}").is_visible() for name in SECTIONS)
    # What is wider than the page scrolls in a box of its own.
    boxes = "x => [x.scrollWidth, x.closest('.plot, .scroll, pre') !== null]"
    found = page.evaluate(f"Array.from(document.querySelectorAll('img, table, pre'), {boxes})")
    assert all(boxed for size, boxed in found if size > width)
    assert width > 400 or any(size > width for size, _ in found)


def test_a_dark_page_is_dark(opened):
    colors = {}
    for scheme in ("light", "dark"):
        page, said, _ = opened(1280, scheme)
        assert said == []
        colors[scheme] = page.evaluate(
            "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"
        )
    (light_page, light_ink), (dark_page, dark_ink) = (map(sum, colors[scheme]) for scheme in ("light", "dark"))
    assert light_page > 600 > 300 > light_ink
    assert dark_page < 300 < 600 < dark_ink


def test_links_lead_to_their_sections(opened):
    page, _, _ = opened(1280)
    names = page.evaluate("Array.from(document.querySelectorAll('nav a'), link => link.hash.slice(1))")
    assert tuple(names) == SECTIONS
    page.click("nav a[href='#reproduce']")
    assert page.evaluate("document.getElementById('reproduce').getBoundingClientRect().top < innerHeight")
