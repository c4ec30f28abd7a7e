"""Figures for Prometheus, in a registry of their own so that several controllers fit in one process."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from controller.registry import Registry
from controller.worker import Health

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters that the rest of the controller increments, and gauges read from the table of workers."""

    def __init__(self, registry: Registry) -> None:
        self._all = CollectorRegistry()
        self._all.register(_Workers(registry))
        self.requests = Counter(
            "polydecode_requests", "Finished requests by path and HTTP status", ["path", "status"], registry=self._all
        )
        self.request_s = Histogram(
            "polydecode_request_seconds", "Length of a request", ["path"], buckets=_SECONDS, registry=self._all
        )
        self.first_frame_s = Histogram(
            "polydecode_first_frame_seconds",
            "From asking a worker to its first frame",
            buckets=_SECONDS,
            registry=self._all,
        )
        self.dispatched = Counter("polydecode_dispatched", "Requests sent to a worker", ["worker"], registry=self._all)
        self.worker_failures = Counter(
            "polydecode_worker_failures",
            "Failures of a worker seen by requests before their first frame",
            ["worker", "failure"],
            registry=self._all,
        )
        self.broken_answers = Counter(
            "polydecode_broken_answers", "Answers that ended in an error after their first frame", registry=self._all
        )
        self.client_disconnects = Counter(
            "polydecode_client_disconnects", "Requests whose client left before the end", registry=self._all
        )

    def text(self) -> bytes:
        """The exposition format of ``GET /metrics``."""
        return generate_latest(self._all)


class _Workers(Collector):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[GaugeMetricFamily]:
        load = GaugeMetricFamily("polydecode_worker_load", "Requests counted on a worker", labels=["worker"])
        in_flight = GaugeMetricFamily(
            "polydecode_worker_in_flight", "Requests proxied to a worker right now", labels=["worker"]
        )
        states = GaugeMetricFamily("polydecode_workers", "Workers by health", labels=["health"])
        counts = dict.fromkeys(Health, 0)
        for worker in self._registry.workers.values():
            counts[self._registry.health(worker)] += 1
            load.add_metric([worker.label], self._registry.load(worker))
            in_flight.add_metric([worker.label], worker.in_flight)
        for health, count in counts.items():
            states.add_metric([health.value], count)
        yield from (load, in_flight, states)
