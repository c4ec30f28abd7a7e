"""What happens beside serving at a worker's start: the decoder is compiled, and the latency curve is measured."""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter

from protocol.errors import RequestError
from workers.engine import Engine
from workers.model import compiled

logger = logging.getLogger(__name__)


class WarmUp:
    """Serves eagerly at once; swaps the compiled decoder in when a child process has made it, or from the cache.

    Models that torch cannot export go on as they are, with one line in the log. The curve is measured for what runs
    meanwhile, and again for what runs afterwards.
    """

    def __init__(
        self,
        engine: Engine,
        model_path: str,
        quantization: str | None = None,
        *,
        compile_decoder: bool = True,
        measure: bool = True,
    ) -> None:
        """Start, in a thread of its own."""
        self._engine = engine
        self._command = [sys.executable, "-m", "workers.model.compiled", model_path, *filter(None, [quantization])]
        self._compiles = compile_decoder
        self._measures = measure
        self._child: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is done, or failed."""
        self._thread.join()

    def close(self) -> None:
        """Stop at the next chance; call this before the engine is closed, and ``wait`` after."""
        self._closing.set()
        if self._child:
            self._child.terminate()

    def _run(self) -> None:
        try:
            artifact = self._engine.between_steps(lambda runner: runner.kernels and compiled.artifact(runner)).result()
            if not artifact or not self._compiles:
                self._measure()
                return
            if not artifact.is_file():
                self._measure()
                self._compile(artifact)
            if artifact.is_file() and not self._closing.is_set():
                self._engine.between_steps(lambda runner: compiled.install(runner, artifact)).result()
                logger.info("the compiled decoder is in use")
                self._measure()
        except Exception as error:
            if not self._closing.is_set():
                logger.warning("the engine is not warm: %s", error)

    def _measure(self) -> None:
        if not self._measures or self._closing.is_set():
            return
        try:
            logger.info("latency curve\n%s", self._engine.measure())
        except RequestError as error:  # busy or shutting down: no reason not to compile
            logger.warning("no latency curve: %s", error)

    def _compile(self, artifact: Path) -> None:
        if self._closing.is_set():
            return
        logger.info("compiling the decoder in the background, once; until then steps run uncompiled")
        started = perf_counter()
        self._child = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if self._closing.is_set():  # between the check above and the start
            self._child.terminate()
        errors = self._child.communicate()[1]
        if artifact.is_file():
            logger.info("the decoder is compiled (%.0f s)", perf_counter() - started)
        elif not self._closing.is_set():
            logger.warning("the decoder cannot be compiled, it runs uncompiled: %s", _last_line(errors))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
