"""``python -m workers``: serve one model on one device."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import httpx
import typer
import uvicorn
from pydantic import BaseModel, ValidationError

from protocol.generation import DraftSettings
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from workers.registration import Registration
    from workers.service import Worker

Model = TypeVar("Model", bound=BaseModel)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
logger = logging.getLogger("polydecode")


@app.command()
def serve(
    model_path: Annotated[str, typer.Option(help="a folder, a GGUF file, a hub id, or smollm2-135m")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="decoding methods, separated by commas")] = "vanilla",
    controller_address: str = "http://127.0.0.1:21001",
    worker_address: Annotated[
        str | None, typer.Option(help="how others reach this worker [default: host:port]")
    ] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 21002,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … [default: a GPU if there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: by device]")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=PATH", help="trained weights of a method, for instance medusa=PATH"),
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="int8: weights of all products in 8 bits")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=16, help="rows of KV [default: from free memory]")] = None,
    model_names: Annotated[str, typer.Option(help="served names, separated by commas [default: the model's]")] = "",
    conv_template: Annotated[
        str | None, typer.Option(help="one of FastChat's templates instead of the model's")
    ] = None,
    limit_worker_concurrency: Annotated[int, typer.Option(min=1, help="requests that run at a time")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="requests that may wait; more are refused")] = 256,
    stream_interval: Annotated[int, typer.Option(min=1, help="steps between two frames")] = 1,
    compile_decoder: Annotated[
        bool, typer.Option("--compile/--no-compile", help="compile the decoder in the background (CPU)")
    ] = True,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="measure the latency curve at start")] = True,
    tune: Annotated[bool, typer.Option("--tune/--no-tune", help="choose draft sizes by what they cost here")] = True,
    draft_nodes: Annotated[int | None, typer.Option(help="candidate rows a step [default: tuned]")] = None,
    lookahead_window: Annotated[int | None, typer.Option("--lookahead-window", "--WINDOW_SIZE", help="W")] = None,
    lookahead_level: Annotated[int | None, typer.Option("--lookahead-level", "--LEVEL", help="N, at least 3")] = None,
    lookahead_guesses: Annotated[int | None, typer.Option("--lookahead-guesses", "--GUESS_SET_SIZE", help="G")] = None,
    pool_from_prompt: Annotated[
        bool | None, typer.Option("--pool-from-prompt/--no-pool-from-prompt", help="n-grams of the text itself")
    ] = None,
    shared_pool: Annotated[
        bool | None, typer.Option("--shared-pool/--no-shared-pool", help="lookahead: n-grams of all requests together")
    ] = None,
    acceptance: Annotated[
        str | None, typer.Option(help="exact, or typical: lossy when sampling [default: exact]")
    ] = None,
    posterior_threshold: Annotated[float | None, typer.Option(help="of typical acceptance [default: 0.09]")] = None,
    posterior_alpha: Annotated[float | None, typer.Option(help="of typical acceptance [default: 0.3]")] = None,
    register: Annotated[bool, typer.Option("--register/--no-register")] = True,
) -> None:
    """Serve one model on one device with one or several decoding methods."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = _validated(WorkerSettings)
    draft = _validated(
        DraftSettings,
        "draft ",
        nodes=draft_nodes,
        window=lookahead_window,
        level=lookahead_level,
        guesses=lookahead_guesses,
        pool_from_prompt=pool_from_prompt,
        shared_pool=shared_pool,
        acceptance=acceptance,
        posterior_threshold=posterior_threshold,
        posterior_alpha=posterior_alpha,
    )
    try:
        httpx.URL(controller_address)
    except httpx.InvalidURL as error:
        _fail(f"--controller-address {controller_address}: {error}")
    listener = _bound_socket(host, port)
    port = listener.getsockname()[1]
    # Only now the slow imports: a port in use is reported at once.
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from workers.engine import Engine
    from workers.model.checkpoint import ModelLoadError
    from workers.registration import Registration
    from workers.service import Worker, create_app, served_names
    from workers.warm_up import WarmUp

    disable_progress_bar()
    set_verbosity_error()  # what keeps a model from being served is told in one line of ours
    methods = _names(method)
    try:
        engine = Engine.load(
            model_path,
            method=methods,
            device=device,
            dtype=dtype,
            quantization=quantization,
            kv_tokens=kv_tokens,
            max_requests=limit_worker_concurrency,
            max_queue=max_queue,
            conv_template=conv_template,
            draft=draft,
            tune=tune,
            adapters=_adapters(adapter or []),
        )
    except ModelLoadError as error:
        _fail(str(error))
    logger.info("%s", engine.description())
    if engine.quantization:
        logger.info("%s", engine.quantization)
    worker = Worker(
        engine,
        served_names(engine.name, methods, _names(model_names)),
        stream_interval=stream_interval,
        heart_beat_s=settings.heart_beat_s,
    )
    registration = None
    if register:
        registration = Registration(
            worker,
            controller=controller_address,
            address=(worker_address or f"http://{host}:{port}").rstrip("/"),
            heart_beat_s=settings.heart_beat_s,
        )
    with _readable_socket_errors(host, port):
        listener.listen(2048)
    warm_up = WarmUp(engine, model_path, quantization, compile_decoder=compile_decoder, measure=measure)
    logger.info("serving at http://%s:%d", host, port)
    config = uvicorn.Config(
        create_app(worker, registration.run if registration else None),
        log_level="warning",
        timeout_graceful_shutdown=settings.drain_s,
    )
    try:
        asyncio.run(_DrainingServer(config, worker, registration).serve(sockets=[listener]))
    finally:
        warm_up.close()
        engine.close()
        warm_up.wait()


class _DrainingServer(uvicorn.Server):
    """On SIGTERM or Ctrl-C: take nothing new, leave the controller, finish what runs, and end with status 0."""

    def __init__(self, config: uvicorn.Config, worker: "Worker", registration: "Registration | None") -> None:
        super().__init__(config)
        self._worker = worker
        self._registration = registration

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal once more at the end, and the process would die of it.
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.draining = True
        if self._registration:
            await self._registration.leave()
        await super().shutdown(sockets)


def _validated(kind: type[Model], label: str = "", **values: Any) -> Model:
    """A pydantic object, or one line that says which value is wrong."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        _fail(f"{label}{'.'.join(map(str, first['loc']))}: {first['msg']}")


def _adapters(options: list[str]) -> dict[str, Path]:
    """KIND=PATH options; a line that says which one is none."""
    pairs = [option.partition("=") for option in options]
    if wrong := next(
        (option for option, (kind, _, path) in zip(options, pairs, strict=True) if not kind or not path), ""
    ):
        _fail(f"--adapter {wrong}: give KIND=PATH, for instance medusa=PATH")
    return {kind: Path(path).expanduser() for kind, _, path in pairs}


def _bound_socket(host: str, port: int) -> socket.socket:
    """Takes the port, but does not listen: until the model is loaded, whoever calls is refused and not kept waiting."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _readable_socket_errors(host, port):
        listener.bind((host, port))
    return listener


@contextmanager
def _readable_socket_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _fail(f"cannot listen on {host}:{port}: {error.strerror or error}")


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
