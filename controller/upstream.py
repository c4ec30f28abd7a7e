"""An answer in the making at a worker: opened with failover, read frame by frame, closed with its lease."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

import httpx

from controller.calls import Failure, WorkerFailed, check_status, transport_errors
from controller.dispatch import VANILLA, Dispatcher
from controller.health import HealthChecker
from controller.metrics import Metrics
from controller.registry import Registry
from controller.worker import Health, Worker
from protocol.errors import ErrorCode, RequestError
from protocol.generation import parse_frame

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """What is wanted of a worker; ``body`` makes the JSON for the one that was chosen."""

    model: str
    request_id: str
    body: Callable[[Worker], Awaitable[bytes]]
    method: str | None = None


class Answer:
    """Encoded frames of one answer; the first has already arrived."""

    def __init__(self, worker: Worker, first: bytes, rest: AsyncIterator[bytes], health: HealthChecker) -> None:
        self.worker = worker
        self._first = first
        self._rest = rest
        self._health = health

    async def frames(self) -> AsyncIterator[bytes]:
        """All frames without their NUL; WorkerFailed if the worker dies or falls silent in the middle."""
        yield self._first
        try:
            async for frame in self._rest:
                yield frame
        except WorkerFailed as error:
            self._health.failed(self.worker, error)
            raise


class Upstream:
    """Sends requests to workers. A request belongs to an exit stack: its closing frees connection and lease."""

    def __init__(
        self,
        registry: Registry,
        dispatcher: Dispatcher,
        health: HealthChecker,
        client: httpx.AsyncClient,
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._dispatcher = dispatcher
        self._health = health
        self._client = client
        self._metrics = metrics

    async def open(self, stack: AsyncExitStack, call: Call) -> Answer:
        """Start an answer and wait for its first frame, trying one worker after another until one gives it.

        Raises:
            RequestError: nobody serves the model, no worker could answer, or the worker refuses the request.
        """
        return await self._failover(stack, call, self._first_frame)

    async def trace(self, stack: AsyncExitStack, call: Call) -> bytes:
        """The whole answer of ``/worker_trace``. It may take as long as the worker is alive and makes progress.

        Raises:
            RequestError: as :meth:`open`, or the worker was lost.
        """
        return await self._failover(stack, call, self._whole_trace)

    async def _failover(
        self,
        stack: AsyncExitStack,
        call: Call,
        begin: Callable[[AsyncExitStack, Worker, Call], Awaitable[Result]],
    ) -> Result:
        tried: list[Worker] = []
        failure: RequestError = self._registry.nobody_serves(call.model)
        while (worker := self._dispatcher.pick(call.model, call.method, avoid=tried)) is not None:
            tried.append(worker)
            _check_method(worker, call)
            try:
                async with AsyncExitStack() as attempt:
                    attempt.enter_context(self._dispatcher.lease(worker))
                    self._metrics.dispatched.labels(worker.label).inc()
                    result = await begin(attempt, worker, call)
                    stack.push_async_exit(attempt.pop_all())
                    return result
            except WorkerFailed as error:
                log.warning("request %s: a worker failed before its first frame", call.request_id)
                self._metrics.worker_failures.labels(worker.label, error.failure.label).inc()
                self._health.failed(worker, error)
                failure = error
        raise failure

    async def _first_frame(self, attempt: AsyncExitStack, worker: Worker, call: Call) -> Answer:
        started = time.monotonic()
        response = await self._send(attempt, worker, call, "/worker_generate_stream")
        rest = _frames(response)
        try:
            first = await anext(rest)
        except StopAsyncIteration:
            raise WorkerFailed(Failure.REFUSED, "the worker ended its answer before it began") from None
        frame_error = _overload_in(first)
        if frame_error is not None:
            raise frame_error
        self._metrics.first_frame_s.observe(time.monotonic() - started)
        return Answer(worker, first, rest, self._health)

    async def _whole_trace(self, attempt: AsyncExitStack, worker: Worker, call: Call) -> bytes:
        async def fetch() -> bytes:
            async with AsyncExitStack() as connection:
                response = await self._send(connection, worker, call, "/worker_trace", patient=True)
                with transport_errors():
                    return await response.aread()

        fetching = asyncio.create_task(fetch())
        attempt.push_async_callback(_cancelled, fetching)
        while not fetching.done():
            await asyncio.wait([fetching], timeout=self._registry.settings.check_interval_s)
            if not fetching.done() and (worker.gone or self._registry.health(worker) is Health.STALLED):
                raise RequestError(ErrorCode.CONTROLLER_WORKER_TIMEOUT, "the worker was lost during the trace")
        return fetching.result()

    async def _send(
        self, attempt: AsyncExitStack, worker: Worker, call: Call, path: str, *, patient: bool = False
    ) -> httpx.Response:
        """POST and wait for the headers; ``patient`` waits without limit."""
        settings = self._registry.settings
        silence_s = None if patient else settings.worker_api_timeout_s
        timeout = httpx.Timeout(silence_s, connect=settings.connect_timeout_s, pool=None)
        headers = {"content-type": "application/json", REQUEST_ID_HEADER: call.request_id}
        body = await call.body(worker)
        with transport_errors():
            response = await attempt.enter_async_context(
                self._client.stream("POST", worker.url(path), content=body, headers=headers, timeout=timeout)
            )
        check_status(response)
        return response


def _check_method(worker: Worker, call: Call) -> None:
    """FastChat's workers would not refuse a method but ignore it."""
    if not worker.own and call.method not in (None, VANILLA):
        message = f"method: model {call.model!r} runs on a FastChat worker, which only knows {VANILLA!r}"
        raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, message)


async def _frames(response: httpx.Response) -> AsyncIterator[bytes]:
    pending = b""
    with transport_errors():
        async for chunk in response.aiter_bytes():
            *complete, pending = (pending + chunk).split(b"\0")
            for frame in filter(None, complete):
                yield frame
    if pending:
        raise WorkerFailed(Failure.DIED, "the worker ended in the middle of a frame")


def _overload_in(frame: bytes) -> WorkerFailed | None:
    """A full queue is told in a frame; another worker may have room."""
    if f'"error_code": {int(ErrorCode.ENGINE_OVERLOADED)}'.encode() not in frame:
        return None
    parsed = parse_frame(frame)
    if parsed.error_code != ErrorCode.ENGINE_OVERLOADED:
        return None
    return WorkerFailed(Failure.OVERLOADED, parsed.text)


async def _cancelled(task: "asyncio.Task[bytes]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
