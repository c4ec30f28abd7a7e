"""The controller as an ASGI application."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from controller import snapshot
from controller.fastchat_door import fastchat_door
from controller.fleet_door import fleet_door
from controller.openai_door import openai_door
from controller.replies import RequestLog, error_reply
from controller.services import Services
from controller.settings import Settings
from protocol.errors import ErrorCode, RequestError
from protocol.openai import ErrorBody, ErrorReply

log = logging.getLogger(__name__)

_FIRST_LOOK_S = 1.0  # a restarted controller gives the workers it knew so long to answer before it serves


def create_app(settings: Settings) -> FastAPI:
    """A controller with its background work in the lifespan; ``app.state.services`` holds its parts."""
    services = Services(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        path = settings.snapshot_path
        snapshot.load(path, services.registry)
        probes = [services.health.probe(worker) for worker in services.registry.workers.values()]
        if probes:
            await asyncio.wait(probes, timeout=_FIRST_LOOK_S)
        tasks = [
            asyncio.create_task(services.health.run()),
            asyncio.create_task(snapshot.keep_saved(path, services.registry)),
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await services.health.close()
        await services.client.aclose()
        if services.registry.changed.is_set():
            snapshot.save(path, snapshot.take(services.registry))

    app = FastAPI(title="polydecode controller", lifespan=lifespan)
    app.state.services = services
    app.include_router(openai_door(services))
    app.include_router(fastchat_door(services))
    app.include_router(fleet_door(services))
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(RequestLog, metrics=services.metrics)
    return app


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_reply(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ErrorBody(message=str(error.detail), type="invalid_request_error", code=error.status_code)
    return Response(
        ErrorReply(error=body).model_dump_json(), error.status_code, error.headers, media_type="application/json"
    )


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _bug(request: Request, error: Exception) -> Response:
    return error_reply(RequestError(ErrorCode.INTERNAL_ERROR, "internal error"))
