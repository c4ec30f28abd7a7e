"""From engine events to the frames of one answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable

from transformers import PreTrainedTokenizerBase

from protocol.errors import RequestError
from protocol.generation import GenerateParams, Logprobs, StreamFrame, Usage, error_frame, thread_deltas
from protocol.trace import RequestTrace
from workers.engine import Engine
from workers.model.sampling import TokenLogprobs
from workers.request import Event, Request, TokenReport
from workers.text import token_text

KEEP_ALIVE_S = 20.0  # FastChat's clients wait 100 s for a frame


class Answer:
    """One request's events on an asyncio loop. Whoever makes it must close it, which cancels what still runs."""

    def __init__(self, engine: Engine, params: GenerateParams, *, request_id: str, defaults: dict[str, str]) -> None:
        """Submit the request. Raises RequestError if it is refused."""
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._engine = engine

        def sink(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._request: Request = engine.submit(params, sink, request_id=request_id, defaults=defaults)

    async def events(self) -> AsyncIterator[list[Event]]:
        """Batches of what has happened since the batch before; the last batch ends with the last event.

        A batch is empty when nothing happened for KEEP_ALIVE_S (the request waits for its turn).

        Raises:
            RequestError: decoding failed.
        """
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):  # wait_for may swallow a cancellation on Python 3.11
                    batch = [await self._events.get()]
            except TimeoutError:
                yield []
                continue
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            if batch[-1].error:
                raise batch[-1].error
            yield batch
            if batch[-1].last:
                return

    def close(self) -> None:
        """Cancel the request if it still runs."""
        self._engine.cancel(self._request)


class FrameWriter:
    """Folds events into frames: FastChat's cumulative ones, or deltas where the client asked for them."""

    def __init__(self, params: GenerateParams, tokenizer: PreTrainedTokenizerBase) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._text = ""
        self._logprobs = Logprobs()
        self._offset = 0

    def frame(self, events: list[Event]) -> StreamFrame:
        """One frame for ``events``; its finish_reason is always null (see :meth:`final`)."""
        text = "".join(event.text for event in events)
        logprobs = self._new_logprobs([report for event in events for report in event.tokens])
        self._text += text
        self._logprobs.extend(logprobs)
        deltas = self._params.text_deltas
        frame = StreamFrame(text=text if deltas else self._text, usage=_usage(events[-1]), cumulative=not deltas)
        if self._params.logprobs is not None:
            frame.logprobs = logprobs if deltas else self._logprobs
        if self._params.trace:
            steps = [event.step for event in events if event.step]
            frame.trace = steps
            frame.threads = thread_deltas(steps)
            frame.trace_header = next((event.header for event in events if event.header), None)
        return frame

    def keep_alive(self) -> StreamFrame:
        """A frame without news, for clients that give up on a silent stream."""
        return StreamFrame(text="" if self._params.text_deltas else self._text, cumulative=not self._params.text_deltas)

    def final(self, last: Event) -> StreamFrame:
        """The closing frame: no new text, and the reason. FastChat's clients see the last text twice."""
        frame = StreamFrame(
            text="" if self._params.text_deltas else self._text,
            usage=_usage(last),
            finish_reason=last.finish_reason,
            cumulative=not self._params.text_deltas,
        )
        if self._params.logprobs is not None and not self._params.text_deltas:
            frame.logprobs = self._logprobs
        if self._params.trace:
            frame.trace_summary = last.summary
        return frame

    def _new_logprobs(self, reports: Iterable[TokenReport]) -> Logprobs:
        new = Logprobs()
        for report in reports:
            token = self._token_text(report.token)
            new.text_offset.append(self._offset)
            new.tokens.append(token)
            new.token_logprobs.append(report.logprobs.logprob if report.logprobs else None)
            new.top_logprobs.append(self._alternatives(report.logprobs) if report.logprobs else None)
            self._offset += len(token)
        return new

    def _alternatives(self, logprobs: TokenLogprobs) -> dict[str, float | None]:
        """Best first; of tokens that read alike the best one counts."""
        texts: dict[str, float | None] = {}
        for token, value in logprobs.top:
            texts.setdefault(self._token_text(token), value)
        return texts

    def _token_text(self, token: int) -> str:
        return token_text(self._tokenizer, token)


async def frames(
    engine: Engine, params: GenerateParams, *, request_id: str, defaults: dict[str, str], interval: int = 1
) -> AsyncGenerator[StreamFrame, None]:
    """The whole answer as frames; errors come as an error frame, never as an exception.

    ``interval``: least number of steps between two frames.
    """
    try:
        answer = Answer(engine, params, request_id=request_id, defaults=defaults)
    except RequestError as error:
        yield error_frame(error)
        return
    writer = FrameWriter(params, engine.tokenizer)
    held: list[Event] = []
    try:
        async for batch in answer.events():
            if not batch:
                yield writer.keep_alive()
                continue
            held += batch
            if len(held) < interval and not held[-1].last:
                continue
            yield writer.frame(held)
            if held[-1].last:
                yield writer.final(held[-1])
            held = []
    except RequestError as error:
        yield error_frame(error)
    finally:
        answer.close()


async def whole_trace(
    engine: Engine, params: GenerateParams, *, request_id: str, defaults: dict[str, str]
) -> RequestTrace:
    """Run a request to its end and return its native trace. Raises RequestError."""
    answer = Answer(engine, params, request_id=request_id, defaults=defaults)
    events: list[Event] = []
    try:
        async for batch in answer.events():
            events += batch
    finally:
        answer.close()
    header, summary = events[0].header, events[-1].summary
    assert header is not None and summary is not None
    return RequestTrace(header=header, steps=[event.step for event in events if event.step], summary=summary)


def _usage(event: Event) -> Usage:
    return Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        total_tokens=event.prompt_tokens + event.completion_tokens,
    )
