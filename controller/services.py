"""The parts of one controller, put together."""

import httpx

from controller.calls import pooled_client
from controller.dispatch import Dispatcher
from controller.health import HealthChecker
from controller.metrics import Metrics
from controller.registry import Registry
from controller.settings import Settings
from controller.upstream import Upstream
from controller.worker_body import BodyMaker


class Services:
    """What the doors share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client: httpx.AsyncClient = pooled_client(settings)
        self.registry = Registry(settings)
        self.metrics = Metrics(self.registry)
        self.dispatcher = Dispatcher(self.registry)
        self.health = HealthChecker(self.registry, self.client)
        self.upstream = Upstream(self.registry, self.dispatcher, self.health, self.client, self.metrics)
        self.bodies = BodyMaker(self.client, settings)
