"""One answer of a model over ``/v1``: its text and the trace of how it was made."""

from dataclasses import dataclass
from typing import Any

from protocol.client import ControllerClient
from protocol.errors import ErrorCode, RequestError
from protocol.trace import RequestTrace, StepTrace, TraceHeader, TraceSummary


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and its trace."""

    text: str
    trace: RequestTrace


async def ask(client: ControllerClient, body: dict[str, Any]) -> Answer:
    """Send a chat request whose ``trace`` key is set, and gather its answer.

    Raises:
        RequestError: the request failed, or the worker that answered does not trace.
    """
    text: list[str] = []
    steps: list[StepTrace] = []
    header: TraceHeader | None = None
    summary: TraceSummary | None = None
    async for chunk in client.stream_chat(body):
        text += [choice.delta.content or "" for choice in chunk.choices]
        steps += chunk.trace or []
        header = chunk.trace_header or header
        summary = chunk.trace_summary or summary
    if header is None or summary is None:
        raise RequestError(ErrorCode.INVALID_MODEL, f"the worker of {body['model']} sends no traces")
    return Answer("".join(text), RequestTrace(header=header, steps=steps, summary=summary))
