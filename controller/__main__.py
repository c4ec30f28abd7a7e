"""``python -m controller``: serve one controller."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import typer
import uvicorn
from pydantic import ValidationError

from controller.app import create_app
from controller.settings import DispatchMethod, Settings

cli = typer.Typer(add_completion=False)

_GRACE_S = 5  # for answers in progress when the process is told to stop


@cli.command()
def main(
    host: str | None = typer.Option(None, help="Address to listen on (127.0.0.1)."),
    port: int | None = typer.Option(None, min=0, max=65535, help="Port to listen on (21001)."),
    dispatch_method: DispatchMethod | None = typer.Option(None, help="How a worker is chosen (shortest_queue)."),
    state_file: Path | None = typer.Option(None, help="Where the table of workers is kept between runs."),
) -> None:
    """Serve the controller: workers register with it, clients talk to it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "dispatch_method": dispatch_method,
        "state_file": state_file,
    }
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        typer.echo(f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}", err=True)
        raise typer.Exit(2) from None
    listener = _listener(settings.host, settings.port)
    config = uvicorn.Config(
        create_app(settings),
        log_level="info",
        access_log=False,  # heart beats would drown what happens
        timeout_graceful_shutdown=_GRACE_S,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        typer.echo(
            f"error: cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}", err=True
        )
        raise typer.Exit(1) from None


if __name__ == "__main__":
    cli()
