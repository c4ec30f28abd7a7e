"""The parts of an answer as they arrive, in one form whatever a worker's frames look like."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from controller.upstream import Answer
from protocol.errors import ErrorCode, RequestError
from protocol.generation import FinishReason, Logprobs, StreamFrame, ThreadDelta, Usage, joined, parse_frame
from protocol.trace import StepTrace, TraceHeader, TraceSummary
from protocol.wire import parse_object


@dataclass
class Piece:
    """What one frame adds to an answer; also the sum of many (``absorb``)."""

    text: str = ""
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    trace: list[StepTrace] | None = None
    threads: list[ThreadDelta] | None = None
    trace_header: TraceHeader | None = None
    trace_summary: TraceSummary | None = None

    @property
    def says_something(self) -> bool:
        """Whether a client should hear of it: usage alone goes out at the end."""
        told = (self.text, self.logprobs, self.finish_reason, self.trace, self.threads)
        return any(told) or self.trace_header is not None or self.trace_summary is not None

    def absorb(self, later: "Piece") -> None:
        """Append the next piece of the same answer."""
        self.text += later.text
        if later.logprobs is not None:
            self.logprobs = self.logprobs or Logprobs()
            self.logprobs.extend(later.logprobs)
        if later.trace is not None:
            self.trace = (self.trace or []) + later.trace
        if later.threads is not None:
            self.threads = joined((self.threads or []) + later.threads)
        self.finish_reason = later.finish_reason or self.finish_reason
        self.usage = later.usage or self.usage
        self.trace_header = self.trace_header or later.trace_header
        self.trace_summary = later.trace_summary or self.trace_summary


async def pieces(answer: Answer) -> AsyncIterator[Piece]:
    """Read an answer to its end; the last frame, which FastChat's convention sends twice, counts once.

    Raises:
        RequestError: an error frame, a malformed one, or a worker lost in the middle.
    """
    cut = _Cutter()
    finished = False
    async for encoded in answer.frames():
        frame = parse_frame(encoded) if answer.worker.own else _foreign_frame(encoded)
        if frame.error_code:
            raise RequestError(frame.error_code, frame.text)
        if not finished:  # the connection is read to its end even so, to be used again
            yield cut.piece(frame)
        finished = finished or frame.finish_reason is not None
    if finished:
        return
    if answer.worker.own:
        raise RequestError(ErrorCode.CONTROLLER_WORKER_TIMEOUT, "the worker ended the answer before it was finished")
    yield Piece(finish_reason="stop")  # FastChat's workers need not say why they ended


class _Cutter:
    """Remembers how much of a cumulative answer went out."""

    def __init__(self) -> None:
        self._text_sent = 0
        self._logprobs_sent = 0

    def piece(self, frame: StreamFrame) -> Piece:
        return Piece(
            text=self._new_text(frame),
            logprobs=self._new_logprobs(frame),
            finish_reason=frame.finish_reason,
            usage=frame.usage,
            trace=frame.trace,
            threads=frame.threads,
            trace_header=frame.trace_header,
            trace_summary=frame.trace_summary,
        )

    def _new_text(self, frame: StreamFrame) -> str:
        if not frame.cumulative:
            return frame.text
        text = frame.text.replace("\ufffd", "")  # a character whose last bytes have not come yet
        new = text[self._text_sent :]
        self._text_sent = max(self._text_sent, len(text))
        return new

    def _new_logprobs(self, frame: StreamFrame) -> Logprobs | None:
        if frame.logprobs is None or not frame.cumulative:
            return frame.logprobs
        start, whole = self._logprobs_sent, frame.logprobs
        self._logprobs_sent = max(start, len(whole.tokens))
        if start >= len(whole.tokens):
            return None
        return Logprobs(
            text_offset=whole.text_offset[start:],
            token_logprobs=whole.token_logprobs[start:],
            tokens=whole.tokens[start:],
            top_logprobs=whole.top_logprobs[start:],
        )


def _foreign_frame(encoded: bytes) -> StreamFrame:
    """A frame of a FastChat worker, some of which end with reasons of their own ("abort", a list)."""
    try:
        content = json.loads(encoded)
    except ValueError:
        content = None
    if isinstance(content, dict) and content.get("finish_reason") not in (None, "stop", "length"):
        content["finish_reason"] = "stop"
    return parse_object(StreamFrame, content)
