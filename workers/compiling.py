"""Compiling the decoder beside a serving engine: eager at once, compiled as soon as it is ready."""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter

from workers.engine import Engine
from workers.model import compiled

logger = logging.getLogger(__name__)


class Compilation:
    """Swaps the compiled decoder into an engine: now if it lies in the cache, else when a child process has made it.

    Models that torch cannot export go on as they are, with one line in the log.
    """

    def __init__(self, engine: Engine, model_path: str, quantization: str | None = None) -> None:
        self._engine = engine
        self._child: subprocess.Popen[str] | None = None
        self._closing = False
        self._waiter: threading.Thread | None = None
        artifact = engine.between_steps(lambda runner: compiled.artifact(runner) if runner.kernels else None).result()
        if artifact is None:
            return
        if artifact.is_file():
            self._install(artifact)
            return
        logger.info("compiling the decoder in the background, once; until then steps run uncompiled")
        command = [sys.executable, "-m", "workers.model.compiled", model_path, *filter(None, [quantization])]
        self._child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._waiter = threading.Thread(target=self._wait, args=(self._child, artifact), name="compiling", daemon=True)
        self._waiter.start()

    def wait(self) -> None:
        """Return when the decoder is swapped in, or will not be."""
        if self._waiter:
            self._waiter.join()

    def close(self) -> None:
        """Stop compiling."""
        self._closing = True
        if self._child:
            self._child.terminate()
        self.wait()

    def _wait(self, child: subprocess.Popen[str], artifact: Path) -> None:
        started = perf_counter()
        errors = child.communicate()[1]
        if artifact.is_file() and not self._closing:
            self._install(artifact)
            logger.info("the decoder is compiled (%.0f s) and in use", perf_counter() - started)
        elif not self._closing:
            logger.warning("the decoder cannot be compiled, it runs uncompiled: %s", _last_line(errors))

    def _install(self, artifact: Path) -> None:
        self._engine.between_steps(lambda runner: compiled.install(runner, artifact)).result()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
