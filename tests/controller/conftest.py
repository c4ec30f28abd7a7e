"""A controller on a real socket, and a way to start stub workers and register them."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from controller.app import create_app
from controller.registry import Registry
from controller.services import Services
from controller.settings import Settings
from tests.controller.serving import serving
from tests.controller.stub_worker import StubWorker


class Controller:
    """A running controller under test."""

    def __init__(self, url: str, services: Services, http: httpx.AsyncClient) -> None:
        self.url = url
        self.services = services
        self.http = http
        self.openai = official_client(url)

    @property
    def registry(self) -> Registry:
        return self.services.registry

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.http.post(self.url + path, json=body, **options)

    async def register(self, url: str, stub: StubWorker, **more: Any) -> None:
        body = {"worker_name": url, "check_heart_beat": True, "worker_status": stub.status} | more
        reply = await self.post("/register_worker", body)
        assert (reply.status_code, reply.json()) == (200, None)

    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self.registry.workers.values())


def official_client(url: str) -> Any:
    """OpenAI's own client; ``Any``, as its types want literals that tests do not write out."""
    plain = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=plain)


StartWorker = Callable[..., Awaitable[str]]


@contextlib.asynccontextmanager
async def running_controller(settings: Settings) -> AsyncIterator[Controller]:
    app = create_app(settings)
    async with serving(app) as url, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        running = Controller(url, app.state.services, http)
        async with running.openai:
            yield running


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_file=tmp_path / "state.json", check_interval_s=0.02, poll_timeout_s=2)


@pytest.fixture
async def controller(settings: Settings) -> AsyncIterator[Controller]:
    async with running_controller(settings) as running:
        yield running


@pytest.fixture
async def start_worker(controller: Controller) -> AsyncIterator[StartWorker]:
    """Serve a stub and register it; returns its URL."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(stub: StubWorker, **registration: Any) -> str:
            stack.callback(stub.go_on.set)
            url = await stack.enter_async_context(serving(stub.app))
            await controller.register(url, stub, **registration)
            return url

        yield start
