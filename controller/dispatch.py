"""Choosing the worker of a request, and counting what each was given."""

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import count

from controller.registry import Registry
from controller.settings import DispatchMethod
from controller.worker import Worker

VANILLA = "vanilla"


class Dispatcher:
    """Picks workers by the configured method and keeps their in-flight counts."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lottery = registry.settings.dispatch_method is DispatchMethod.LOTTERY
        self._turns = count(1)

    def pick(self, model: str, method: str | None = None, avoid: Collection[Worker] = ()) -> Worker | None:
        """The next worker for ``model``, or None. Workers that list the decoding ``method`` go first."""
        candidates = [worker for worker in self._registry.serving(model) if worker not in avoid]
        if method is not None and method != VANILLA:
            candidates = [worker for worker in candidates if method in worker.status.methods] or candidates
        now = self._registry.clock()
        candidates = [worker for worker in candidates if worker.resting_until <= now] or candidates
        if not candidates:
            return None
        chosen = self._draw(candidates) if self._lottery else min(candidates, key=self._cost)
        chosen.turn = next(self._turns)
        return chosen

    def hand_out_address(self, model: str) -> str:
        """The address of the next worker for a client that will call it directly; empty if there is none.

        The client's request shows only in the worker's next report: until then the address counts as load.
        """
        worker = self.pick(model)
        if worker is None:
            return ""
        worker.handed_out.append(self._registry.clock())
        return worker.name

    @contextmanager
    def lease(self, worker: Worker) -> Iterator[None]:
        """Count one request in flight on ``worker`` for the length of the block: the only place that does."""
        worker.in_flight += 1
        try:
            yield
        finally:
            worker.in_flight -= 1

    def _cost(self, worker: Worker) -> tuple[float, int]:
        """Relative time until the worker is through, this request included; ties go round in turn."""
        return (self._registry.load(worker) + 1) / worker.speed, worker.turn

    def _draw(self, candidates: list[Worker]) -> Worker:
        return random.choices(candidates, weights=[worker.speed for worker in candidates])[0]
