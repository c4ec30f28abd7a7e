"""An answer while it grows: filled by a task of its own, looked at whenever the page is drawn."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from protocol.client import ControllerClient
from protocol.errors import RequestError
from protocol.openai import ChatCompletionChunk
from protocol.trace import StepTrace, TraceSummary, summarise

REDRAWS_PER_S = 15  # more would only keep the browser busy


class LiveAnswer:
    """Text, steps and end of one answer."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.stopped = False
        self._steps: list[StepTrace] = []
        self._summary: TraceSummary | None = None
        self._started = time.monotonic()
        self._first: float | None = None

    @property
    def waited_s(self) -> float:
        """Seconds since the question was sent."""
        return time.monotonic() - self._started

    @property
    def elapsed_s(self) -> float:
        """By the worker's clock where it traces, so that tokens, seconds and tokens/s agree."""
        return self._steps[-1].t_ms / 1000 if self._steps else self.waited_s

    @property
    def first_token_s(self) -> float | None:
        """Until the first token, as seen from here: queueing and the network included."""
        return self._first

    @property
    def ended(self) -> bool:
        return self.stopped or self.error is not None or self.finish_reason is not None

    def summary(self) -> TraceSummary | None:
        """The figures so far; None while there is no step, or if the worker does not trace."""
        if self._summary or not self._steps:
            return self._summary
        return summarise(self._steps, ttft_ms=None, elapsed_ms=self._steps[-1].t_ms, finish_reason=self.finish_reason)

    def take(self, chunk: ChatCompletionChunk) -> None:
        """Add what a chunk brings."""
        for choice in chunk.choices:
            self.text += choice.delta.content or ""
            self.finish_reason = choice.finish_reason or self.finish_reason
        self._steps += chunk.trace or []
        self._summary = chunk.trace_summary or self._summary
        if self._first is None and (self.text or self._steps):
            self._first = self.waited_s

    async def follow(self, client: ControllerClient, body: dict[str, Any]) -> None:
        """Take the whole stream. Cancelled, it closes the stream, which stops the worker."""
        try:
            async with contextlib.aclosing(client.stream_chat(body)) as chunks:
                async for chunk in chunks:
                    self.take(chunk)
        except RequestError as error:
            self.error = error.message
        except asyncio.CancelledError:
            self.stopped = True


class Answers:
    """The answers being given, at most one a session, each of which can be stopped."""

    def __init__(self, client: ControllerClient) -> None:
        self._client = client
        self._running: dict[str, asyncio.Task[None]] = {}

    async def give(self, session: str, body: dict[str, Any]) -> AsyncIterator[LiveAnswer]:
        """Yield the growing answer several times a second, the last time when it is complete or stopped."""
        self.stop(session)
        live = LiveAnswer()
        task = asyncio.create_task(live.follow(self._client, body))
        self._running[session] = task
        try:
            while not task.done():
                yield live
                await asyncio.wait([task], timeout=1 / REDRAWS_PER_S)
            yield live
        finally:
            task.cancel()
            if self._running.get(session) is task:
                del self._running[session]

    def stop(self, session: str) -> None:
        """Stop the session's answer, if there is one."""
        if task := self._running.get(session):
            task.cancel()
