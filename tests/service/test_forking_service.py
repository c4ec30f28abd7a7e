"""Threads over HTTP: deltas by thread beside the growing text, and a client that leaves."""

from collections.abc import Iterator

import pytest

from tests.service.conftest import LiveWorker
from tests.support.processes import idle
from tests.support.serving import served, wait_until
from tests.support.tiny import CHILD, FORK, forking_checkpoint
from workers.engine import Engine
from workers.service import Worker, create_app

BASE = {
    "prompt": "Name some things.",
    "temperature": 0,
    "max_new_tokens": 40,
    "echo": False,
    "logit_bias": {FORK: 6.0},
    "trace": True,
}


@pytest.fixture(scope="module")
def forking() -> Iterator[LiveWorker]:
    with Engine(forking_checkpoint, methods=["apar", "apar+ngram"], kv_tokens=8192) as engine:
        worker = Worker(engine, {"tiny": "apar"})
        with served(create_app(worker)) as url:
            yield LiveWorker(worker, url)


@pytest.fixture(autouse=True)
def nothing_leaks(forking: LiveWorker):
    yield
    wait_until(lambda: idle(forking.url))


def test_deltas_by_thread_stand_beside_the_growing_text(forking: LiveWorker) -> None:
    frames = forking.frames(**BASE, text_deltas=True, logprobs=0)
    deltas = [delta for frame in frames for delta in frame.get("threads", [])]
    tokens = [token for delta in deltas for token in delta["token_ids"]]
    threads = {delta["thread"]: delta.get("parent") for delta in deltas}
    assert len(threads) > 3
    assert all(parent is None if thread == 0 else parent in threads for thread, parent in threads.items())
    assert len(tokens) == frames[-1]["usage"]["completion_tokens"]
    assert CHILD not in tokens
    assert all(len(delta["token_logprobs"]) == len(delta["token_ids"]) for delta in deltas)
    text = "".join(frame["text"] for frame in frames)
    assert text == forking.frames(**BASE)[-1]["text"] == forking.frames(**BASE, method="apar+ngram")[-1]["text"]
    assert "[Fork]" not in text and "[Child]" not in text


@pytest.mark.parametrize("limit", [{"max_threads": 0}, {"max_depth": -1}, {"whitespace": "tabs"}])
def test_a_limit_that_is_none_is_refused_in_one_line(forking: LiveWorker, limit: dict[str, object]) -> None:
    (frame,) = forking.frames(**BASE, **limit)
    assert frame["error_code"] and "\n" not in frame["text"] and next(iter(limit)) in frame["text"]


def test_a_client_that_leaves_in_the_middle_of_many_threads_frees_them_all(forking: LiveWorker) -> None:
    body = {**BASE, "max_new_tokens": 300, "logit_bias": {FORK: 8.0}}
    with forking.client.stream("POST", "/worker_generate_stream", json=body) as response:
        chunks = response.iter_raw()
        while b'"thread": 5' not in next(chunks):
            pass
