"""A worker without a model: speaks the protocol, and fails in every way that a worker can fail."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

Frame = dict[str, Any]
VICUNA = {
    "name": "vicuna_v1.1",
    "system_template": "{system_message}",
    "system_message": "A chat.",
    "roles": ["USER", "ASSISTANT"],
    "messages": [],
    "offset": 0,
    "sep_style": 2,
    "sep": " ",
    "sep2": "</s>",
    "stop_str": "###",
    "stop_token_ids": [2],
}


class Crash(Exception):
    """Raised inside an answer: the server cuts the connection."""


class StubWorker:
    """Set ``break_at``/``break_how`` to fail after that many frames: "die", "hang" or "end"."""

    def __init__(
        self,
        *models: str,
        own: bool = True,
        words: tuple[str, ...] = ("Hel", "lo ", "wörld"),
        methods: Any = ("vanilla",),
    ) -> None:
        self.models = list(models or ("stub",))
        self.own = own
        self.words = words
        self.methods = list(methods)
        self.incarnation = uuid.uuid4().hex if own else None
        self.queue_length = 0
        self.speed: float = 1
        self.draining = False
        self.running: int | None = None
        self.last_progress_s: float | None = None
        self.conv: dict[str, Any] = dict(VICUNA)
        self.context_length = 2048
        self.error: tuple[int, str] | None = None  # answered instead of text
        self.http_status = 200
        self.status_silent = False  # /worker_get_status never answers
        self.break_at: int | None = None
        self.break_how = "hang"
        self.decorate: Callable[[int, Frame], Frame] = lambda index, frame: frame
        self.live = 0
        self.calls: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.request_ids: list[str | None] = []
        self.go_on = asyncio.Event()
        paths = {
            "/worker_generate_stream": self._generate_stream,
            "/worker_generate": self._generate,
            "/worker_get_status": self._get_status,
            "/worker_get_conv_template": self._conv_template,
            "/model_details": self._model_details,
            "/count_token": self._count_token,
            "/worker_trace": self._trace,
        }
        self.app = Starlette(routes=[Route(path, call, methods=["POST"]) for path, call in paths.items()])

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "model_names": self.models,
            "speed": self.speed,
            "queue_length": self.queue_length,
        }
        if self.own:
            status |= {
                "running": self.running,
                "last_progress_s": self.last_progress_s,
                "incarnation": self.incarnation,
                "methods": self.methods,
                "heart_beat_s": 60,
                "draining": self.draining,
            }
        return status

    async def _generate_stream(self, request: Request) -> Response:
        params = await self._note(request)
        if self.http_status != 200:
            return PlainTextResponse("Internal Server Error", self.http_status)
        return StreamingResponse(self._frames(params))

    async def _generate(self, request: Request) -> Response:
        frames = [frame async for frame in self._frames(await self._note(request))]
        return JSONResponse(json.loads(frames[-1][:-1]))

    async def _frames(self, params: dict[str, Any]) -> AsyncIterator[bytes]:
        self.live += 1
        try:
            for index, frame in enumerate(self._answer(params)):
                if index == self.break_at:
                    if self.break_how == "die":
                        raise Crash
                    if self.break_how == "end":
                        return
                    await self.go_on.wait()
                yield json.dumps(self.decorate(index, frame)).encode() + b"\0"
        finally:
            self.live -= 1

    def _answer(self, params: dict[str, Any]) -> list[Frame]:
        if self.error is not None:
            code, message = self.error
            return [{"text": message, "error_code": code}]
        deltas = self.own and params.get("text_deltas", False)
        text = params["prompt"] if params.get("echo", True) and params.get("prompt") else ""
        pieces = [text, *self.words] if text else list(self.words)
        frames = []
        sent = ""
        for count, piece in enumerate(pieces, start=1):
            sent += piece
            frames.append(self._frame(piece if deltas else sent, count, cumulative=not deltas))
        last = self._frame("" if deltas else sent, len(pieces), cumulative=not deltas)
        return [*frames, last | {"finish_reason": "stop"}]

    def _frame(self, text: str, count: int, *, cumulative: bool) -> Frame:
        usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}
        frame: Frame = {"text": text, "error_code": 0, "usage": usage, "finish_reason": None, "logprobs": None}
        return frame if cumulative else frame | {"cumulative": False}

    async def _get_status(self, request: Request) -> Response:
        self.calls.append("/worker_get_status")
        if self.status_silent:
            await self.go_on.wait()
        return JSONResponse(self.status)

    async def _conv_template(self, request: Request) -> Response:
        self.calls.append("/worker_get_conv_template")
        return JSONResponse({"conv": self.conv})

    async def _model_details(self, request: Request) -> Response:
        self.calls.append("/model_details")
        return JSONResponse({"context_length": self.context_length})

    async def _count_token(self, request: Request) -> Response:
        self.calls.append("/count_token")
        return JSONResponse({"count": len((await request.json())["prompt"].split()), "error_code": 0})

    async def _trace(self, request: Request) -> Response:
        params = await self._note(request)
        self.live += 1
        try:
            if self.break_at == 0:
                await self._go_on_or_client_gone(request)
        finally:
            self.live -= 1
        return JSONResponse({"responses": [[params["prompts"]]]})

    async def _go_on_or_client_gone(self, request: Request) -> None:
        waits = [asyncio.ensure_future(wait) for wait in (self.go_on.wait(), request.receive())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _note(self, request: Request) -> dict[str, Any]:
        params: dict[str, Any] = await request.json()
        self.calls.append(request.url.path)
        self.requests.append(params)
        self.request_ids.append(request.headers.get("x-request-id"))
        return params
