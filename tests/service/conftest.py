"""A real worker on a tiny model, behind a real socket."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.support.serving import served
from tests.support.tiny import tiny_engine
from workers.service import Worker, create_app


class LiveWorker:
    """A served worker, its metrics, and a client."""

    def __init__(self, worker: Worker, url: str) -> None:
        self.worker = worker
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def metrics(self) -> dict[str, float]:
        return parse_metrics(self.client.get("/metrics").text)

    def frames(self, **params: object) -> list[dict]:
        body = self.client.post("/worker_generate_stream", json=params).content
        return [json.loads(frame) for frame in body.split(b"\0") if frame]


def parse_metrics(text: str) -> dict[str, float]:
    lines = text.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}


@pytest.fixture(scope="session")
def live() -> Iterator[LiveWorker]:
    with tiny_engine() as engine:
        worker = Worker(engine, {"tiny": "vanilla"})
        with served(create_app(worker)) as url:
            yield LiveWorker(worker, url)
