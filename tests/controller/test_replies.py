"""What a response holds is freed whatever the server does; and the process itself."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse

from controller.metrics import Metrics
from controller.registry import Registry
from controller.replies import HeldResponse
from controller.settings import Settings
from protocol.errors import ErrorCode, RequestError

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Held:
    """Something that must be freed, behind a stream that never ends."""

    freed = 0

    async def prepare(self, stack: AsyncExitStack) -> Response:
        stack.callback(self.free)
        return StreamingResponse(self.body())

    def free(self) -> None:
        self.freed += 1

    async def body(self) -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0)

    def response(self) -> HeldResponse:
        return HeldResponse(self.prepare, Metrics(Registry(Settings())))


async def _nobody_leaves() -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_freed_when_the_server_announces_a_departure_by_message(spec: str) -> None:
    held, sent = Held(), asyncio.Event()

    async def receive() -> Any:
        await sent.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.set()

    await held.response()(SCOPE | {"asgi": {"spec_version": spec}}, receive, send)
    assert held.freed == 1


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_freed_when_the_server_announces_a_departure_by_failing_to_send(spec: str) -> None:
    held = Held()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    await held.response()(SCOPE | {"asgi": {"spec_version": spec}}, _nobody_leaves, send)
    assert held.freed == 1


async def test_freed_when_the_body_never_starts() -> None:
    held, sending = Held(), asyncio.Event()

    async def send(message: Any) -> None:
        sending.set()
        await asyncio.Event().wait()

    answer = asyncio.create_task(held.response()(SCOPE, _nobody_leaves, send))
    await sending.wait()
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert held.freed == 1


async def test_freed_when_preparing_fails() -> None:
    held, messages = Held(), []

    async def prepare(stack: AsyncExitStack) -> Response:
        await held.prepare(stack)
        raise RequestError(ErrorCode.CONTROLLER_NO_WORKER, "nobody")

    async def send(message: Any) -> None:
        messages.append(message)

    await HeldResponse(prepare, Metrics(Registry(Settings())))(SCOPE, _nobody_leaves, send)
    assert held.freed == 1 and messages[0]["status"] == 503


async def test_freed_on_a_bug_which_is_not_swallowed() -> None:
    held = Held()

    async def prepare(stack: AsyncExitStack) -> Response:
        await held.prepare(stack)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await HeldResponse(prepare, Metrics(Registry(Settings())))(SCOPE, _nobody_leaves, _ignore)
    assert held.freed == 1


async def _ignore(message: Any) -> None:
    pass


def test_the_controller_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, controller.__main__; print(sorted({'torch', 'transformers', 'gradio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_bad_environment_is_one_readable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_WORKER_API_TIMEOUT", "soon")
    done = subprocess.run([sys.executable, "-m", "controller"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: FASTCHAT_WORKER_API_TIMEOUT") and done.stderr.count("\n") == 1
