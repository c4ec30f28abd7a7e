"""What operators and the web page read: health, metrics and the table of workers."""

from fastapi import APIRouter
from starlette.responses import Response

from controller.metrics import CONTENT_TYPE
from controller.services import Services
from controller.worker import Worker
from protocol.fleet import Fleet, FleetWorker


def fleet_door(services: Services) -> APIRouter:
    """``/health``, ``/metrics`` and ``/fleet``."""
    router = APIRouter()
    registry = services.registry

    @router.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "models": registry.models()}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(services.metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/fleet")
    async def fleet() -> Fleet:
        workers = [_shown(services, worker) for worker in registry.workers.values()]
        return Fleet(dispatch_method=services.settings.dispatch_method, workers=workers)

    return router


def _shown(services: Services, worker: Worker) -> FleetWorker:
    registry = services.registry
    return FleetWorker(
        name=worker.label,
        models=worker.status.model_names,
        methods=worker.status.methods,
        health=registry.health(worker),
        load=registry.load(worker),
        in_flight=worker.in_flight,
        queue_length=worker.status.queue_length,
        running=worker.status.running,
        speed=worker.speed,
        own=worker.own,
        multimodal=worker.multimodal,
        last_beat_s=round(registry.clock() - worker.last_beat, 3),
    )
