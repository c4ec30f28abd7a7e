"""The table of workers. Plain synchronous code on one event loop: nothing can change while it is being read."""

import asyncio
import logging
import time
from collections.abc import Callable

from controller.settings import Settings
from controller.worker import Health, Worker, check_worker_name
from protocol.errors import ErrorCode, RequestError
from protocol.fleet import HeartBeat, WorkerStatus

log = logging.getLogger(__name__)


class Registry:
    """Workers by name. ``changed`` is set whenever the table differs from what was last saved."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.clock = clock
        self.workers: dict[str, Worker] = {}
        self.known_models: set[str] = set()  # every model ever served, to tell "unknown" from "not now"
        self.changed = asyncio.Event()

    def register(
        self, name: str, status: WorkerStatus, *, check_heart_beat: bool = True, multimodal: bool = False
    ) -> Worker:
        """Add a worker, or take its new registration. A new incarnation starts with a clean slate.

        Raises:
            RequestError: the address cannot be used, or the worker names no model.
        """
        check_worker_name(name)
        if not status.model_names:
            raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, "worker_status.model_names: the list is empty")
        worker = self.workers.get(name)
        if worker is None or worker.status.incarnation != status.incarnation:
            if worker is not None:
                worker.gone = True
            worker = self.workers[name] = Worker(name, status, last_beat=self.clock())
            log.info("registered %s: %s", worker.label, ", ".join(status.model_names))
        worker.check_heart_beat = check_heart_beat
        worker.multimodal = multimodal
        worker.cards.clear()
        worker.report(status, self.clock())
        self.known_models.update(status.model_names)
        self.changed.set()
        return worker

    def beat(self, beat: HeartBeat) -> bool:
        """Take a heart beat. False asks the worker to register (again): it is unknown here, or was restarted."""
        worker = self.workers.get(beat.worker_name)
        if worker is None or (beat.incarnation is not None and beat.incarnation != worker.status.incarnation):
            return False
        worker.report(beat, self.clock())
        return True

    def found(self, name: str, status: WorkerStatus) -> None:
        """A worker of the table answered a poll: it is alive, whatever was thought of it."""
        worker = self.workers.get(name)
        if worker is None:
            return
        if set(status.model_names) != set(worker.status.model_names) or status.incarnation != worker.status.incarnation:
            worker = self.register(name, status, check_heart_beat=worker.check_heart_beat, multimodal=worker.multimodal)
        worker.report(status, self.clock())
        worker.suspect = False

    def unregister(self, name: str) -> None:
        """Forget a worker. Answers it is giving through this controller go on."""
        if (worker := self.workers.get(name)) is not None:
            log.info("%s left", worker.label)
            self._drop(worker)

    def expire(self) -> None:
        """Drop the workers whose beats stopped."""
        now = self.clock()
        for worker in list(self.workers.values()):
            if worker.is_overdue(now, self.settings.heart_beat_expiration_s):
                log.warning("%s stopped beating and was dropped", worker.label)
                worker.gone = True
                self._drop(worker)

    def health(self, worker: Worker) -> Health:
        return worker.health(self.settings.stall_s)

    def load(self, worker: Worker) -> int:
        return worker.load(self.clock(), self.settings.address_lease_s)

    def serving(self, model: str) -> list[Worker]:
        """The healthy workers of a model; its exact name decides."""
        return [
            worker
            for worker in self.workers.values()
            if model in worker.status.model_names and self.health(worker) is Health.OK
        ]

    def models(self, *, multimodal: bool | None = None) -> list[str]:
        """Names of the models that can be reached, sorted; None: of both kinds."""
        names: set[str] = set()
        for worker in self.workers.values():
            listed = self.health(worker) in (Health.OK, Health.STALLED)
            if listed and multimodal in (None, worker.multimodal):
                names.update(worker.status.model_names)
        return sorted(names)

    def nobody_serves(self, model: str) -> RequestError:
        """The error for a model that has no worker: 404 if it was never served here, 503 if it is not now."""
        if model in self.known_models:
            return RequestError(ErrorCode.CONTROLLER_NO_WORKER, f"no worker for model {model!r} is available now")
        served = ", ".join(self.models()) or "none"
        return RequestError(ErrorCode.INVALID_MODEL, f"model {model!r} is not served here; models: {served}")

    def _drop(self, worker: Worker) -> None:
        del self.workers[worker.name]
        self.changed.set()
