"""Starts child processes, waits until they answer, restarts those that die, and stops them all."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from polydecode.child import Child, ChildSpec

Say = Callable[[str, str], None]  # (who, line)
SELF = "up"


class GaveUp(Exception):
    """A child cannot be kept running; the message is one readable line."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""

    poll: float = 0.2  # between looks at a child that is starting
    back_off: float = 1.0  # before the first restart; doubles with each quick death
    quick: float = 30.0  # a child that lived shorter died quickly
    quick_deaths: int = 4  # so many in a row, and it is given up
    stop: float = 15.0  # from SIGTERM to SIGKILL


class Supervisor:
    """Runs a set of children until a signal comes, or until one that nothing can stand in for is given up."""

    def __init__(self, specs: list[ChildSpec], say: Say, patience: Patience | None = None) -> None:
        self._say = say
        self._patience = patience or Patience()
        self._keepers = [_Keeper(spec, say, self._patience) for spec in specs]
        self._left = Counter(keeper.group for keeper in self._keepers)

    async def run(self, ready: Callable[[], None]) -> int:
        """Start all and keep them; ``ready`` is called once each answers or is given up.

        The exit status: 0 after SIGINT or SIGTERM (a second one kills at once), 1 if a child could not be kept.
        """
        loop = asyncio.get_running_loop()
        work = asyncio.create_task(self._keep_all(ready))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, work)
        try:
            await work
        except asyncio.CancelledError:
            return 0
        except GaveUp:
            return 1
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        return 0

    def _stop(self, work: asyncio.Task[None]) -> None:
        self._say(SELF, "stopping")
        work.cancel()

    async def _keep_all(self, ready: Callable[[], None]) -> None:
        """Until cancelled, or until a child whose group has no other left is given up."""
        tasks = [asyncio.create_task(self._keep(keeper)) for keeper in self._keepers]
        tasks.append(asyncio.create_task(self._announce(ready)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _announce(self, ready: Callable[[], None]) -> None:
        for keeper in self._keepers:
            await keeper.settled.wait()
        ready()

    async def _keep(self, keeper: "_Keeper") -> None:
        try:
            await keeper.keep()
        except GaveUp as reason:
            self._left[keeper.group] -= 1
            if not self._left[keeper.group]:
                self._say(SELF, f"{reason}; stopping all")
                raise
            self._say(SELF, f"{reason}; going on without it")
            keeper.settled.set()


class _Keeper:
    """Keeps one child running."""

    def __init__(self, spec: ChildSpec, say: Say, patience: Patience) -> None:
        self.settled = asyncio.Event()  # it has answered once, or was given up
        self.group = spec.group or spec.name
        self._spec = spec
        self._say = say
        self._patience = patience

    async def keep(self) -> None:
        """Run the child, again and again.

        Raises:
            GaveUp: it never answered (starting it again would only repeat the error), or died quickly too often.
        """
        name, patience = self._spec.name, self._patience
        quick_deaths = 0
        while True:
            started = time.monotonic()
            status = await self._live()
            if not self.settled.is_set():
                raise GaveUp(f"{name} did not start ({_ending(status)})")
            lived = time.monotonic() - started
            quick_deaths = quick_deaths + 1 if lived < patience.quick else 1
            if quick_deaths == patience.quick_deaths:
                raise GaveUp(f"{name} died {quick_deaths} times in a row ({_ending(status)})")
            pause = patience.back_off * 2 ** (quick_deaths - 1)
            self._say(SELF, f"{name} died ({_ending(status)}); starting it again in {pause:g} s")
            await asyncio.sleep(pause)

    async def _live(self) -> int:
        """One life of the child: its exit status. Cancelled, it stops the child."""
        child = await Child.start(self._spec, lambda line: self._say(self._spec.name, line))
        polling = asyncio.create_task(self._poll())
        try:
            return await child.wait()
        finally:
            polling.cancel()
            await child.stop(self._patience.stop)

    async def _poll(self) -> None:
        """Return once the child answers."""
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            while not await self._answers(client):
                await asyncio.sleep(self._patience.poll)
        self._say(SELF, f"{self._spec.name} is up")
        self.settled.set()

    async def _answers(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(self._spec.health_url)).is_success
        except httpx.HTTPError:
            return False


def _ending(status: int) -> str:
    if status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"
