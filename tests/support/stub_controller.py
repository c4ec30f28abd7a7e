"""A controller without workers: ``/v1`` on a real socket, whose answers and faults a test scripts."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from protocol.errors import ErrorCode, RequestError
from protocol.openai import ChatChunkChoice, ChatCompletionChunk, ChatDelta, ErrorBody, ErrorReply
from protocol.trace import StepTrace, ThreadStep, TraceHeader, summarise
from tests.support.serving import served

TOKENS_PER_STEP = 2
PROMPT_IDS = [1, 2, 3]


@dataclass
class Behaviour:
    """What the stub does with one request."""

    tokens: list[str] = field(default_factory=lambda: ["An ", "answer ", "of ", "five ", "tokens."])
    refuse: RequestError | None = None  # instead of a stream
    break_after: int | None = None  # steps until an error event
    cut_after: int | None = None  # steps until the connection just ends
    endless: bool = False  # repeat the tokens until the client leaves
    traced: bool = True


def no_worker(model: str = "stub") -> Behaviour:
    """A controller whose last worker left."""
    return Behaviour(refuse=RequestError(ErrorCode.CONTROLLER_NO_WORKER, f"no worker serves {model}"))


def last_question(body: dict[str, Any]) -> str:
    """The text of the last message of a request."""
    return str(body["messages"][-1]["content"])


class StubController:
    """Use as a context manager; ``behave`` maps a request's body to what happens."""

    def __init__(self, models: dict[str, list[str]] | None = None, workers: int = 1) -> None:
        self.models = {"stub": ["vanilla"]} if models is None else models
        self.workers = workers
        self.behave: Callable[[dict[str, Any]], Behaviour] = lambda body: Behaviour()
        self.requests: list[dict[str, Any]] = []
        self.aborted = threading.Event()  # a client left before its answer ended

    def __enter__(self) -> "StubController":
        self._serving = served(self._app())
        self.url = self._serving.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            cards = [{"id": name, "created": 0, "methods": methods} for name, methods in self.models.items()]
            return {"object": "list", "data": cards}

        @app.post("/get_worker_count")
        async def worker_count(request: Request) -> dict[str, int]:
            return {"count": self.workers if (await request.json())["model"] in self.models else 0}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.requests.append(body)
            behaviour = self.behave(body)
            if error := behaviour.refuse:
                return JSONResponse(_error(error), error.http_status)
            return StreamingResponse(self._stream(body, behaviour), media_type="text/event-stream")

        return app

    async def _stream(self, body: dict[str, Any], behaviour: Behaviour) -> AsyncIterator[str]:
        ended = False
        try:
            async for event in _events(body, behaviour):
                yield f"data: {json.dumps(event)}\n\n"
            ended = True
        finally:
            if not ended:
                self.aborted.set()
        if behaviour.cut_after is None:
            yield "data: [DONE]\n\n"


async def _events(body: dict[str, Any], behaviour: Behaviour) -> AsyncIterator[dict[str, Any]]:
    steps: list[StepTrace] = []
    async for tokens, last in _steps_of(behaviour):
        if behaviour.cut_after == len(steps):
            return
        if behaviour.break_after == len(steps):
            yield _error(RequestError(ErrorCode.INTERNAL_ERROR, "the engine\nbroke"))
            return
        finish = "stop" if last else None
        steps.append(_step(len(steps), tokens, finish))
        choice = ChatChunkChoice(index=0, delta=ChatDelta(content="".join(tokens)), finish_reason=finish)
        chunk = ChatCompletionChunk(id="stub", created=0, model=body["model"], choices=[choice])
        if behaviour.traced and body.get("trace"):
            chunk.trace = steps[-1:]
            chunk.trace_header = _header(body) if len(steps) == 1 else None
            elapsed = steps[-1].t_ms
            chunk.trace_summary = (
                summarise(steps, ttft_ms=10.0, elapsed_ms=elapsed, finish_reason=finish) if last else None
            )
        yield chunk.model_dump(mode="json", exclude_none=True)


async def _steps_of(behaviour: Behaviour) -> AsyncIterator[tuple[list[str], bool]]:
    tokens = behaviour.tokens
    groups = [tokens[start : start + TOKENS_PER_STEP] for start in range(0, len(tokens), TOKENS_PER_STEP)]
    while behaviour.endless:
        for group in groups:
            yield group, False
            await asyncio.sleep(0.005)
    for group in groups:
        yield group, group is groups[-1]


def _step(number: int, tokens: list[str], finish: str | None) -> StepTrace:
    thread = ThreadStep(
        thread=0,
        drafted=3,
        accepted=len(tokens) - 1,
        token_ids=[100 + number * TOKENS_PER_STEP + index for index in range(len(tokens))],
        text="".join(tokens),
        finish_reason=finish,
    )
    return StepTrace(
        step=number, t_ms=10.0 * (number + 1), forward_ms=8, width=4, batch_width=4, kv_tokens=10, threads=[thread]
    )


def _header(body: dict[str, Any]) -> TraceHeader:
    return TraceHeader(
        request_id="stub",
        model=body["model"],
        method=body.get("method") or "vanilla",
        parameters={},
        device="cpu",
        dtype="float32",
        versions={},
        prompt_tokens=len(PROMPT_IDS),
        prefill_ms=5,
        prefill_steps=1,
        prompt_token_ids=PROMPT_IDS if body["trace"] == "full" else None,
    )


def _error(error: RequestError) -> dict[str, Any]:
    body = ErrorBody(message=error.message, type=error.error_type, code=int(error.code))
    return ErrorReply(error=body).model_dump(mode="json")
