"""``python -m webui``: the page on its own port."""

import socket
import sys
from typing import Annotated

import typer
import uvicorn

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def serve(
    controller_url: Annotated[str, typer.Option(help="address of the controller")] = "http://127.0.0.1:21001",
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one")] = 7860,
) -> None:
    """Serve the web page; it works (and says so) without a controller, too."""
    listener = _listen(host, port)
    from webui.app import create_app  # only now, because importing gradio takes seconds: a port in use shows at once

    print(f"page: http://{host}:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(create_app(controller_url), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, or the end with one line."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        sys.exit(f"webui: cannot listen on {host}:{port}: {error.strerror}")


if __name__ == "__main__":
    cli(prog_name="python -m webui")
