"""Reading ``/v1`` of a controller: the event lines of a chat stream, and an async client around them.

Every failure, on the wire or in the answer, becomes one RequestError with a readable line.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx

from protocol.errors import ErrorCode, RequestError
from protocol.openai import ChatCompletionChunk, ModelCard, ModelList
from protocol.wire import Wire, parse_object

CHAT_PATH = "/v1/chat/completions"
TIMEOUT = httpx.Timeout(10, read=600, pool=None)  # the read timeout is between two chunks, queueing included
_DONE = b"[DONE]"
_CODE_OF_STATUS = {
    404: ErrorCode.INVALID_MODEL,
    429: ErrorCode.ENGINE_OVERLOADED,
    503: ErrorCode.CONTROLLER_NO_WORKER,
    504: ErrorCode.CONTROLLER_WORKER_TIMEOUT,
}


class ChatEvents:
    """Decodes a ``/v1/chat/completions`` stream from chunks with arbitrary borders; notices when it ends early."""

    def __init__(self) -> None:
        self._pending = b""
        self._done = False

    def feed(self, data: bytes) -> Iterator[ChatCompletionChunk]:
        """Yield the chunks that ``data`` completes. Only a line feed ends a line: answers may hold U+2028 and the like.

        Raises:
            RequestError: a line is an error event, or no chunk at all.
        """
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield from self._event(line.removeprefix(b"data:").strip())

    def _event(self, data: bytes) -> Iterator[ChatCompletionChunk]:
        if data == _DONE:
            self._done = True
            return
        try:
            content = json.loads(data)
        except ValueError:
            raise RequestError(ErrorCode.INTERNAL_ERROR, "the controller sent a malformed event") from None
        if isinstance(content, dict) and content.get("error"):
            raise _reported(content["error"], ErrorCode.INTERNAL_ERROR)
        yield parse_object(ChatCompletionChunk, content)

    def finish(self) -> None:
        """Call at the end of the stream: RequestError unless it was complete."""
        if not self._done:
            raise RequestError(ErrorCode.CONTROLLER_WORKER_TIMEOUT, "the stream ended before the answer did")


def reply_error(status: int, body: bytes) -> RequestError:
    """The error that a reply with a status other than 200 stands for."""
    code = _CODE_OF_STATUS.get(status, ErrorCode.VALIDATION_TYPE_ERROR if status < 500 else ErrorCode.INTERNAL_ERROR)
    try:
        return _reported(json.loads(body)["error"], code)
    except (ValueError, KeyError, TypeError):
        return RequestError(code, f"the controller answered with HTTP status {status}")


def _reported(error: Any, default: ErrorCode) -> RequestError:
    fields = error if isinstance(error, dict) else {"message": error}
    code = fields.get("code")
    message = " ".join(str(fields.get("message", "unknown error")).split())
    return RequestError(code if isinstance(code, int) else default, message)


@contextmanager
def readable_transport_errors(url: str) -> Iterator[None]:
    """Turn httpx's exceptions into RequestErrors that name the controller."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise RequestError(ErrorCode.CONTROLLER_NO_WORKER, f"cannot reach the controller at {url}") from None
    except httpx.TimeoutException:
        raise RequestError(ErrorCode.CONTROLLER_WORKER_TIMEOUT, f"the controller at {url} is silent") from None
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise RequestError(ErrorCode.CONTROLLER_WORKER_TIMEOUT, f"lost the controller at {url}: {reason}") from None


class _WorkerCount(Wire):
    count: int


class ControllerClient:
    """Async client of one controller. Proxies of the environment are not used: controllers are near."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # Idle connections are given up before the usual server (5 s) closes them, so that none is found dead in use.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
        self._http = httpx.AsyncClient(trust_env=False, timeout=TIMEOUT, limits=limits)

    async def __aenter__(self) -> "ControllerClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def models(self) -> list[ModelCard]:
        """The cards of ``/v1/models``."""
        return parse_object(ModelList, await self._json("GET", "/v1/models")).data

    async def worker_count(self, model: str) -> int:
        """How many live workers serve ``model``."""
        return parse_object(_WorkerCount, await self._json("POST", "/get_worker_count", {"model": model})).count

    async def stream_chat(self, body: dict[str, Any]) -> AsyncGenerator[ChatCompletionChunk, None]:
        """Ask for a streamed answer and yield its chunks. Closing the iterator closes the connection."""
        events = ChatEvents()
        request = self._http.stream("POST", self.url + CHAT_PATH, json={**body, "stream": True})
        with readable_transport_errors(self.url):
            async with request as reply:
                if reply.status_code != 200:
                    raise reply_error(reply.status_code, await reply.aread())
                async for data in reply.aiter_bytes():
                    for chunk in events.feed(data):
                        yield chunk
        events.finish()

    async def _json(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        with readable_transport_errors(self.url):
            reply = await self._http.request(verb, self.url + path, json=body)
        if reply.status_code != 200:
            raise reply_error(reply.status_code, reply.content)
        try:
            return reply.json()
        except ValueError:
            raise RequestError(ErrorCode.INTERNAL_ERROR, f"{self.url} does not answer like a controller") from None
