"""A child process whose output is passed on line by line, and which never outlives this process."""

import asyncio
import codecs
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # loaded here, because the moment between fork and exec is no place for it


@dataclass(frozen=True)
class ChildSpec:
    """How to start a process, and how to see that it works."""

    name: str
    command: list[str]
    health_url: str
    environment: dict[str, str] = field(default_factory=dict)
    group: str = ""  # children of one group can stand in for each other; default: none can


class Child:
    """One run of a :class:`ChildSpec`."""

    def __init__(self, process: asyncio.subprocess.Process, show: Callable[[str], None]) -> None:
        self._process = process
        self._reading = asyncio.create_task(_read_lines(process.stdout, show))

    @classmethod
    async def start(cls, spec: ChildSpec, show: Callable[[str], None]) -> "Child":
        """Start the process; ``show`` gets each line of its output.

        It leads a process group of its own: Ctrl-C reaches only this process, which then stops all in order.
        """
        parent = os.getpid()
        process = await asyncio.create_subprocess_exec(
            *spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.environment},
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),
        )
        return cls(process, show)

    async def wait(self) -> int:
        """The exit status, once all output has been shown."""
        status = await self._process.wait()
        self._kill_group()  # what it started itself goes with it, and lets go of the output
        await self._reading
        return status

    async def stop(self, deadline_s: float) -> None:
        """SIGTERM, and SIGKILL if that did not end it in time; at once where this is cancelled."""
        try:
            with contextlib.suppress(TimeoutError, ProcessLookupError):
                self._process.terminate()
                async with asyncio.timeout(deadline_s):
                    await self._process.wait()
        finally:
            self._kill_group()
            await self.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _die_with(parent: int) -> None:
    """Runs in the child: have the kernel kill it when its parent dies, however that happens."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the kernel knew
            os._exit(1)


async def _read_lines(stream: asyncio.StreamReader | None, show: Callable[[str], None]) -> None:
    """Pass on what is between line ends. Carriage returns count as such: progress bars use them."""
    assert stream is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending = ""
    while data := await stream.read(1 << 16):
        *lines, pending = (pending + decoder.decode(data)).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            show(line)
    if pending.strip():
        show(pending)
