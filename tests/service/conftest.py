"""A real worker on a tiny model, behind a real socket."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.support.families import tiny_model
from tests.support.processes import metrics
from tests.support.serving import served
from tests.support.tokenizers import byte_tokenizer
from workers.engine import Engine
from workers.model.checkpoint import Checkpoint
from workers.service import Worker, create_app

CONTEXT = 4096  # long enough that no answer ends before its client has left


class LiveWorker:
    """A served worker, its metrics, and a client."""

    def __init__(self, worker: Worker, url: str) -> None:
        self.worker = worker
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def metrics(self) -> dict[str, float]:
        return metrics(self.url)

    def frames(self, **params: object) -> list[dict]:
        body = self.client.post("/worker_generate_stream", json=params).content
        return [json.loads(frame) for frame in body.split(b"\0") if frame]


@pytest.fixture(scope="session")
def live() -> Iterator[LiveWorker]:
    checkpoint = Checkpoint("tiny-llama", tiny_model("llama"), byte_tokenizer())
    checkpoint.model.config.max_position_embeddings = CONTEXT
    with Engine(lambda: checkpoint, kv_tokens=4 * CONTEXT) as engine:
        worker = Worker(engine, {"tiny": "vanilla"})
        with served(create_app(worker)) as url:
            yield LiveWorker(worker, url)
