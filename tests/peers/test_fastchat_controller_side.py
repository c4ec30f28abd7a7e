"""FastChat's own programs against our controller, each in a process of its own."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.controller.conftest import Controller, StartWorker, controller, official_client, settings, start_worker
from tests.controller.serving import refused_url, until
from tests.controller.stub_worker import StubWorker

pytest.importorskip("fastchat")

__all__ = ["controller", "settings", "start_worker"]  # fixtures

HERE = Path(__file__).parent
HELLO: Any = [{"role": "user", "content": "Hi"}]
PATIENCE_S = 120  # FastChat imports torch and transformers
ENVIRONMENT = os.environ | {
    "LOGDIR": "",
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "1",
}


@contextlib.asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process that is killed at the end; its output is read together."""
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=ENVIRONMENT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
        await running.communicate()


async def listening(url: str, running: asyncio.subprocess.Process) -> None:
    """Wait until something answers at ``url``."""
    async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(PATIENCE_S):
        while True:
            assert running.returncode is None, "the process ended"
            with contextlib.suppress(httpx.TransportError):
                await http.get(url)
                return
            await asyncio.sleep(0.1)


async def test_fastchats_api_server_answers_through_our_controller(
    controller: Controller, start_worker: StartWorker
) -> None:
    await start_worker(StubWorker("vicuna-stub", own=False))
    url = refused_url()
    port = url.rpartition(":")[2]
    program = (str(HERE / "fastchat_api_server.py"), "--port", port, "--host", "127.0.0.1")
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(process(*program, "--controller-address", controller.url))
        await listening(url, server)
        client = await stack.enter_async_context(official_client(url))
        assert [model.id for model in (await client.models.list()).data] == ["vicuna-stub"]
        whole = await client.chat.completions.create(model="vicuna-stub", messages=HELLO)
        assert whole.choices[0].message.content == "Hello wörld"
        stream = await client.chat.completions.create(model="vicuna-stub", messages=HELLO, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello wörld"


async def test_fastchats_test_message_gets_its_answer(controller: Controller, start_worker: StartWorker) -> None:
    await start_worker(StubWorker("vicuna-stub"))
    arguments = ("-m", "fastchat.serve.test_message", "--controller-address", controller.url)
    async with process(*arguments, "--model-name", "vicuna-stub", "--message", "Hi") as client:
        assert client.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            output = (await client.stdout.read()).decode()
    assert "ASSISTANT: Hello wörld" in output


async def test_a_real_fastchat_worker_registers_beats_and_answers(controller: Controller) -> None:
    url = refused_url()
    program = (str(HERE / "fastchat_model_worker.py"), "--controller", controller.url)
    async with process(*program, "--port", url.rpartition(":")[2]) as worker:
        await listening(url, worker)
        assert controller.registry.models() == ["vicuna-words"]
        answer = await controller.openai.chat.completions.create(model="vicuna-words", messages=HELLO)
        assert answer.choices[0].message.content == "FastChat says hello"
        stream = await controller.openai.chat.completions.create(model="vicuna-words", messages=HELLO, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "FastChat says hello"
        # Forgotten by a controller that lost its memory, it comes back with its next heart beat.
        controller.registry.unregister(url)
        await until(lambda: controller.registry.models() == ["vicuna-words"])
