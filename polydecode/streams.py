"""Where the terminal chat's answers come from: an engine in this process, or a controller."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from protocol.client import CHAT_PATH, TIMEOUT, ChatEvents, readable_transport_errors, reply_error
from protocol.errors import ErrorCode, RequestError
from protocol.openai import ChatCompletionChunk
from protocol.trace import TraceSummary

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatOptions:
    """What to ask, and how it is to decode."""

    model: str
    method: str | None
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Piece:
    """What one decoding step added to the answer; the last piece has the summary."""

    text: str
    summary: TraceSummary | None = None


class Stream(Protocol):
    """A model that answers. Closing the iterator of :meth:`answer` stops the generation."""

    def answer(self, messages: Messages) -> Generator[Piece, None, None]: ...

    def close(self) -> None: ...


class LocalStream:
    """Decodes in this process."""

    def __init__(self, options: ChatOptions) -> None:
        from transformers.utils.logging import disable_progress_bar

        from polydecode import Engine
        from workers.model.checkpoint import ModelLoadError

        disable_progress_bar()
        method: dict[str, Any] = {"method": options.method} if options.method else {}
        try:
            self._engine: Any = Engine.load(options.model, **method)
        except ModelLoadError as error:
            raise RequestError(ErrorCode.INVALID_MODEL, str(error)) from None
        self._options = options

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        options = self._options
        events = self._engine.generate(messages, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
        with closing(events):
            for event in events:
                yield Piece(event.text, event.summary)

    def close(self) -> None:
        self._engine.close()


class RemoteStream:
    """Asks ``/v1`` of a controller."""

    def __init__(self, options: ChatOptions, controller_url: str) -> None:
        self._options = options
        self._url = controller_url.rstrip("/")
        self._http = httpx.Client(trust_env=False, timeout=TIMEOUT)

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        options, events = self._options, ChatEvents()
        body = {
            "model": options.model,
            "messages": messages,
            "stream": True,
            "trace": True,
            "temperature": options.temperature,
            "max_tokens": options.max_new_tokens,
            **({"method": options.method} if options.method else {}),
        }
        request = self._http.stream("POST", self._url + CHAT_PATH, json=body)
        with readable_transport_errors(self._url), request as reply:
            if reply.status_code != 200:
                raise reply_error(reply.status_code, reply.read())
            for data in reply.iter_bytes():
                for chunk in events.feed(data):
                    yield from pieces(chunk)
        events.finish()

    def close(self) -> None:
        self._http.close()


def pieces(chunk: ChatCompletionChunk) -> Iterator[Piece]:
    """A chunk may carry several steps: one piece for each, where their texts make up the chunk's text."""
    text = "".join(choice.delta.content or "" for choice in chunk.choices)
    steps = ["".join(thread.text for thread in step.threads) for step in chunk.trace or []]
    parts = steps if steps and "".join(steps) == text else [text]
    for part in parts[:-1]:
        yield Piece(part)
    yield Piece(parts[-1], chunk.trace_summary)
