"""HTTP answers that free what they hold in one place, request ids, and errors as one readable line."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.metrics import Metrics
from controller.upstream import REQUEST_ID_HEADER
from protocol.errors import RequestError
from protocol.openai import ErrorBody, ErrorReply

log = logging.getLogger(__name__)

Prepare = Callable[[AsyncExitStack], Awaitable[Response]]
_VALID_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def error_reply(error: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    body = ErrorBody(message=error.message, type=error.error_type, code=int(error.code))
    return JSONResponse(ErrorReply(error=body).model_dump(), error.http_status, headers)


def request_id(request: Request) -> str:
    """The id under which this request is known to its client, in the log and at the worker."""
    known: str = request.scope["state"]["request_id"]
    return known


class HeldResponse(Response):
    """A response that holds workers while it is made and sent.

    ``prepare`` puts all that must be released on the stack it is given and returns the response proper. The stack is
    closed here and nowhere else: at the end, on an error, when the server stops, and within a moment of the client's
    leaving, also if the response's body was never started. This does not lean on how a server announces that
    a client left (by a message, or by failing the next send).
    """

    def __init__(
        self,
        prepare: Prepare,
        metrics: Metrics,
        on_error: Callable[[RequestError], Response] = error_reply,
    ) -> None:
        super().__init__()
        self._prepare = prepare
        self._metrics = metrics
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(scope, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self._metrics.client_disconnects.inc()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled() and (error := answering.exception()) is not None:
            if not isinstance(error, OSError | ClientDisconnect):
                raise error
            self._metrics.client_disconnects.inc()

    async def _answer(self, scope: Scope, send: Send) -> None:
        async with AsyncExitStack() as stack:
            try:
                response = await self._prepare(stack)
            except RequestError as error:
                response = self._on_error(error)
            await response(scope, _never, send)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Message:
    return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]


class RequestLog:
    """ASGI middleware: gives every request its id, returns it, and counts and times the request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        offered = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        given = offered if _VALID_REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = given
        started = time.monotonic()
        status = 499  # what proxies log for a client that left before the answer

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = given
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            path = _known_path(scope)
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_s.labels(path).observe(time.monotonic() - started)


def _known_path(scope: Mapping[str, Any]) -> str:
    """The route's pattern, so that strangers' paths do not make metrics without end."""
    return getattr(scope.get("route"), "path", "other")
