"""The table of workers on disk, so that a restarted controller knows whom to look for."""

import asyncio
import logging
import os
from pathlib import Path

from pydantic import ValidationError

from controller.registry import Registry
from protocol.errors import RequestError
from protocol.fleet import RegisterWorker
from protocol.wire import Wire

log = logging.getLogger(__name__)


class Snapshot(Wire):
    """What is kept: registrations, and the names of all models served so far."""

    workers: list[RegisterWorker] = []
    known_models: list[str] = []


def take(registry: Registry) -> Snapshot:
    """The registry's present content."""
    workers = [
        RegisterWorker(
            worker_name=worker.name,
            check_heart_beat=worker.check_heart_beat,
            worker_status=worker.status,
            multimodal=worker.multimodal,
        )
        for worker in registry.workers.values()
    ]
    return Snapshot(workers=workers, known_models=sorted(registry.known_models))


def load(path: Path, registry: Registry) -> None:
    """Fill the registry from ``path``. The workers stay suspect until they answer; a broken file is ignored."""
    try:
        snapshot = Snapshot.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValidationError) as error:
        log.warning("%s cannot be read, starting with no workers: %s", path, str(error).splitlines()[0])
        return
    registry.known_models.update(snapshot.known_models)
    for entry in snapshot.workers:
        if entry.worker_status is None:
            continue
        try:
            worker = registry.register(
                entry.worker_name,
                entry.worker_status,
                check_heart_beat=entry.check_heart_beat,
                multimodal=entry.multimodal,
            )
        except RequestError as error:
            log.warning("a worker in %s was skipped: %s", path, error.message)
            continue
        worker.suspect = True
    registry.changed.clear()


def save(path: Path, snapshot: Snapshot) -> None:
    """Replace ``path`` atomically; a disk that refuses is logged, not fatal."""
    # Addresses may carry credentials: the file is for its owner alone.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(snapshot.model_dump_json(indent=1))
        os.replace(unfinished, path)
    except OSError as error:
        log.warning("the table of workers could not be saved: %s", error)


async def keep_saved(path: Path, registry: Registry) -> None:
    """Save after every change, for ever; changes that come during a write are in the next one."""
    while True:
        await registry.changed.wait()
        registry.changed.clear()
        await asyncio.to_thread(save, path, take(registry))
