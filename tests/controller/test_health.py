"""Suspicion, probes, and what a controller remembers between runs."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from controller.registry import Registry
from controller.settings import Settings
from tests.controller.conftest import Controller, StartWorker, running_controller
from tests.controller.serving import refused_url, serving, until
from tests.controller.stub_worker import StubWorker

CHAT = {"model": "stub", "messages": [{"role": "user", "content": "Hi"}]}


async def test_a_dead_worker_is_suspect_at_once_and_back_when_it_answers(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub, spare = StubWorker(), StubWorker()
    async with serving(stub.app) as url:
        port = int(url.rpartition(":")[2])
        await controller.register(url, stub)
    await start_worker(spare)
    for _ in range(3):
        assert (await controller.post("/v1/chat/completions", CHAT)).status_code == 200
    worker = controller.registry.workers[url]
    assert worker.suspect and len(spare.requests) == 3
    async with serving(stub.app, port):
        await until(lambda: not worker.suspect)
        for _ in range(2):
            await controller.post("/v1/chat/completions", CHAT)
        assert len(stub.requests) == 1


async def test_a_zombie_that_only_beats_gets_no_requests(controller: Controller) -> None:
    url, stub = refused_url(), StubWorker()
    await controller.register(url, stub)
    assert (await controller.post("/v1/chat/completions", CHAT)).status_code == 503
    beat = {"worker_name": url, "queue_length": 0, "incarnation": stub.incarnation}
    assert (await controller.post("/receive_heart_beat", beat)).json() == {"exist": True}
    await controller.services.health.probe(controller.registry.workers[url])
    assert (await controller.post("/get_worker_address", {"model": "stub"})).json() == {"address": ""}
    await controller.register(url, stub)
    assert (await controller.post("/get_worker_address", {"model": "stub"})).json() == {"address": ""}


async def test_late_workers_are_dropped_by_the_running_loop(controller: Controller, start_worker: StartWorker) -> None:
    url = await start_worker(StubWorker())
    controller.registry.workers[url].last_beat -= 1000
    await until(lambda: not controller.registry.workers)
    assert (await controller.post("/v1/chat/completions", CHAT)).status_code == 503


async def test_the_check_loop_survives_exceptions(
    controller: Controller, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = asyncio.Event()
    expire = Registry.expire

    def broken_once(registry: Registry) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("dictionary changed size during iteration")
        expire(registry)

    monkeypatch.setattr(Registry, "expire", broken_once)
    url = await start_worker(StubWorker())
    await asyncio.wait_for(failed.wait(), 10)
    controller.registry.workers[url].last_beat -= 1000
    await until(lambda: not controller.registry.workers)


async def test_a_worker_that_was_restarted_under_its_name_is_noticed(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker("before")
    url = await start_worker(stub)
    stub.models, stub.incarnation = ["after"], "another"
    await controller.post("/refresh_all_workers")
    assert controller.registry.models() == ["after"]
    assert controller.registry.workers[url].status.incarnation == "another"


async def test_a_restarted_controller_finds_its_workers_at_once(settings: Settings) -> None:
    stub = StubWorker()
    async with serving(stub.app) as url:
        async with running_controller(settings) as first:
            await first.register(url, stub)
            gone = refused_url()
            await first.register(gone, StubWorker("gone"))
            await until(lambda: settings.snapshot_path.exists() and gone in settings.snapshot_path.read_text())
        async with running_controller(settings) as second:
            assert (await second.post("/v1/chat/completions", CHAT)).status_code == 200
            assert second.registry.models() == ["stub"]
            reply = await second.post("/v1/chat/completions", CHAT | {"model": "gone"})
            assert reply.status_code == 503


async def test_the_names_of_departed_models_survive_a_restart(settings: Settings) -> None:
    async with running_controller(settings) as first:
        url = refused_url()
        await first.register(url, StubWorker())
        await first.post("/unregister_worker", {"worker_name": url})
    async with running_controller(settings) as second:
        assert second.registry.workers == {}
        assert (await second.post("/v1/chat/completions", CHAT)).status_code == 503


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"workers": 5}',
        '{"workers": [{"worker_name": "nonsense", "worker_status": {"model_names": ["m"]}}]}',
        '{"workers": [{"worker_name": "http://127.0.0.1:1"}]}',
    ],
)
async def test_a_corrupt_snapshot_is_no_obstacle(settings: Settings, content: str) -> None:
    settings.snapshot_path.write_text(content)
    async with running_controller(settings) as controller:
        assert controller.registry.workers == {}
        await controller.register(refused_url(), StubWorker())
        await until(lambda: "stub" in settings.snapshot_path.read_text())
    json.loads(settings.snapshot_path.read_text())


async def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with running_controller(Settings(state_file=tmp_path / "file" / "state.json")) as controller:
        await controller.register(refused_url(), StubWorker())
        assert controller.registry.models() == ["stub"]


def test_fastchats_environment_variables_set_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings().heart_beat_expiration_s, Settings().worker_api_timeout_s) == (90, 100)
    monkeypatch.setenv("FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION", "12")
    monkeypatch.setenv("FASTCHAT_WORKER_API_TIMEOUT", "34")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    chosen: dict[str, Any] = {"port": 5}
    settings = Settings(**chosen)
    assert (settings.heart_beat_expiration_s, settings.worker_api_timeout_s) == (12, 34)
    assert settings.host == "127.0.0.1"
    assert settings.snapshot_path == Path("/cache/polydecode/controller-5.json")
