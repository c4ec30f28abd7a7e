"""A real worker on a tiny model, behind a real socket."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.serving import Served, serve
from tests.support.tiny import tiny_engine
from workers.service import Worker, create_app


class LiveWorker:
    """A served worker, its metrics, and a client."""

    def __init__(self, worker: Worker, served: Served) -> None:
        self.worker = worker
        self.url = served.url
        self.client = httpx.Client(base_url=served.url, timeout=60, trust_env=False)

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}

    def frames(self, **params: object) -> list[dict]:
        import json

        body = self.client.post("/worker_generate_stream", json=params).content
        return [json.loads(frame) for frame in body.split(b"\0") if frame]


@pytest.fixture(scope="session")
def live() -> Iterator[LiveWorker]:
    with tiny_engine() as engine:
        worker = Worker(engine, {"tiny": "vanilla"})
        with serve(create_app(worker)) as served:
            yield LiveWorker(worker, served)
