"""The worker's HTTP face: FastChat's worker endpoints, APAR's ``/worker_trace``, health and metrics.

As FastChat's clients expect, errors come in the body (``text`` and ``error_code``) with status 200.
"""

import asyncio
import base64
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from protocol.errors import ErrorCode, RequestError
from protocol.fleet import EmbeddingsParams, LatencyTable, ModelDetails, ModelQuery, WorkerStatus, WorkerTraceParams
from protocol.generation import GenerateParams, error_frame
from protocol.legacy_trace import legacy_trace
from protocol.trace import RequestTrace
from protocol.wire import parse_body
from workers.answer import frames, whole_trace
from workers.decoding.registry import BASELINE, FORKING, forks
from workers.engine import Engine
from workers.http import ClosingStream, while_connected
from workers.metrics import metrics_registry, render


@dataclass
class Worker:
    """An engine and what it is served as.

    Attributes:
        defaults: served model names and the method that each stands for.
        incarnation: new at every start, so that a controller notices restarts.
    """

    engine: Engine
    defaults: dict[str, str]
    stream_interval: int = 1
    heart_beat_s: float | None = None
    draining: bool = False
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)

    def status(self) -> WorkerStatus:
        """What registrations, heart beats and ``/worker_get_status`` carry."""
        load = self.engine.status()
        return WorkerStatus(
            model_names=list(self.defaults),
            queue_length=load.running + load.queued,
            running=load.running,
            last_progress_s=self.engine.last_progress_s(),
            incarnation=self.incarnation,
            methods=list(self.engine.methods),
            heart_beat_s=self.heart_beat_s,
            draining=self.draining,
        )


def served_names(name: str, methods: list[str], aliases: list[str]) -> dict[str, str]:
    """Served names → methods: the model's name (or each alias), with the method as a suffix unless it is vanilla.

    A name that ends in ``-apar`` stands for the method of that name, and ``<name>+medusa`` for ``apar+medusa``.
    """

    def served(alias: str, method: str) -> str:
        if alias.endswith(f"-{FORKING}") and forks(method):
            return alias + method.removeprefix(FORKING)
        return alias if method == BASELINE and not alias.endswith(f"-{FORKING}") else f"{alias}-{method}"

    return {served(alias, method): method for alias in aliases or [name] for method in methods}


def create_app(worker: Worker, background: Callable[[], Any] | None = None) -> FastAPI:
    """The application; ``background()`` is awaited as a task while it serves (registration)."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.ensure_future(background()) if background else None
        yield
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    app = FastAPI(title="polydecode worker", lifespan=lifespan)
    registry = metrics_registry(worker.engine)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error_frame(error).model_dump(include={"text", "error_code"}))

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    @app.post("/worker_generate_stream")
    async def generate_stream(request: Request) -> ClosingStream:
        return ClosingStream(_encoded(worker, await request.body(), _request_id(request)))

    @app.post("/worker_generate")
    async def generate(request: Request) -> Response:
        body = await request.body()
        last = await while_connected(request, _last(_encoded(worker, body, _request_id(request))))
        return Response(last.rstrip(b"\0"), media_type="application/json")

    @app.post("/worker_trace")
    async def trace(request: Request) -> Response:
        params = parse_body(WorkerTraceParams, await request.body())
        return JSONResponse(await while_connected(request, _traces(worker, params, _request_id(request))))

    @app.post("/worker_get_embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        return await _embeddings(worker.engine, parse_body(EmbeddingsParams, await request.body()))

    @app.post("/worker_get_status")
    async def status() -> dict[str, Any]:
        return worker.status().model_dump()

    @app.post("/worker_get_conv_template")
    async def conv_template() -> dict[str, Any]:
        return {"conv": worker.engine.renderer.conversation(worker.engine.name).model_dump()}

    @app.post("/count_token")
    async def count_token(request: Request) -> dict[str, int]:
        query = parse_body(ModelQuery, await request.body())
        return {"count": worker.engine.count_tokens(query.prompt or ""), "error_code": 0}

    @app.post("/model_details")
    async def model_details() -> dict[str, Any]:
        engine = worker.engine
        details = ModelDetails(
            context_length=engine.context_length,
            methods=list(engine.methods),
            memory=engine.memory(),
            curve=LatencyTable.model_validate(asdict(engine.curve)) if engine.curve else None,
            pace=engine.pace(),
        )
        return details.model_dump()

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = worker.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine stopped"}, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(render(registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _encoded(worker: Worker, body: bytes, request_id: str) -> AsyncGenerator[bytes, None]:
    try:
        params = parse_body(GenerateParams, body)
        if worker.draining:
            raise RequestError(ErrorCode.ENGINE_OVERLOADED, "the worker is shutting down")
    except RequestError as error:
        yield error_frame(error).encode()
        return
    answer = frames(
        worker.engine, params, request_id=request_id, defaults=worker.defaults, interval=worker.stream_interval
    )
    async with aclosing(answer):
        async for frame in answer:
            yield frame.encode()


async def _last(encoded: AsyncGenerator[bytes, None]) -> bytes:
    last = b""
    async with aclosing(encoded):
        async for frame in encoded:
            last = frame
    return last


async def _traces(worker: Worker, params: WorkerTraceParams, request_id: str) -> dict[str, Any]:
    prompts = [params.prompts] if isinstance(params.prompts, str) else params.prompts

    async def trace(index: int, prompt: str) -> RequestTrace:
        asked = GenerateParams(
            model=params.model,
            prompt=prompt,
            max_length=params.max_length,
            temperature=0.0,
            max_depth=params.max_depth,
            max_live_threads=params.max_batch_size,
            max_threads=params.max_batch_size,  # none of those that live waits
            echo=False,
            trace="full",
        )
        return await whole_trace(worker.engine, asked, request_id=f"{request_id}-{index}", defaults=worker.defaults)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(trace(index, prompt)) for index, prompt in enumerate(prompts)]
    except ExceptionGroup as errors:  # one prompt refused is all refused
        raise errors.exceptions[0] from None
    return legacy_trace(*(task.result() for task in tasks)).model_dump()


async def _embeddings(engine: Engine, params: EmbeddingsParams) -> dict[str, Any]:
    if not params.input:
        raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, "input: must not be empty")
    results = await asyncio.gather(*(asyncio.wrap_future(engine.embed(text)) for text in params.input))
    vectors: list[Any] = [vector for vector, _ in results]
    if params.encoding_format == "base64":
        vectors = [base64.b64encode(np.asarray(vector, dtype=np.float32).tobytes()).decode() for vector in vectors]
    return {"embedding": vectors, "token_num": sum(count for _, count in results)}


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id") or uuid.uuid4().hex
