"""One tiny checkpoint, one controller and one worker for all system tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.processes import Program
from tests.support.tiny import save_tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", context=4096)


@pytest.fixture(scope="session")
def fleet(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, Program]]:
    """A controller and a worker, for tests that kill neither."""
    state = tmp_path_factory.mktemp("state") / "controller.json"
    with processes.controller(state=state) as controller, processes.worker(checkpoint, controller.url) as worker:
        yield controller, worker
