"""FastChat's controller endpoints, APAR's two, and our additions."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.controller.conftest import Controller, StartWorker
from tests.controller.serving import refused_url, serving, until
from tests.controller.stub_worker import StubWorker

GENERATE = {"model": "stub", "prompt": "Hi", "echo": False}


def frames_of(content: bytes) -> list[dict[str, Any]]:
    assert content.endswith(b"\0")
    return [json.loads(frame) for frame in content[:-1].split(b"\0")]


async def test_connection(controller: Controller) -> None:
    reply = await controller.http.get(f"{controller.url}/test_connection")
    assert reply.json() == "success"


async def test_models_are_listed_by_kind(controller: Controller, start_worker: StartWorker) -> None:
    await start_worker(StubWorker("text"))
    await start_worker(StubWorker("pictures"), multimodal=True)
    assert (await controller.post("/list_models")).json() == {"models": ["pictures", "text"]}
    assert (await controller.post("/list_language_models")).json() == {"models": ["text"]}
    assert (await controller.post("/list_multimodal_models")).json() == {"models": ["pictures"]}


async def test_a_registration_without_status_polls_the_worker(controller: Controller) -> None:
    stub = StubWorker("late")
    async with serving(stub.app) as url:
        reply = await controller.post("/register_worker", {"worker_name": url, "check_heart_beat": False})
        assert (reply.status_code, reply.json()) == (200, None)
    assert controller.registry.models() == ["late"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"worker_name": "nonsense", "worker_status": {"model_names": ["m"]}}',
        b'{"worker_name": "http://", "worker_status": {"model_names": ["m"]}}',
        b'{"worker_name": "http://h:99999", "worker_status": {"model_names": ["m"]}}',
        b'{"worker_name": "http://127.0.0.1:1", "worker_status": {"model_names": []}}',
        b'{"worker_name": "http://127.0.0.1:1", "worker_status": {"speed": 1}}',
        b'{"worker_name": "http://127.0.0.1:1", "worker_status": null}',
    ],
)
async def test_a_registration_that_fails_says_so_with_status_200(controller: Controller, body: bytes) -> None:
    reply = await controller.http.post(f"{controller.url}/register_worker", content=body)
    assert reply.status_code == 200
    assert reply.json().keys() == {"error"} and "\n" not in reply.json()["error"]
    assert controller.registry.workers == {}


async def test_a_registration_of_a_silent_worker_ends_within_the_poll_timeout(controller: Controller) -> None:
    controller.services.settings.poll_timeout_s = 0.05
    stub = StubWorker()
    stub.status_silent = True
    async with serving(stub.app) as url:
        reply = await controller.post("/register_worker", {"worker_name": url, "check_heart_beat": True})
        assert "in time" in reply.json()["error"]
        stub.go_on.set()


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"worker_name": 5}', b'{"worker_name": "http://a", "queue_length": "x"}']
)
async def test_a_malformed_heart_beat_gets_the_dict_that_workers_index(controller: Controller, body: bytes) -> None:
    reply = await controller.http.post(f"{controller.url}/receive_heart_beat", content=body)
    assert (reply.status_code, reply.json()) == (200, {"exist": False})


async def test_heart_beats_of_known_and_unknown_workers(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker(own=False)
    url = await start_worker(stub)
    beat = {"worker_name": url, "queue_length": 3}
    assert (await controller.post("/receive_heart_beat", beat)).json() == {"exist": True}
    assert controller.registry.load(controller.registry.workers[url]) == 3
    unknown = {"worker_name": "http://127.0.0.1:1", "queue_length": 0}
    assert (await controller.post("/receive_heart_beat", unknown)).json() == {"exist": False}


@pytest.mark.parametrize(
    "path", ["/get_worker_address", "/get_worker_count", "/unregister_worker", "/worker_trace", "/v1/completions"]
)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 1}', b'"text"'])
async def test_malformed_bodies_get_one_readable_line(controller: Controller, path: str, body: bytes) -> None:
    reply = await controller.http.post(controller.url + path, content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] and "\n" not in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 1}', b'"text"'])
async def test_a_malformed_stream_request_gets_one_error_frame(controller: Controller, body: bytes) -> None:
    reply = await controller.http.post(f"{controller.url}/worker_generate_stream", content=body)
    (frame,) = frames_of(reply.content)
    assert reply.status_code == 200 and frame["error_code"] == 40001 and "\n" not in frame["text"]


async def test_the_proxy_passes_bodies_and_frames_unchanged(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.decorate = lambda index, frame: frame | {"cumulative_logprob": -1.5}
    url = await start_worker(stub)
    body = GENERATE | {"unknown": [1, None]}
    proxied = await controller.post("/worker_generate_stream", body, headers={"x-request-id": "abc"})
    direct = await controller.http.post(f"{url}/worker_generate_stream", json=body)
    assert proxied.content == direct.content
    assert stub.requests[0] == body and stub.request_ids[0] == "abc"
    assert frames_of(proxied.content)[-1]["cumulative_logprob"] == -1.5


@pytest.mark.parametrize("known", [False, True])
async def test_a_model_that_nobody_serves_gets_exactly_one_frame(
    controller: Controller, start_worker: StartWorker, known: bool
) -> None:
    if known:
        url = await start_worker(StubWorker())
        await controller.post("/unregister_worker", {"worker_name": url})
    reply = await controller.post("/worker_generate_stream", GENERATE)
    (frame,) = frames_of(reply.content)
    assert reply.status_code == 200 and frame["error_code"] == 50005


async def test_the_proxy_ends_a_broken_answer_with_an_error_frame(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker()
    stub.break_at, stub.break_how = 2, "die"
    await start_worker(stub)
    *text, error = frames_of((await controller.post("/worker_generate_stream", GENERATE)).content)
    assert [frame["text"] for frame in text] == ["Hel", "Hello "]
    assert error["error_code"] == 50006 and error["text"]
    assert controller.in_flight() == 0


async def test_a_worker_silent_for_too_long_ends_in_an_error_frame(
    controller: Controller, start_worker: StartWorker
) -> None:
    controller.services.settings.worker_api_timeout_s = 0.2
    stub = StubWorker()
    stub.break_at = 1
    await start_worker(stub)
    text, error = frames_of((await controller.post("/worker_generate_stream", GENERATE)).content)
    assert text["text"] == "Hel" and error["error_code"] == 50006
    await until(lambda: stub.live == 0)


async def test_the_proxy_fails_over_before_the_first_frame(controller: Controller, start_worker: StartWorker) -> None:
    dying = StubWorker()
    dying.break_at, dying.break_how = 0, "die"
    await start_worker(dying)
    await start_worker(StubWorker())
    frames = frames_of((await controller.post("/worker_generate_stream", GENERATE)).content)
    assert frames[-1]["text"] == "Hello wörld" and frames[-1]["error_code"] == 0


@pytest.mark.parametrize("break_at", [0, 1])
async def test_a_proxy_client_that_leaves_stops_the_worker(
    controller: Controller, start_worker: StartWorker, break_at: int
) -> None:
    stub = StubWorker()
    stub.break_at = break_at
    await start_worker(stub)
    request = asyncio.create_task(controller.post("/worker_generate_stream", GENERATE))
    await until(lambda: stub.live == 1)
    request.cancel()
    await until(lambda: stub.live == 0 and controller.in_flight() == 0)


async def test_addresses_go_round_and_are_empty_without_a_worker(
    controller: Controller, start_worker: StartWorker
) -> None:
    urls = [await start_worker(StubWorker()) for _ in range(3)]
    given = [(await controller.post("/get_worker_address", {"model": "stub"})).json()["address"] for _ in range(6)]
    assert sorted(given) == sorted(urls * 2)
    assert (await controller.post("/get_worker_address", {"model": "none"})).json() == {"address": ""}


async def test_worker_count_is_that_of_the_healthy_workers(controller: Controller, start_worker: StartWorker) -> None:
    draining = StubWorker()
    draining.draining = True
    for stub in (StubWorker(), StubWorker(), draining):
        await start_worker(stub)
    assert (await controller.post("/get_worker_count", {"model": "stub"})).json() == {"count": 2}
    assert (await controller.post("/get_worker_count", {"model": "none"})).json() == {"count": 0}


async def test_status_sums_up_the_fleet_for_a_parent(controller: Controller, start_worker: StartWorker) -> None:
    for names, queue in ((("a", "b"), 2), (("b",), 3)):
        stub = StubWorker(*names)
        stub.queue_length = queue
        await start_worker(stub)
    status = (await controller.post("/worker_get_status")).json()
    assert status == {"model_names": ["a", "b"], "speed": 2, "queue_length": 5}


async def test_a_controller_can_register_with_a_parent(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    await start_worker(stub)
    reply = await controller.post("/register_worker", {"worker_name": controller.url, "check_heart_beat": False})
    assert reply.json() is None and controller.registry.workers[controller.url].status.model_names == ["stub"]


async def test_refresh_keeps_busy_workers_and_never_empties_the_table(
    controller: Controller, start_worker: StartWorker
) -> None:
    controller.services.settings.poll_timeout_s = 0.1
    silent, answering = StubWorker("busy"), StubWorker("free")
    silent.status_silent = True
    await start_worker(silent)
    await start_worker(answering)
    await controller.register(refused_url(), StubWorker("dead"))
    refresh = asyncio.create_task(controller.post("/refresh_all_workers"))
    await until(lambda: len(silent.calls) == 1)
    assert {"busy", "free"} <= set((await controller.post("/list_models")).json()["models"])
    assert (await refresh).json() is None
    assert controller.registry.models() == ["busy", "free"]


async def test_refreshes_at_the_same_time_poll_once(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.status_silent = True
    await start_worker(stub)
    refreshes = [asyncio.create_task(controller.services.health.refresh()) for _ in range(10)]
    await until(lambda: stub.calls)
    stub.go_on.set()
    await asyncio.gather(*refreshes)
    assert len(stub.calls) == 1


async def test_silent_workers_do_not_hold_up_the_other_endpoints(
    controller: Controller, start_worker: StartWorker
) -> None:
    silent = StubWorker("silent")
    silent.status_silent = True
    await start_worker(silent)
    url = await start_worker(StubWorker())
    refresh = asyncio.create_task(controller.post("/refresh_all_workers"))
    await until(lambda: silent.calls)
    assert (await controller.post("/get_worker_address", {"model": "stub"})).json() == {"address": url}
    assert not refresh.done()
    silent.go_on.set()
    await refresh


async def test_worker_trace_is_proxied(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    await start_worker(stub)
    body = {"model": "stub", "prompts": "Once", "max_length": 64}
    assert (await controller.post("/worker_trace", body)).json() == {"responses": [["Once"]]}
    assert stub.requests == [body]


async def test_worker_trace_outlives_the_api_timeout_and_ends_with_its_client(
    controller: Controller, start_worker: StartWorker
) -> None:
    controller.services.settings.worker_api_timeout_s = 0.01
    stub = StubWorker()
    stub.break_at = 0
    await start_worker(stub)
    body = {"model": "stub", "prompts": "Once"}
    first, second = (asyncio.create_task(controller.post("/worker_trace", body)) for _ in range(2))
    await until(lambda: stub.live == 2)
    second.cancel()
    await until(lambda: stub.live == 1 and controller.in_flight() == 1)
    stub.go_on.set()
    assert (await first).json() == {"responses": [["Once"]]}


async def test_worker_trace_ends_when_its_worker_is_lost(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.break_at = 0
    url = await start_worker(stub)
    trace = asyncio.create_task(controller.post("/worker_trace", {"model": "stub", "prompts": "Once"}))
    await until(lambda: stub.live == 1)
    controller.registry.workers[url].last_beat -= 1000
    reply = await trace
    assert reply.status_code == 504 and "lost" in reply.json()["error"]["message"]
    await until(lambda: stub.live == 0)


async def test_unregistering_twice_is_no_error(controller: Controller, start_worker: StartWorker) -> None:
    url = await start_worker(StubWorker())
    for _ in range(2):
        reply: httpx.Response = await controller.post("/unregister_worker", {"worker_name": url})
        assert (reply.status_code, reply.json()) == (200, None)
    assert controller.registry.models() == []


async def test_an_answer_goes_on_after_its_worker_unregistered(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker()
    stub.break_at = 1
    url = await start_worker(stub)
    answer = asyncio.create_task(controller.post("/worker_generate_stream", GENERATE))
    await until(lambda: stub.live == 1)
    await controller.post("/unregister_worker", {"worker_name": url})
    stub.go_on.set()
    assert frames_of((await answer).content)[-1]["text"] == "Hello wörld"


async def test_fleet_health_and_metrics(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker(methods=("vanilla", "ngram"))
    stub.queue_length = 2
    url = await start_worker(stub)
    await controller.register(url.replace("http://", "http://user:secret@"), StubWorker("other"))
    await controller.post("/worker_generate_stream", GENERATE)
    fleet = (await controller.http.get(f"{controller.url}/fleet")).json()
    assert fleet["dispatch_method"] == "shortest_queue"
    worker, hidden = fleet["workers"]
    assert worker["name"] == url and worker["methods"] == ["vanilla", "ngram"]
    assert (worker["health"], worker["load"], worker["own"]) == ("ok", 2, True)
    assert "secret" not in json.dumps(hidden)
    health = (await controller.http.get(f"{controller.url}/health")).json()
    assert health == {"status": "ok", "models": ["other", "stub"]}
    metrics = (await controller.http.get(f"{controller.url}/metrics")).text
    assert 'polydecode_requests_total{path="/worker_generate_stream",status="200"} 1.0' in metrics
    assert f'polydecode_worker_load{{worker="{url}"}} 2.0' in metrics
    assert 'polydecode_workers{health="ok"} 2.0' in metrics
    assert "secret" not in metrics
