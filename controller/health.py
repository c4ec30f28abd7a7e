"""Finding out which workers are alive: probes of suspects, refresh on request, and the loop that never dies."""

import asyncio
import logging

import httpx

from controller.calls import Failure, WorkerFailed, ask
from controller.registry import Registry
from controller.worker import Worker
from protocol.fleet import ModelQuery, WorkerStatus

log = logging.getLogger(__name__)


class HealthChecker:
    """Owns the tasks that poll workers; ``close`` ends them."""

    def __init__(self, registry: Registry, client: httpx.AsyncClient) -> None:
        self._registry = registry
        self._client = client
        self._settings = registry.settings
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._refresh: asyncio.Task[None] | None = None

    async def poll(self, worker: Worker) -> WorkerStatus:
        """Ask a worker for its status; WorkerFailed if it does not give one."""
        timeout_s = self._settings.poll_timeout_s
        return await ask(self._client, worker, "/worker_get_status", ModelQuery(), WorkerStatus, timeout_s)

    def failed(self, worker: Worker, error: WorkerFailed) -> None:
        """Learn from a request that a worker failed, at once and not at its next missed beat."""
        log.warning("%s: %s", worker.label, error.message)
        if error.failure in (Failure.UNREACHABLE, Failure.DIED):
            worker.suspect = True
            self.probe(worker)
        elif error.failure is Failure.TIMEOUT:
            worker.resting_until = self._registry.clock() + self._settings.stall_s

    def probe(self, worker: Worker) -> asyncio.Task[None]:
        """Look at a worker now; one probe a worker at a time."""
        running = self._probes.get(worker.name)
        if running is not None and not running.done():
            return running
        task = asyncio.create_task(self._look_at(worker))
        self._probes[worker.name] = task
        return task

    async def refresh(self) -> None:
        """Poll all workers at once. Callers that come while one runs share it, so that nobody can pile them up."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._refresh_all())
        await asyncio.shield(self._refresh)

    async def run(self) -> None:
        """Drop late workers and probe suspects for ever; no exception ends it."""
        while True:
            try:
                self._registry.expire()
                for worker in self._registry.workers.values():
                    if worker.suspect:
                        self.probe(worker)
                self._probes = {name: task for name, task in self._probes.items() if not task.done()}
            except Exception:
                log.exception("the health check failed; it goes on")
            await asyncio.sleep(self._settings.check_interval_s)

    async def close(self) -> None:
        tasks = [*self._probes.values(), *([self._refresh] if self._refresh else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refresh_all(self) -> None:
        await asyncio.gather(*(self._look_at(worker) for worker in list(self._registry.workers.values())))

    async def _look_at(self, worker: Worker) -> None:
        try:
            status = await self.poll(worker)
            self._registry.found(worker.name, status)
        except WorkerFailed as error:
            # Silence is not death: a busy worker stays while it beats. A closed port is.
            if error.failure is not Failure.TIMEOUT:
                worker.suspect = True
        except Exception:
            log.exception("looking at %s failed", worker.label)
