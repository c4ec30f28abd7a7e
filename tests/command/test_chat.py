import io
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from rich.console import Console

from polydecode import streams
from polydecode.chat import Chat, figures
from polydecode.streams import ChatOptions, LocalStream, Messages, Piece, RemoteStream
from protocol.errors import ErrorCode, RequestError
from protocol.trace import TraceSummary, summarise
from tests.support.stub_controller import Behaviour, StubController, no_worker

OPTIONS = ChatOptions("stub", None, 0.5, 99)
SUMMARY = summarise([], ttft_ms=250, elapsed_ms=1000, finish_reason="length")


class Scripted:
    """Answers with what a test wrote; an exception among the pieces is raised."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.asked: list[Messages] = []
        self.closed = 0

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        self.asked.append(messages)
        try:
            for piece in self.answers.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1

    def close(self) -> None:
        pass


def _chat(stream: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch, system: str | None = None) -> str:
    """What a terminal would show for these lines of input, then Ctrl-D."""
    source: Iterator[str] = iter(lines)

    def read(*_: object) -> str:
        for line in source:
            if line == "^C":
                raise KeyboardInterrupt
            return line
        raise EOFError

    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", highlight=False, width=100)
    monkeypatch.setattr(console, "input", read)
    Chat(stream, console, system).run()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_each_step_has_the_next_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [Piece("one "), Piece(""), Piece("two "), Piece("three "), Piece("", SUMMARY)]
    shown = _chat(Scripted(pieces), ["hi"], monkeypatch)
    assert "\x1b[39mone \x1b[0m\x1b[36mtwo \x1b[0m\x1b[32mthree \x1b[0m" in shown
    assert "first token after 0.25 s · cut at the longest length" in shown


def test_history_grows_and_clear_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Scripted([Piece("A")], [Piece("B")], [Piece("C")])
    _chat(stream, ["a", "", "b", "/clear", "c", "/exit", "d"], monkeypatch, system="be brief")
    contents = [[message["content"] for message in asked] for asked in stream.asked]
    assert contents == [["be brief", "a"], ["be brief", "a", "A", "b"], ["be brief", "c"]]


def test_ctrl_c_stops_the_answer_and_keeps_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Scripted([Piece("half"), KeyboardInterrupt()], [Piece("B")])
    shown = _chat(stream, ["a", "^C", "b"], monkeypatch)
    assert "stopped" in shown
    assert stream.closed == 2
    assert [message["content"] for message in stream.asked[1]] == ["a", "half", "b"]


def test_a_failed_question_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RequestError(ErrorCode.CONTROLLER_NO_WORKER, "no worker\nserves it")
    stream = Scripted([error], [Piece("B")])
    assert "no worker serves it" in _chat(stream, ["a", "b"], monkeypatch)
    assert [message["content"] for message in stream.asked[1]] == ["b"]


def test_escape_codes_of_a_model_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[2J" not in _chat(Scripted([Piece("a\x1b[2Jb")]), ["x"], monkeypatch)


def test_over_v1_every_step_is_a_piece() -> None:
    with StubController() as stub:
        pieces = list(RemoteStream(OPTIONS, stub.url + "/").answer([{"role": "user", "content": "hi"}]))
    assert [piece.text for piece in pieces] == ["An answer ", "of five ", "tokens."]
    assert isinstance(pieces[-1].summary, TraceSummary)
    assert stub.requests[0].items() >= {"temperature": 0.5, "max_tokens": 99, "trace": True, "stream": True}.items()
    assert "method" not in stub.requests[0]


def test_over_v1_closing_stops_the_worker_and_errors_are_readable() -> None:
    with StubController() as stub:
        stub.behave = lambda body: Behaviour(endless=True)
        answer = RemoteStream(OPTIONS, stub.url).answer([{"role": "user", "content": "hi"}])
        next(answer)
        answer.close()
        assert stub.aborted.wait(20)
        stub.behave = lambda body: no_worker()
        with pytest.raises(RequestError, match="no worker serves stub"):
            list(RemoteStream(OPTIONS, stub.url).answer([]))


def test_one_chunk_of_two_steps_is_two_pieces() -> None:
    step = {"step": 0, "t_ms": 1, "forward_ms": 1, "width": 1, "batch_width": 1, "kv_tokens": 1}
    steps = [{**step, "threads": [{"thread": 0, "text": text}]} for text in ("ab", "c")]
    chunk = {"id": "x", "created": 0, "model": "m", "trace": steps}

    def texts(content: str) -> list[str]:
        choices = [{"index": 0, "delta": {"content": content}}]
        full = streams.ChatCompletionChunk.model_validate({**chunk, "choices": choices})
        return [piece.text for piece in streams.pieces(full)]

    assert texts("abc") == ["ab", "c"]
    assert texts("abcd") == ["abcd"]  # text that was held back: no border to be seen


def test_in_process_the_engine_is_asked_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Event:
        text, step, finish_reason, summary = "x", None, None, None

    class FakeEngine:
        @classmethod
        def load(cls, model: str, **keys: Any) -> "FakeEngine":
            calls.append((model, keys))
            return cls()

        def generate(self, messages: Messages, **keys: Any) -> Iterator[Event]:
            calls.append(keys)
            try:
                while True:
                    yield Event()
            finally:
                calls.append("cancelled")

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setattr("polydecode.Engine", FakeEngine, raising=False)
    stream = LocalStream(ChatOptions("m", "ngram", 0.0, 5))
    answer = stream.answer([{"role": "user", "content": "hi"}])
    assert next(answer) == Piece("x")
    answer.close()
    stream.close()
    assert calls == [("m", {"method": "ngram"}), {"max_new_tokens": 5, "temperature": 0.0}, "cancelled", "closed"]


def test_figures_are_short() -> None:
    assert figures(SUMMARY).startswith("0 tokens · 0 steps · 0.00 tokens/step · 0.0 tokens/s")
