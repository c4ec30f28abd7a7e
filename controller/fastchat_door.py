"""FastChat's controller endpoints, APAR's two, and the few that polydecode adds for its own workers."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from controller.calls import WorkerFailed
from controller.replies import HeldResponse, request_id
from controller.services import Services
from controller.upstream import Answer, Call
from controller.worker import Worker, check_worker_name
from protocol.errors import ErrorCode, RequestError
from protocol.fleet import (
    HeartBeat,
    HeartBeatReply,
    ModelQuery,
    RegisterWorker,
    UnregisterWorker,
    WorkerStatus,
)
from protocol.generation import error_frame
from protocol.wire import parse_body


class _RoutedBody(ModelQuery):
    """The two keys of a generation request that decide where it goes; the rest is the worker's business."""

    method: str | None = None


def fastchat_door(services: Services) -> APIRouter:
    """The routes that FastChat's workers and clients know."""
    router = APIRouter()
    registry, dispatcher, health = services.registry, services.dispatcher, services.health

    @router.post("/register_worker")
    async def register_worker(request: Request) -> JSONResponse:
        # FastChat's workers die of any other status than 200, so an error can only stand in the body.
        try:
            await _register(services, parse_body(RegisterWorker, await request.body()))
        except RequestError as error:
            return JSONResponse({"error": error.message})
        return JSONResponse(None)

    @router.post("/receive_heart_beat")
    async def receive_heart_beat(request: Request) -> HeartBeatReply:
        # Workers index the answer: even a malformed beat gets one, which makes its sender register again.
        try:
            beat = parse_body(HeartBeat, await request.body())
        except RequestError:
            return HeartBeatReply(exist=False)
        return HeartBeatReply(exist=registry.beat(beat))

    @router.post("/unregister_worker")
    async def unregister_worker(request: Request) -> None:
        registry.unregister(parse_body(UnregisterWorker, await request.body()).worker_name)

    @router.post("/refresh_all_workers")
    async def refresh_all_workers() -> None:
        await health.refresh()

    @router.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": registry.models()}

    @router.post("/list_language_models")
    async def list_language_models() -> dict[str, list[str]]:
        return {"models": registry.models(multimodal=False)}

    @router.post("/list_multimodal_models")
    async def list_multimodal_models() -> dict[str, list[str]]:
        return {"models": registry.models(multimodal=True)}

    @router.post("/get_worker_address")
    async def get_worker_address(request: Request) -> dict[str, str]:
        return {"address": dispatcher.hand_out_address(_model_of(parse_body(ModelQuery, await request.body())))}

    @router.post("/get_worker_count")
    async def get_worker_count(request: Request) -> dict[str, int]:
        return {"count": len(registry.serving(_model_of(parse_body(ModelQuery, await request.body()))))}

    @router.post("/worker_get_status")
    async def worker_get_status() -> dict[str, Any]:
        workers = [worker for name in registry.models() for worker in registry.serving(name)]
        unique = list(dict.fromkeys(workers))
        return {
            "model_names": registry.models(),
            "speed": sum(worker.speed for worker in unique),
            "queue_length": sum(registry.load(worker) for worker in unique),
        }

    @router.get("/test_connection")
    async def test_connection() -> str:
        return "success"

    @router.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request) -> Response:
        body = await request.body()

        async def prepare(stack: AsyncExitStack) -> Response:
            answer = await services.upstream.open(stack, _call(request, body))
            return StreamingResponse(_proxied(answer, services))

        return HeldResponse(prepare, services.metrics, on_error=_in_band)

    @router.post("/worker_trace")
    async def worker_trace(request: Request) -> Response:
        body = await request.body()

        async def prepare(stack: AsyncExitStack) -> Response:
            return Response(await services.upstream.trace(stack, _call(request, body)), media_type="application/json")

        return HeldResponse(prepare, services.metrics)

    return router


async def _register(services: Services, body: RegisterWorker) -> None:
    check_worker_name(body.worker_name)
    status = body.worker_status or await _status_of(services, body.worker_name)
    worker = services.registry.register(
        body.worker_name, status, check_heart_beat=body.check_heart_beat, multimodal=body.multimodal
    )
    if worker.suspect:  # its word alone does not prove that it can be reached
        services.health.probe(worker)


async def _status_of(services: Services, name: str) -> WorkerStatus:
    stranger = Worker(name, WorkerStatus(model_names=[]), last_beat=services.registry.clock())
    return await services.health.poll(stranger)


def _model_of(query: ModelQuery) -> str:
    if query.model is None:
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "model: field required")
    return query.model


def _call(request: Request, body: bytes) -> Call:
    """A request passed on as it came."""
    routed = parse_body(_RoutedBody, body)

    async def unchanged(worker: Worker) -> bytes:
        return body

    return Call(model=_model_of(routed), method=routed.method, request_id=request_id(request), body=unchanged)


async def _proxied(answer: Answer, services: Services) -> AsyncIterator[bytes]:
    try:
        async for frame in answer.frames():
            yield frame + b"\0"
    except WorkerFailed as error:
        services.metrics.broken_answers.inc()
        yield error_frame(error).encode()


def _in_band(error: RequestError) -> Response:
    """FastChat's clients read errors from the stream: exactly one frame, HTTP status 200."""
    if error.code is ErrorCode.INVALID_MODEL:
        error = RequestError(ErrorCode.CONTROLLER_NO_WORKER, error.message)
    return Response(error_frame(error).encode())
