"""Keeping the controller informed: registering for ever, heart beats, leaving."""

import asyncio
import logging
from typing import Any

import httpx

from protocol.fleet import HeartBeat, HeartBeatReply, RegisterWorker, UnregisterWorker
from protocol.wire import Wire
from workers.service import Worker

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 15.0


class Registration:
    """One worker's relation to one controller."""

    def __init__(self, worker: Worker, *, controller: str, address: str, heart_beat_s: float) -> None:
        """``address`` is where the controller and its clients reach the worker."""
        self._worker = worker
        self._address = address
        self._heart_beat_s = heart_beat_s
        self._running: asyncio.Task[None] | None = None
        self._client = httpx.AsyncClient(base_url=controller, timeout=TIMEOUT_S, trust_env=False)

    async def run(self) -> None:
        """Register and beat until cancelled; any failure is retried with growing pauses."""
        self._running = asyncio.current_task()
        registered = False
        while True:
            if not registered:
                await self._register()
            await asyncio.sleep(self._heart_beat_s)
            registered = await self._beat()

    async def leave(self) -> None:
        """Tell the controller to send nothing more; a controller that is gone does not matter."""
        if self._running:  # a beat after this would only register the worker again
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        try:
            await self._post("/unregister_worker", UnregisterWorker(worker_name=self._address))
        except (httpx.HTTPError, ValueError) as error:
            logger.info("could not unregister: %s", _reason(error))
        await self._client.aclose()

    async def _register(self) -> None:
        pause, told = FIRST_RETRY_S, ""
        while trouble := await self._registration_trouble():
            if trouble != told:
                logger.warning("%s; trying again", trouble)
                told = trouble
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_S, self._heart_beat_s)
        logger.info("registered %s at %s", ", ".join(self._worker.defaults), self._client.base_url)

    async def _registration_trouble(self) -> str:
        """Try once to register; what went wrong, or nothing."""
        message = RegisterWorker(worker_name=self._address, worker_status=self._worker.status())
        try:
            refusal = await self._post("/register_worker", message)
        except (httpx.HTTPError, ValueError) as error:
            return f"no controller at {self._client.base_url} ({_reason(error)})"
        return f"the controller refuses this worker: {refusal}" if refusal else ""

    async def _beat(self) -> bool:
        """Send one beat; False if the controller does not know this worker or could not be reached."""
        status = self._worker.status()
        beat = HeartBeat(worker_name=self._address, **status.model_dump(include=set(HeartBeat.model_fields)))
        try:
            return HeartBeatReply.model_validate(await self._post("/receive_heart_beat", beat)).exist
        except (httpx.HTTPError, ValueError) as error:
            logger.warning("the heart beat failed: %s", _reason(error))
            return False

    async def _post(self, path: str, message: Wire) -> Any:
        response = await self._client.post(path, json=message.model_dump())
        response.raise_for_status()
        return response.json()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
