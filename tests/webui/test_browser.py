"""The page in a real browser; skipped where there is none."""

import shutil
from collections.abc import Iterator

import pytest

from tests.support.serving import served
from tests.support.stub_controller import Behaviour, StubController, last_question
from webui.app import create_app

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
DEADLINE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def stub() -> Iterator[StubController]:
    with StubController() as controller:
        yield controller


@pytest.fixture
def tab(browser: "playwright.Browser", stub: StubController) -> Iterator["playwright.Page"]:
    with served(create_app(stub.url)) as url:
        context = browser.new_context()
        tab = context.new_page()
        tab.set_default_timeout(DEADLINE_MS)
        tab.requested = []
        tab.on("request", lambda request: tab.requested.append(request.url))
        tab.goto(url)
        tab.wait_for_function("document.querySelector('#model input')?.value === 'stub'")
        yield tab
        context.close()


def _ask(tab: "playwright.Page", question: str) -> None:
    tab.fill("#question textarea", question)
    tab.keyboard.press("Enter")


def test_a_chat_that_needs_no_internet(tab: "playwright.Page", stub: StubController) -> None:
    _ask(tab, "hi")
    tab.wait_for_selector(".status.ended")
    assert "An answer of five tokens." in tab.inner_text("#chat")
    assert "5 tokens" in tab.inner_text("#status")
    tab.click("#tools button:has-text('Clear')")
    tab.wait_for_function("!document.querySelector('#chat').innerText.includes('five tokens')")
    foreign = [url for url in tab.requested if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert foreign == []


def test_stop_reaches_the_worker(tab: "playwright.Page", stub: StubController) -> None:
    stub.behave = lambda body: Behaviour(endless=last_question(body) == "long")
    _ask(tab, "long")
    tab.wait_for_function("document.querySelector('#chat').innerText.includes('five tokens')")
    assert not stub.aborted.is_set()
    tab.click("#stop")
    tab.wait_for_selector(".status.ended .ending")
    assert stub.aborted.wait(20)
    _ask(tab, "short")
    tab.wait_for_selector(".status.ended:not(:has(.ending))")


def test_closing_the_tab_reaches_the_worker(tab: "playwright.Page", stub: StubController) -> None:
    stub.behave = lambda body: Behaviour(endless=True)
    _ask(tab, "hi")
    tab.wait_for_selector(".status.growing .figure:nth-child(2)")
    tab.close()
    assert stub.aborted.wait(30)
