"""Calling a worker over HTTP, with every way in which that can fail named."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import httpx

from controller.settings import Settings
from controller.worker import Worker
from protocol.errors import ErrorCode, RequestError
from protocol.wire import Message, Wire, parse_body


class Failure(Enum):
    """How a worker failed, with the error code that a client sees if no other worker can step in."""

    UNREACHABLE = ("unreachable", ErrorCode.CONTROLLER_NO_WORKER)
    DIED = ("died", ErrorCode.CONTROLLER_WORKER_TIMEOUT)
    TIMEOUT = ("timeout", ErrorCode.CONTROLLER_WORKER_TIMEOUT)
    OVERLOADED = ("overloaded", ErrorCode.ENGINE_OVERLOADED)
    REFUSED = ("refused", ErrorCode.INTERNAL_ERROR)

    def __init__(self, label: str, code: ErrorCode) -> None:
        self.label = label
        self.code = code


class WorkerFailed(RequestError):
    """A worker did not do its part. Before the first frame another worker may be asked instead."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(failure.code, message)
        self.failure = failure


@contextmanager
def transport_errors() -> Iterator[None]:
    """Turn httpx's exceptions into :class:`WorkerFailed`."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise WorkerFailed(Failure.UNREACHABLE, "the worker could not be reached") from error
    except (httpx.TimeoutException, TimeoutError) as error:
        raise WorkerFailed(Failure.TIMEOUT, "the worker gave no sign of life in time") from error
    except httpx.HTTPError as error:
        raise WorkerFailed(Failure.DIED, "the connection to the worker broke") from error


def check_status(response: httpx.Response) -> None:
    """Raise WorkerFailed unless the worker answered 200."""
    if response.status_code == 200:
        return
    failure = Failure.OVERLOADED if response.status_code in (429, 503) else Failure.REFUSED
    raise WorkerFailed(failure, f"the worker answered with HTTP status {response.status_code}")


def pooled_client(settings: Settings) -> httpx.AsyncClient:
    """The one client of a controller: no proxies, no limit on connections, silence limited per chunk."""
    timeout = httpx.Timeout(settings.worker_api_timeout_s, connect=settings.connect_timeout_s, pool=None)
    # Idle connections are given up before the usual server (5 s) closes them, so that none is found dead in use.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=2)
    return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)


async def ask(
    client: httpx.AsyncClient, worker: Worker, path: str, body: Wire, kind: type[Message], timeout_s: float
) -> Message:
    """POST ``body`` to a worker and parse its JSON answer, within ``timeout_s`` seconds altogether.

    Raises:
        WorkerFailed: it could not be reached, was too slow, or answered nonsense.
    """
    with transport_errors():
        async with asyncio.timeout(timeout_s):
            response = await client.post(worker.url(path), json=body.model_dump(mode="json", exclude_none=True))
    check_status(response)
    try:
        return parse_body(kind, response.content)
    except RequestError as error:
        raise WorkerFailed(Failure.REFUSED, f"the worker's answer to {path} is malformed: {error.message}") from None
