"""What the engine counts, and its Prometheus face."""

from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.trace import StepTrace


@dataclass
class EngineCounters:
    """Totals since the worker started; written by the engine's thread, read by any."""

    steps: int = 0
    rows: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    generated_tokens: int = 0
    thread_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # index i: thread-steps that accepted more than i rows
    finished: int = 0
    cancelled: int = 0
    failed: int = 0

    def forward(self, forward_ms: float, rows: int) -> None:
        """Count one forward pass."""
        self.steps += 1
        self.rows += rows
        self.forward_s += forward_ms / 1000

    def tokens(self, trace: StepTrace) -> None:
        """Count what a step did to one request."""
        for thread in trace.threads:
            self.generated_tokens += len(thread.token_ids)
            self.thread_steps += 1
            self.drafted += thread.drafted
            self.accepted += thread.accepted
            self.accepted_at += [0] * (thread.accepted - len(self.accepted_at))
            for position in range(thread.accepted):
                self.accepted_at[position] += 1


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot of the engine's load."""

    running: int
    queued: int
    free_pages: int
    total_pages: int
    preemptions: int


class Measured(Protocol):
    """What the collector reads: the engine."""

    @property
    def counters(self) -> EngineCounters: ...

    def status(self) -> EngineStatus: ...


class EngineCollector(Collector):
    """Reads the engine's own counters at every scrape, so that nothing is counted twice."""

    def __init__(self, engine: Measured) -> None:
        self._engine = engine

    def collect(self) -> list[Metric]:
        status, counters = self._engine.status(), self._engine.counters
        gauges = {
            "running_requests": (status.running, "Requests that take part in steps"),
            "queued_requests": (status.queued, "Requests that wait for pages or for a place"),
            "kv_pages_free": (status.free_pages, "Free KV pages"),
            "kv_pages": (status.total_pages, "All KV pages"),
        }
        totals = {
            "steps": (counters.steps, "Forward passes"),
            "rows": (counters.rows, "Rows computed in them"),
            "forward_seconds": (counters.forward_s, "Time spent in them"),
            "step_seconds": (counters.step_s, "Time spent in steps: drafts, forward passes, verification, events"),
            "generated_tokens": (counters.generated_tokens, "Tokens that the model chose"),
            "thread_steps": (counters.thread_steps, "Verified drafts: one a generation thread and step"),
            "drafted_tokens": (counters.drafted, "Candidate rows offered"),
            "accepted_tokens": (counters.accepted, "Candidate rows accepted"),
            "requests_finished": (counters.finished, "Requests that ended by themselves"),
            "requests_cancelled": (counters.cancelled, "Requests whose client left"),
            "requests_failed": (counters.failed, "Requests that ended with an error"),
            "preemptions": (status.preemptions, "Threads that lost their pages for a while"),
        }
        positions = CounterMetricFamily(
            "polydecode_accepted_tokens_per_position",
            "Candidate rows accepted, by position in the draft",
            labels=["position"],
        )
        for position, count in enumerate(list(counters.accepted_at)):
            positions.add_metric([str(position)], count)
        return [
            positions,
            *(GaugeMetricFamily(f"polydecode_{name}", text, value=value) for name, (value, text) in gauges.items()),
            *(CounterMetricFamily(f"polydecode_{name}", text, value=value) for name, (value, text) in totals.items()),
        ]


def metrics_registry(engine: Measured) -> CollectorRegistry:
    """A registry of its own for each worker (several may live in one process)."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """Prometheus' text format."""
    return generate_latest(registry)
