"""The page in a real browser, wide and narrow, by pointer and by keyboard."""

import base64
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import jpeg, tone
from test_serve import HOSTILE, index, model, served  # noqa: F401

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no chromium"),
]
SIZES = {"wide": {"width": 1280, "height": 860}, "narrow": {"width": 400, "height": 800}}
WAIT = 30_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def browser():
    fakes = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *fakes])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(index, model):  # noqa: F811
    """The service; its map is made by t-SNE in a thread, since a process of its own takes long to begin."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setitem(sys.modules, "umap", None)
        with served(index, model, timeout=60.0) as (port, service):
            service.map.pool = pool
            yield f"http://localhost:{port}"


class Visit:
    """A browser at the page that notes what must not be: errors, dialogs, requests to other hosts."""

    def __init__(self, browser, address: str, size: str, **settings):
        self.address = address
        self.context = browser.new_context(viewport=SIZES[size], permissions=["microphone"], **settings)
        self.context.set_default_timeout(WAIT)
        self.wrong: list[str] = []
        self.context.on("request", self._look)
        self.context.on("page", self._listen)
        self.page = self.context.new_page()

    def _look(self, request) -> None:
        if not request.url.startswith((self.address, "blob:")):
            self.wrong.append(f"asked for {request.url}")

    def _listen(self, page) -> None:
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()
        assert not self.wrong

    def open(self, path: str = "/"):
        self.page.goto(self.address + path)
        return self.page

    def drop(self, name: str, kind: str, data: bytes) -> None:
        """Drops a file on the page."""
        make = """([name, type, data]) => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0)), carried = new DataTransfer();
            carried.items.add(new File([bytes], name, { type }));
            return carried;
        }"""
        carried = self.page.evaluate_handle(make, [name, kind, base64.b64encode(data).decode()])
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event("body", event, {"dataTransfer": carried})


def found(page, kind: str = "image"):
    return page.locator(f"#{kind} .card")


def settle(page) -> None:
    expect(page.locator("#status")).to_contain_text(" ms.", timeout=WAIT)
    expect(page.locator("body")).not_to_have_class("busy", timeout=WAIT)


def shown(page) -> list[str]:
    return page.locator("#found .card").evaluate_all("cards => cards.map(card => card.dataset.id)")


@pytest.mark.parametrize("size", SIZES)
def test_a_visit(browser, address, size):
    with Visit(browser, address, size) as visit:
        page = visit.open()
        expect(page.locator("#begin .card").first).to_be_visible(timeout=WAIT)
        page.get_by_label("Search for").fill("a red square -blue")
        page.get_by_role("button", name="Search", exact=True).click()
        settle(page)
        for kind in ("image", "audio", "text"):
            expect(found(page, kind).first).to_be_visible()
        assert "q=a+red+square+-blue" in page.url
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        pictures = page.locator("#image img")
        expect(pictures.first).to_have_js_property("complete", True)
        assert pictures.first.evaluate("picture => picture.naturalWidth") > 0
        expect(found(page).first.locator(".percent")).to_contain_text("nearer than")
        wanted = shown(page)

        sound = page.locator("#audio audio").first  # it is played
        sound.scroll_into_view_if_needed()
        sound.click(position={"x": 20, "y": 20})
        until = time.monotonic() + WAIT / 1000
        while not sound.evaluate("player => player.currentTime > 0") and time.monotonic() < until:
            page.wait_for_timeout(50)
        assert sound.evaluate("player => player.currentTime > 0 && player.error === null")

        other = visit.context.new_page()  # the link finds the same
        other.goto(page.url)
        settle(other)
        assert shown(other) == wanted and other.get_by_label("Search for").input_value() == "a red square -blue"
        other.close()

        liked = found(page).nth(1)
        item = liked.get_attribute("data-id")
        liked.get_by_role("button", name="More like this").click()
        expect(page.locator("#parts li")).to_have_count(1)
        settle(page)
        assert f"like={item}" in page.url and item not in shown(page)
        expect(page.locator("#results")).to_be_focused()
        page.go_back()
        settle(page)
        assert shown(page) == wanted


@pytest.mark.parametrize("size", SIZES)
def test_files_are_dropped_and_a_sound_is_recorded(browser, address, size):
    with Visit(browser, address, size) as visit:
        page = visit.open()
        expect(page.locator("#begin .card").first).to_be_visible(timeout=WAIT)
        visit.drop("red.jpg", "image/jpeg", jpeg((220, 30, 30), (1500, 1200)))  # it is made smaller
        expect(page.locator("#parts li canvas")).to_be_visible()
        settle(page)
        expect(page.locator("#status")).to_contain_text("not part of the link")
        first = shown(page)
        visit.drop("horn.flac", "audio/flac", tone(440))
        expect(page.locator("#parts li")).to_have_count(2)
        settle(page)
        page.get_by_role("button", name="Remove the picture red.jpg").click()
        expect(page.locator("#parts li")).to_have_count(1)
        settle(page)
        assert shown(page) != first
        page.get_by_role("button", name="Record a sound").click()
        expect(page.get_by_role("button", name="Record a sound")).to_have_attribute("aria-pressed", "true")
        page.wait_for_timeout(800)
        page.get_by_role("button", name="Record a sound").click()
        expect(page.locator("#parts li")).to_contain_text("your recording")
        settle(page)
        visit.drop("words.pdf", "application/pdf", b"%PDF")
        expect(page.locator("#status")).to_contain_text("neither a picture nor a sound")
        visit.drop("broken.jpg", "image/jpeg", b"\xff\xd8\xff broken")
        expect(page.locator("#status")).to_contain_text("decode")
        page.locator("#file-image").set_input_files(
            {"name": "blue.png", "mimeType": "image/png", "buffer": jpeg((9, 9, 200), kind="PNG")}
        )
        settle(page)


@pytest.mark.parametrize("size", SIZES)
def test_by_keyboard_alone(browser, address, size):
    with Visit(browser, address, size) as visit:
        page = visit.open()
        expect(page.get_by_label("Search for")).to_be_focused()
        page.keyboard.type("a blue square")
        page.keyboard.press("Enter")
        settle(page)

        def tab_to(selector: str, most: int = 80):
            for _ in range(most):
                page.keyboard.press("Tab")
                if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    outline = (
                        "getComputedStyle(document.activeElement.matches('.segments input') ? "
                        "document.activeElement.nextElementSibling : document.activeElement).outlineStyle"
                    )
                    assert page.evaluate(outline) != "none", f"the focus on {selector} is not seen"
                    return
            raise AssertionError(f"{selector} is not reached")

        tab_to(".segments input")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#text")).to_be_hidden()
        settle(page)
        assert "to=image" in page.url
        tab_to("#image .like")
        page.keyboard.press("Enter")
        expect(page.locator("#parts li")).to_have_count(1)
        settle(page)
        page.keyboard.press("/")
        expect(page.get_by_label("Search for")).to_be_focused()
        tab_to("#parts button:last-of-type")
        page.keyboard.press("Enter")
        expect(page.locator("#parts li")).to_have_count(0)
        page.goto(f"{address}/?q=red&to=audio")
        settle(page)
        tab_to("#audio audio")
        page.keyboard.press("Space")
        player = page.locator("#audio audio").first
        until = time.monotonic() + WAIT / 1000
        while not player.evaluate("player => player.currentTime > 0") and time.monotonic() < until:
            page.wait_for_timeout(50)
        assert player.evaluate("player => player.currentTime > 0")


def test_filters(browser, address):
    with Visit(browser, address, "wide") as visit:
        page = visit.open("/?q=square")
        settle(page)
        page.get_by_text("Add a filter").click()
        page.get_by_label("Field").select_option("color")
        page.get_by_label("Value").fill("red")
        page.get_by_role("button", name="Apply").click()
        expect(page.locator("#where li")).to_contain_text("color: red")
        settle(page)
        assert "where=color%3Dred" in page.url
        captions = page.locator("#image .caption").all_inner_texts()
        assert captions and all("red" in caption for caption in captions)
        page.get_by_role("button", name="Remove the filter color").click()
        expect(page.locator("#where li")).to_have_count(0)
        settle(page)
        assert any("red" not in caption for caption in page.locator("#image .caption").all_inner_texts())


def test_hostile_captions_stay_text(browser, address):
    with Visit(browser, address, "wide") as visit:
        page = visit.open("/?q=x&like=words&to=text")
        settle(page)
        expect(page.locator("#parts li")).to_contain_text("<img src=x")
        page.goto(f"{address}/?q={'a'}&to=text&top=96")
        settle(page)
        card = page.locator("#text .card[data-id=words]")
        expect(card.locator(".caption")).to_have_text(HOSTILE)
        card.locator("summary").click()
        expect(card.locator("dl")).to_contain_text(HOSTILE)
        assert page.locator("[onerror], .card script").count() == 0
        page.goto(f"{address}/?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&where={HOSTILE.replace('=', '%3D')}%3Dx")
        expect(page.locator("#status")).not_to_have_text("Searching…", timeout=WAIT)
        assert page.locator("[onerror]").count() == 0
        page.goto(f"{address}/media/words")
        assert page.locator("body").inner_text() == HOSTILE


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing(browser, address, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with Visit(browser, address, size, color_scheme=scheme) as visit:
        page = visit.open()
        expect(page.locator("#begin .card").first).to_be_visible(timeout=WAIT)
        check(axe, page)
        page.goto(f"{address}/?q=a+red+square&like=words&where=color%3Dred")
        settle(page)
        page.locator(".card details").first.click()
        page.locator("#add-filter summary").click()
        check(axe, page)
        page.goto(f"{address}/?view=map")
        check(axe, page)


def check(axe, page) -> None:
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()


def test_the_map(browser, address, index):  # noqa: F811
    with Visit(browser, address, "wide") as visit:
        page = visit.open("/")
        page.get_by_role("link", name="Map").click()
        expect(page.locator("#legend label")).to_have_count(3, timeout=200_000)
        expect(page.locator("#map-note")).to_contain_text(f"{len(index)} items")
        page.locator("#canvas").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#picked .card")).to_be_visible()
        first = page.locator("#picked .card").get_attribute("data-id")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("+")
        expect(page.locator("#picked .card")).not_to_have_attribute("data-id", first)
        page.keyboard.press("Enter")
        settle(page)
        assert "like=" in page.url


def test_the_page_asks_for_the_token(browser, index, model):  # noqa: F811
    with served(index, model, token="sesame", timeout=60.0) as (port, _), \
            Visit(browser, f"http://localhost:{port}", "narrow") as visit:  # fmt: skip
        page = visit.open("/?q=red")
        expect(page.get_by_role("dialog")).to_be_visible(timeout=WAIT)
        page.get_by_role("textbox", name="Token").fill("sesam")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("not the token")
        page.get_by_role("textbox", name="Token").fill("sesame")
        page.keyboard.press("Enter")
        settle(page)
        expect(page.get_by_role("dialog")).to_be_hidden()
        assert page.locator("#image img").first.evaluate("picture => picture.decode().then(() => true)")
