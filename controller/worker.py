"""What the controller knows of one worker: its reports, the work it was given, and whether it may get more."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit, urlunsplit

from protocol.errors import ErrorCode, RequestError
from protocol.fleet import ConvTemplate, HeartBeat, WorkerStatus

MAX_SPEED = 100.0  # self-declared: a worker cannot draw all traffic by naming an absurd figure
BEATS_TO_MISS = 3


class Health(StrEnum):
    """Only an ``ok`` worker is chosen."""

    OK = "ok"
    SUSPECT = "suspect"  # it could not be reached; a probe decides
    DRAINING = "draining"  # it takes nothing new
    STALLED = "stalled"  # it runs requests but makes no step


@dataclass
class ForeignCard:
    """What FastChat's own workers tell about a model, kept until they register again."""

    template: ConvTemplate
    context_length: int


@dataclass(eq=False)
class Worker:
    """One registered worker process. Times are readings of the registry's clock, in seconds."""

    name: str
    status: WorkerStatus
    last_beat: float
    check_heart_beat: bool = True
    multimodal: bool = False
    registered: int = field(default_factory=lambda: int(time.time()))  # Unix time, for model cards
    suspect: bool = False
    gone: bool = False  # its beats stopped, or another incarnation took its place
    in_flight: int = 0
    external: int = 0  # requests at its last report that did not come through this controller
    handed_out: list[float] = field(default_factory=list)  # when its address was given to a client, since that report
    resting_until: float = 0.0
    turn: int = 0  # when it was last chosen, in dispatches
    cards: dict[str, ForeignCard] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether this is one of polydecode's workers, which take messages and answer in deltas."""
        return self.status.incarnation is not None

    @property
    def label(self) -> str:
        """The address without the credentials that it may carry."""
        parts = urlsplit(self.name)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def speed(self) -> float:
        return min(self.status.speed, MAX_SPEED)

    def url(self, path: str) -> str:
        return self.name.rstrip("/") + path

    def report(self, report: WorkerStatus | HeartBeat, now: float) -> None:
        """Take in what the worker says of itself. Its figure covers all addresses handed out before."""
        update = {
            "queue_length": report.queue_length,
            "running": report.running,
            "last_progress_s": report.last_progress_s,
            "draining": report.draining,
            "methods": report.methods or self.status.methods,
        }
        self.status = report if isinstance(report, WorkerStatus) else self.status.model_copy(update=update)
        self.external = max(0, report.queue_length - self.in_flight)
        self.handed_out.clear()
        self.last_beat = now

    def load(self, now: float, lease_s: float) -> int:
        """Requests on the worker: ours, others' at its last report, and addresses handed out since."""
        self.handed_out = [given for given in self.handed_out if now - given < lease_s]
        return self.in_flight + self.external + len(self.handed_out)

    def health(self, stall_s: float) -> Health:
        if self.suspect:
            return Health.SUSPECT
        if self.status.draining:
            return Health.DRAINING
        if self.status.running and (self.status.last_progress_s or 0) > stall_s:
            return Health.STALLED
        return Health.OK

    def is_overdue(self, now: float, foreign_expiration_s: float) -> bool:
        """Whether it has missed its beats: three of its own, or FastChat's expiration where it announced none."""
        interval = self.status.heart_beat_s
        allowed = BEATS_TO_MISS * interval if interval else foreign_expiration_s
        return self.check_heart_beat and now - self.last_beat > allowed


def check_worker_name(name: str) -> None:
    """Refuse an address that no request could be sent to.

    Raises:
        RequestError: it is not an http(s) URL with a host.
    """
    try:
        parts = urlsplit(name)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or not name.isascii() or not name.isprintable() or " " in name:
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, f"worker_name: {name!r} is not an http(s) address")
