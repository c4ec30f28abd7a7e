import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest

from protocol.client import ControllerClient
from protocol.errors import ErrorCode, RequestError
from tests.support.stub_controller import Behaviour, StubController, last_question
from webui.page import Page

SESSION = cast(gr.Request, SimpleNamespace(session_hash="s"))
CHOICES = ("stub", "", 0.7, 1.0, 0, 0.0, 1.0, 64, "", "")
ANSWER = "An answer of five tokens."


@pytest.fixture
def stub() -> Iterator[StubController]:
    with StubController() as controller:
        yield controller


@pytest.fixture
async def page(stub: StubController) -> AsyncIterator[Page]:
    async with ControllerClient(stub.url) as client:
        page = Page(client)
        page.build()
        yield page


class Screen:
    """What a browser would show after the updates so far."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.values: dict[Any, Any] = {}

    async def follow(self, updates: AsyncIterator[dict[Any, Any]]) -> None:
        async for update in updates:
            self.take(update)

    def take(self, update: dict[Any, Any]) -> None:
        self.values.update(update)

    @property
    def history(self) -> list[dict[str, str]]:
        return self.values[self._page._history]

    @property
    def status(self) -> str:
        return self.values[self._page._parts.status]

    @property
    def stop_is_visible(self) -> bool:
        return self.values[self._page._parts.stop]["visible"]


async def test_an_answer_is_drawn_with_its_figures(stub: StubController, page: Page) -> None:
    screen = Screen(page)
    await screen.follow(page.send(SESSION, " hi ", [], *CHOICES))
    assert screen.history == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ANSWER}]
    assert screen.values[page._parts.chatbot] == screen.history
    assert screen.values[page._parts.question] == ""
    for figure in (
        "<b>5</b> tokens",
        "<b>3</b> steps",
        "<b>1.67</b> tokens/step",
        "<b>166.7</b> tokens/s",
        "first token",
    ):
        assert figure in screen.status
    assert not screen.stop_is_visible


async def test_the_next_question_carries_the_history(stub: StubController, page: Page) -> None:
    screen = Screen(page)
    await screen.follow(page.send(SESSION, "a", [], *CHOICES))
    await screen.follow(page.send(SESSION, "b", screen.history, *CHOICES))
    assert [message["content"] for message in stub.requests[1]["messages"]] == ["a", ANSWER, "b"]
    await screen.follow(page.regenerate(SESSION, screen.history, *CHOICES))
    assert stub.requests[2]["messages"] == stub.requests[1]["messages"]
    assert len(screen.history) == 4


async def test_stop_reaches_the_worker_and_keeps_the_text(stub: StubController, page: Page) -> None:
    stub.behave = lambda body: Behaviour(endless=True)
    screen = Screen(page)
    async for update in page.send(SESSION, "hi", [], *CHOICES):
        screen.take(update)
        if update.get(page._history, [])[1:] and "stopped" not in screen.status:
            assert screen.stop_is_visible
            await page.stop(SESSION)
    assert await asyncio.to_thread(stub.aborted.wait, 20)
    assert screen.history[-1]["content"].startswith("An answer")
    assert "stopped" in screen.status
    assert not screen.stop_is_visible


async def test_a_page_that_is_left_stops_the_worker(stub: StubController, page: Page) -> None:
    stub.behave = lambda body: Behaviour(endless=True)
    updates = page.send(SESSION, "hi", [], *CHOICES)
    async for update in updates:
        if update.get(page._history, [])[1:]:
            break
    await updates.aclose()  # type: ignore[attr-defined]
    assert await asyncio.to_thread(stub.aborted.wait, 20)


async def test_sessions_do_not_stop_each_other(stub: StubController, page: Page) -> None:
    stub.behave = lambda body: Behaviour(endless=last_question(body) == "long")
    other = cast(gr.Request, SimpleNamespace(session_hash="other"))
    first = asyncio.create_task(Screen(page).follow(page.send(SESSION, "long", [], *CHOICES)))
    await Screen(page).follow(page.send(other, "short", [], *CHOICES))
    await page.stop(other)
    assert not first.done()
    await page.stop(SESSION)
    await first


@pytest.mark.parametrize(
    ("behaviour", "choices", "message"),
    [
        (Behaviour(refuse=RequestError(ErrorCode.CONTEXT_OVERFLOW, "<b>too\nlong")), CHOICES, "&lt;b&gt;too long"),
        (Behaviour(break_after=1), CHOICES, "the engine broke"),
        (Behaviour(cut_after=1), CHOICES, "the stream ended before the answer did"),
        (Behaviour(), (None, *CHOICES[1:]), "there is no model to ask yet"),
        (Behaviour(), (*CHOICES[:8], "x", ""), "the seed must be a whole number"),
    ],
)
async def test_errors_are_one_line(
    stub: StubController, page: Page, behaviour: Behaviour, choices: tuple[Any, ...], message: str
) -> None:
    stub.behave = lambda body: behaviour
    screen = Screen(page)
    await screen.follow(page.send(SESSION, "hi", [], *choices))
    assert message in screen.status
    assert "\n" not in screen.status


async def test_without_traces_there_are_still_times(stub: StubController, page: Page) -> None:
    stub.behave = lambda body: Behaviour(traced=False)
    screen = Screen(page)
    await screen.follow(page.send(SESSION, "hi", [], *CHOICES))
    assert "elapsed" in screen.status and "tokens/s" not in screen.status


async def test_nothing_is_asked_without_a_question(stub: StubController, page: Page) -> None:
    screen = Screen(page)
    await screen.follow(page.send(SESSION, "  ", [], *CHOICES))
    await screen.follow(page.regenerate(SESSION, [], *CHOICES))
    assert not stub.requests


async def test_models_and_methods_are_offered(stub: StubController, page: Page) -> None:
    stub.models = {"one": ["vanilla"], "two": ["vanilla", "ngram"]}
    updates = await page.refresh("two", "ngram")
    assert updates[page._parts.model]["choices"] == ["one", "two"]
    assert updates[page._parts.model]["value"] == "two"
    assert updates[page._parts.method] == gr.update(
        choices=[("model's own", ""), ("vanilla", "vanilla"), ("ngram", "ngram")], value="ngram", visible=True
    )
    assert updates[page._timer]["active"] is False
    only_one = await page.choose_model(updates[page._catalogue], "one")
    assert only_one[page._parts.method]["visible"] is False


async def test_a_model_that_left_is_replaced(stub: StubController, page: Page) -> None:
    assert (await page.refresh("gone", "ngram"))[page._parts.model]["value"] == "stub"


async def test_no_worker_and_no_controller_are_said(stub: StubController, page: Page) -> None:
    stub.models = {}
    updates = await page.refresh(None, "")
    assert "No worker has registered" in updates[page._parts.notice]["value"]
    assert updates[page._timer]["active"] is True
    async with ControllerClient("http://127.0.0.1:1") as nowhere:
        lonely = Page(nowhere)
        lonely.build()
        updates = await lonely.refresh(None, "")
    assert "Cannot reach the controller at http://127.0.0.1:1" in updates[lonely._parts.notice]["value"]
