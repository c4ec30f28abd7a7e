"""polydecode's programs as real processes on free ports."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import httpx

from tests.support.serving import wait_until

ENVIRONMENT = {
    **os.environ,
    "FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "1",  # FastChat reads whole seconds
    "POLYDECODE_DRAIN_SECONDS": "300",  # on a slow machine an answer of a thousand tokens takes its time
    "HF_HUB_OFFLINE": "1",
    "LOGDIR": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "no_proxy": "127.0.0.1,localhost",
}
START_S = 90.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Program:
    """A running module; its output is kept for failures."""

    def __init__(self, *arguments: str, port: int | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._output = TemporaryFile()  # noqa: SIM115 - read when a test fails
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=self._output, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def wait_healthy(self, path: str = "/health") -> None:
        """Until GET ``path`` answers 200; fails with the program's output."""
        try:
            wait_until(lambda: self._exited() or answers(self.url + path), START_S)
        except AssertionError:
            raise AssertionError(f"not healthy:\n{self.output()}") from None
        assert not self._exited(), self.output()

    def kill(self, kind: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; the exit code."""
        if not self._exited():
            self.process.send_signal(kind)
        return self.process.wait(START_S)

    def _exited(self) -> bool:
        return self.process.poll() is not None


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def program(*arguments: str, port: int | None = None) -> Iterator[Program]:
    """Run a module until the block ends."""
    running = Program(*arguments, port=port)
    try:
        yield running
    finally:
        running.kill()


@contextmanager
def controller(port: int | None = None, state: Path | None = None) -> Iterator[Program]:
    """A healthy controller."""
    port = port or free_port()
    extra = ["--state-file", str(state)] if state else []
    with program("controller", "--port", str(port), *extra, port=port) as running:
        running.wait_healthy()
        yield running


@contextmanager
def worker(model: Path, controller_url: str | None, *options: str, port: int | None = None) -> Iterator[Program]:
    """A healthy worker, registered if there is a controller."""
    port = port or free_port()
    register = ["--controller-address", controller_url] if controller_url else ["--no-register"]
    arguments = [
        "--model-path",
        str(model),
        "--port",
        str(port),
        "--kv-tokens",
        "8192",
        "--no-compile",
        "--no-measure",
        *register,
        *options,
    ]
    with program("workers", *arguments, port=port) as running:
        running.wait_healthy()
        if controller_url:
            wait_until(lambda: running.url in addresses(controller_url))
        yield running


def addresses(controller_url: str) -> list[str]:
    """The workers that a controller would choose."""
    fleet = httpx.get(f"{controller_url}/fleet", timeout=10, trust_env=False).json()
    return [entry["name"] for entry in fleet["workers"] if entry["health"] == "ok"]


def metrics(url: str) -> dict[str, float]:
    """A worker's figures."""
    lines = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}


def idle(url: str) -> bool:
    """Whether nothing runs or waits on a worker and all its pages are free."""
    now = metrics(url)
    busy = now["polydecode_running_requests"] + now["polydecode_queued_requests"]
    return not busy and now["polydecode_kv_pages_free"] == now["polydecode_kv_pages"]
