"""The table of workers and the choice among them, on a clock of the test's own."""

import math
from collections import Counter

import pytest

from controller.dispatch import Dispatcher
from controller.registry import Registry
from controller.settings import DispatchMethod, Settings
from controller.worker import Health, Worker
from protocol.fleet import HeartBeat, WorkerStatus
from protocol.wire import parse_body


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> Registry:
    return Registry(Settings(), clock)


def add(registry: Registry, port: int, model: str = "m", **status: object) -> Worker:
    return registry.register(f"http://127.0.0.1:{port}", WorkerStatus(model_names=[model], **status))


def beat(registry: Registry, worker: Worker, queue_length: int = 0, **more: object) -> bool:
    more = {"incarnation": worker.status.incarnation} | more
    return registry.beat(HeartBeat(worker_name=worker.name, queue_length=queue_length, **more))


def test_ties_go_round(registry: Registry) -> None:
    workers = [add(registry, port) for port in (1, 2, 3)]
    dispatcher = Dispatcher(registry)
    assert [dispatcher.pick("m") for _ in range(6)] == workers * 2


def test_load_counts_our_requests_until_they_end(registry: Registry) -> None:
    first, second = add(registry, 1), add(registry, 2)
    dispatcher = Dispatcher(registry)
    with dispatcher.lease(first), dispatcher.lease(first):
        assert registry.load(first) == 2
        assert {dispatcher.pick("m") for _ in range(3)} == {second}
    assert registry.load(first) == 0


def test_a_lease_is_returned_on_any_exception(registry: Registry) -> None:
    worker = add(registry, 1)
    with pytest.raises(KeyboardInterrupt), Dispatcher(registry).lease(worker):
        raise KeyboardInterrupt
    assert worker.in_flight == 0


def test_a_report_does_not_count_our_own_requests_twice(registry: Registry) -> None:
    worker = add(registry, 1)
    dispatcher = Dispatcher(registry)
    with dispatcher.lease(worker):
        beat(registry, worker, queue_length=3)
        assert registry.load(worker) == 3
    assert registry.load(worker) == 2
    beat(registry, worker, queue_length=0)
    assert registry.load(worker) == 0


def test_addresses_count_until_they_expire_or_the_worker_reports(registry: Registry, clock: Clock) -> None:
    worker = add(registry, 1)
    dispatcher = Dispatcher(registry)
    dispatcher.hand_out_address("m")
    dispatcher.hand_out_address("m")
    assert registry.load(worker) == 2
    clock.now += registry.settings.address_lease_s
    assert registry.load(worker) == 0
    dispatcher.hand_out_address("m")
    beat(registry, worker, queue_length=1)
    assert registry.load(worker) == 1


def test_addresses_are_shared_out_by_speed(registry: Registry) -> None:
    for port, speed in ((1, 1), (2, 1), (3, 4)):
        add(registry, port, speed=speed)
    dispatcher = Dispatcher(registry)
    given = Counter(dispatcher.hand_out_address("m")[-1] for _ in range(24))
    assert given == {"1": 4, "2": 4, "3": 16}


@pytest.mark.parametrize("speed", ["0", "-3", "NaN", "Infinity", "-Infinity"])
def test_a_speed_that_is_none_counts_as_one(registry: Registry, speed: str) -> None:
    status = parse_body(WorkerStatus, f'{{"model_names": ["m"], "speed": {speed}}}'.encode())
    assert registry.register("http://127.0.0.1:1", status).speed == 1
    add(registry, 2)
    dispatcher = Dispatcher(registry)
    assert Counter(dispatcher.hand_out_address("m")[-1] for _ in range(8)) == {"1": 4, "2": 4}


def test_an_absurd_speed_is_capped(registry: Registry) -> None:
    assert add(registry, 1, speed=1e30).speed == 100
    assert math.isfinite(add(registry, 2, speed=1e308).speed)


def test_a_negative_queue_counts_as_empty(registry: Registry) -> None:
    assert registry.load(add(registry, 1, queue_length=-5)) == 0


def test_the_lottery_draws_by_speed() -> None:
    registry = Registry(Settings(dispatch_method=DispatchMethod.LOTTERY), Clock())
    add(registry, 1, speed=1)
    fast = add(registry, 2, speed=9)
    dispatcher = Dispatcher(registry)
    drawn = Counter(dispatcher.pick("m") for _ in range(2000))
    assert len(drawn) == 2 and 1600 < drawn[fast] < 1980


def test_workers_that_know_the_method_go_first(registry: Registry) -> None:
    plain = add(registry, 1, methods=["vanilla"], incarnation="a")
    medusa = add(registry, 2, methods=["vanilla", "medusa"], incarnation="b")
    dispatcher = Dispatcher(registry)
    assert {dispatcher.pick("m", "medusa") for _ in range(3)} == {medusa}
    assert {dispatcher.pick("m", "vanilla") for _ in range(2)} == {plain, medusa}
    assert dispatcher.pick("m", "unheard of") is not None


def test_models_are_matched_by_exact_name(registry: Registry) -> None:
    add(registry, 1, model="m-medusa")
    assert Dispatcher(registry).pick("m") is None


def test_our_workers_expire_after_three_of_their_own_beats(registry: Registry, clock: Clock) -> None:
    worker = add(registry, 1, heart_beat_s=5)
    clock.now += 15
    registry.expire()
    assert worker.name in registry.workers
    clock.now += 0.1
    registry.expire()
    assert registry.workers == {}
    assert not beat(registry, worker)


def test_fastchat_workers_expire_after_fastchats_time(registry: Registry, clock: Clock) -> None:
    worker = add(registry, 1)
    clock.now += 89
    beat(registry, worker)
    clock.now += 89
    registry.expire()
    assert worker.name in registry.workers
    clock.now += 2
    registry.expire()
    assert registry.workers == {}


def test_a_worker_without_heart_beat_check_does_not_expire(registry: Registry, clock: Clock) -> None:
    registry.register("http://127.0.0.1:1", WorkerStatus(model_names=["m"]), check_heart_beat=False)
    clock.now += 1e6
    registry.expire()
    assert len(registry.workers) == 1


def test_a_worker_without_progress_is_not_chosen_until_it_moves(registry: Registry) -> None:
    worker = add(registry, 1, incarnation="a")
    dispatcher = Dispatcher(registry)
    beat(registry, worker, queue_length=1, running=1, last_progress_s=121)
    assert registry.health(worker) is Health.STALLED and dispatcher.pick("m") is None
    beat(registry, worker, queue_length=1, running=1, last_progress_s=2)
    assert dispatcher.pick("m") is worker
    beat(registry, worker, queue_length=0, running=0, last_progress_s=5000)
    assert dispatcher.pick("m") is worker


def test_a_draining_worker_is_not_chosen(registry: Registry) -> None:
    worker = add(registry, 1, incarnation="a")
    beat(registry, worker, draining=True)
    assert Dispatcher(registry).pick("m") is None and registry.models() == []
    assert registry.nobody_serves("m").http_status == 503


def test_a_new_incarnation_starts_afresh(registry: Registry) -> None:
    old = add(registry, 1, incarnation="a", queue_length=7)
    old.suspect = True
    with Dispatcher(registry).lease(old):
        assert not beat(registry, old, incarnation="b")  # asked to register
        new = add(registry, 1, incarnation="b")
        assert new is not old and old.gone
        assert registry.load(new) == 0 and registry.health(new) is Health.OK


def test_registering_again_keeps_the_requests_in_flight(registry: Registry) -> None:
    worker = add(registry, 1)
    with Dispatcher(registry).lease(worker):
        assert add(registry, 1) is worker and registry.load(worker) == 1


def test_a_beat_alone_does_not_clear_a_suspicion(registry: Registry) -> None:
    worker = add(registry, 1)
    worker.suspect = True
    assert beat(registry, worker)
    add(registry, 1)
    assert registry.health(worker) is Health.SUSPECT
    registry.found(worker.name, worker.status)
    assert registry.health(worker) is Health.OK


def test_a_worker_that_let_a_request_time_out_is_the_last_choice(registry: Registry, clock: Clock) -> None:
    hung, other = add(registry, 1), add(registry, 2)
    hung.resting_until = clock.now + 100
    dispatcher = Dispatcher(registry)
    assert {dispatcher.pick("m") for _ in range(4)} == {other}
    registry.unregister(other.name)
    assert dispatcher.pick("m") is hung
