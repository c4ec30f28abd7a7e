import pytest

from protocol.client import ChatEvents, ControllerClient
from protocol.errors import ErrorCode, RequestError
from tests.support.stub_controller import Behaviour, StubController, no_worker
from traces.client import ask

BODY = {"model": "stub", "messages": [{"role": "user", "content": "hi"}], "trace": True}


async def test_an_answer_is_text_and_trace(stub: StubController) -> None:
    async with ControllerClient(stub.url) as client:
        answer = await ask(client, BODY)
    assert answer.text == "An answer of five tokens."
    assert [step.step for step in answer.trace.steps] == [0, 1, 2]
    assert answer.trace.summary.tokens == 5
    assert stub.requests[0]["stream"] is True


@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        (no_worker(), ErrorCode.CONTROLLER_NO_WORKER, "no worker serves stub"),
        (Behaviour(break_after=1), ErrorCode.INTERNAL_ERROR, "the engine broke"),
        (Behaviour(cut_after=1), ErrorCode.CONTROLLER_WORKER_TIMEOUT, "ended before"),
        (Behaviour(traced=False), ErrorCode.INVALID_MODEL, "sends no traces"),
    ],
)
async def test_failures_are_request_errors(
    stub: StubController, behaviour: Behaviour, code: ErrorCode, message: str
) -> None:
    stub.behave = lambda body: behaviour
    async with ControllerClient(stub.url) as client:
        with pytest.raises(RequestError, match=message) as caught:
            await ask(client, BODY)
    assert caught.value.code == code


async def test_a_controller_that_is_down_is_named() -> None:
    async with ControllerClient("http://127.0.0.1:1/") as client:
        with pytest.raises(RequestError, match=r"cannot reach the controller at http://127.0.0.1:1$"):
            await client.models()


async def test_proxies_of_the_environment_are_not_used(stub: StubController, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with ControllerClient(stub.url) as client:
        assert [card.id for card in await client.models()] == ["stub"]


async def test_another_server_is_no_controller(stub: StubController) -> None:
    async with ControllerClient(stub.url + "/elsewhere") as client:
        with pytest.raises(RequestError, match="HTTP status 404"):
            await client.models()


def test_events_survive_any_chunk_borders() -> None:
    text = "a\u2028b\x85c\u00e9"
    chunk = '{"id":"x","created":0,"model":"m","choices":[{"index":0,"delta":{"content":"' + text + '"}}]}'
    stream = f": comment\r\ndata: {chunk}\r\n\r\ndata: [DONE]\n\n".encode()
    events = ChatEvents()
    chunks = [chunk for byte in stream for chunk in events.feed(bytes([byte]))]
    events.finish()
    assert [chunk.choices[0].delta.content for chunk in chunks] == [text]


def test_a_malformed_event_is_an_error() -> None:
    with pytest.raises(RequestError, match="malformed"):
        list(ChatEvents().feed(b"data: {\n"))
