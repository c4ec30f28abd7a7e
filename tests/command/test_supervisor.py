import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polydecode.child import ChildSpec
from polydecode.supervisor import Patience, Supervisor
from tests.support.serving import wait_until

FAKE = str(Path(__file__).with_name("fake_child.py"))
HASTY = Patience(poll=0.02, back_off=0.01, quick_deaths=3, stop=5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fake(name: str, *options: str, group: str = "") -> ChildSpec:
    port = free_port()
    return ChildSpec(name, [sys.executable, FAKE, str(port), *options], f"http://127.0.0.1:{port}/", group=group)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


class Run:
    """A supervisor at work, and all it said."""

    def __init__(self, *specs: ChildSpec, patience: Patience = HASTY) -> None:
        self.lines: list[tuple[str, str]] = []
        self.is_ready = asyncio.Event()
        supervisor = Supervisor(list(specs), lambda who, line: self.lines.append((who, line)), patience)
        self.task = asyncio.create_task(supervisor.run(self.is_ready.set))

    def pids(self, name: str) -> list[int]:
        return [int(line.split()[-1]) for who, line in self.lines if who == name and line.startswith("hello")]

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for who, line in self.lines if who == "up")

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    async def ready(self) -> None:
        async with asyncio.timeout(30):
            await self.is_ready.wait()

    async def stop(self) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return await self.end()

    async def end(self) -> int:
        async with asyncio.timeout(30):
            return await self.task


async def test_all_start_and_all_stop() -> None:
    run = Run(fake("a"), fake("b"))
    await run.ready()
    pids = run.pids("a") + run.pids("b")
    assert len(pids) == 2 and all(map(alive, pids))
    assert await run.stop() == 0
    assert not any(map(alive, pids))


async def test_a_child_that_ignores_sigterm_is_killed() -> None:
    run = Run(fake("a", "--stubborn"), patience=Patience(poll=0.02, stop=0.1))
    await run.ready()
    assert await run.stop() == 0
    assert not alive(run.pids("a")[0])


async def test_a_second_signal_kills_at_once() -> None:
    run = Run(fake("a", "--stubborn"), patience=Patience(poll=0.02, stop=3600))
    await run.ready()
    os.kill(os.getpid(), signal.SIGINT)
    await run.until(lambda: run.said("^stopping"))
    assert await run.stop() == 0
    assert not alive(run.pids("a")[0])


async def test_a_child_that_dies_is_started_again() -> None:
    run = Run(fake("a"), fake("b"))
    await run.ready()
    os.kill(run.pids("a")[0], signal.SIGKILL)
    await run.until(lambda: len(run.pids("a")) == 2)
    assert run.said(r"a died \(SIGKILL\); starting it again")
    assert len(run.pids("b")) == 1
    assert await run.stop() == 0


async def test_repeated_quick_deaths_end_everything() -> None:
    run = Run(fake("a"), fake("b"))
    await run.ready()
    for death in range(1, 4):
        await run.until(lambda death=death: len(run.pids("a")) == death)
        os.kill(run.pids("a")[-1], signal.SIGKILL)
    assert await run.end() == 1
    assert run.said(r"a died 3 times in a row \(SIGKILL\); stopping all")
    assert not alive(run.pids("b")[0])


async def test_a_child_that_cannot_start_is_not_started_again() -> None:
    run = Run(fake("a", "--fail", "no such model"), fake("b"))
    assert await run.end() == 1
    assert ("a", "no such model") in run.lines
    assert run.said(r"a did not start \(exit status 3\); stopping all")
    assert len(run.pids("a")) == 1


async def test_children_of_a_group_stand_in_for_each_other() -> None:
    run = Run(fake("a", group="w"), fake("b", "--fail", "no", group="w"))
    await run.ready()
    assert run.said("b did not start .*; going on without it")
    assert await run.stop() == 0


async def test_output_is_passed_on_line_by_line() -> None:
    script = r"import sys; sys.stdout.write('a\rb\n\n' + 'x' * 300000 + '\nend'); sys.exit(1)"
    run = Run(ChildSpec("a", [sys.executable, "-c", script], "http://127.0.0.1:1/"))
    await run.end()
    assert [line for who, line in run.lines if who == "a"] == ["a", "b", "x" * 300000, "end"]


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = f"""
import asyncio, sys
from polydecode.child import ChildSpec
from polydecode.supervisor import Supervisor
file = open({str(said)!r}, "w", buffering=1)
spec = ChildSpec("a", [sys.executable, {FAKE!r}, "{free_port()}", "--stubborn"], "http://127.0.0.1:1/")
asyncio.run(Supervisor([spec], lambda who, line: print(who, line, file=file)).run(lambda: None))
"""
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: said.exists() and "hello" in said.read_text())
    finally:
        supervisor.kill()
        supervisor.wait()
    pid = int(said.read_text().split()[-1])
    wait_until(lambda: not alive(pid))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
