"""The ``polydecode`` command: a verb for each part, and two that join them."""

import os
import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="Serve language models that decode several tokens per forward pass, and see every step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_CONTROLLER = "http://127.0.0.1:21001"


@app.command(context_settings=_PASS_THROUGH)
def controller(context: typer.Context) -> None:
    """Start a controller (all options of python -m controller)."""
    _become("controller", context.args)


@app.command(context_settings=_PASS_THROUGH)
def worker(context: typer.Context) -> None:
    """Start a worker (all options of python -m workers)."""
    _become("workers", context.args)


@app.command(context_settings=_PASS_THROUGH)
def webui(context: typer.Context) -> None:
    """Start the web page (all options of python -m webui)."""
    _become("webui", context.args)


@app.command("get-trace", context_settings=_PASS_THROUGH)
def get_trace(context: typer.Context) -> None:
    """Collect step traces over benchmark questions (all options of python -m traces.get_trace)."""
    _become("traces.get_trace", context.args)


@app.command()
def up(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of one that comes with polydecode")] = "demo",
) -> None:
    """Start controller, workers and page on this machine, and keep them running until Ctrl-C."""
    from polydecode.up import run

    raise typer.Exit(run(config))


@app.command()
def curve(
    model: Annotated[str, typer.Argument(help="model path or id, e.g. smollm2-135m")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … [default: a GPU if there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: by device]")] = None,
    quantization: Annotated[str | None, typer.Option(help="int8: weights of all products in 8 bits")] = None,
    compile_decoder: Annotated[bool, typer.Option("--compile/--no-compile", help="as a worker does (CPU)")] = True,
    fresh: Annotated[bool, typer.Option(help="measure again")] = False,
) -> None:
    """Show what a forward pass costs on this machine, by rows and context."""
    from polydecode.curve import run

    raise typer.Exit(run(model, device, dtype, quantization, compile_decoder=compile_decoder, fresh=fresh))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="model path or id, e.g. smollm2-135m")],
    method: Annotated[str | None, typer.Option(help="decoding method; default: the model's own")] = None,
    controller_url: Annotated[
        str | None, typer.Option(help=f"ask a running controller, e.g. {_CONTROLLER}; default: decode in this process")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 512,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
) -> None:
    """Chat in the terminal: each colour is what one decoding step produced."""
    from polydecode.chat import run
    from polydecode.streams import ChatOptions

    options = ChatOptions(model, method, temperature, max_new_tokens)
    raise typer.Exit(run(options, controller_url, system))


def _become(module: str, arguments: list[str]) -> None:
    """Replace this process with the module's own command line: its options, messages and signals are the real ones."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def main() -> None:
    """Entry point of the command."""
    app(prog_name="polydecode")


if __name__ == "__main__":
    main()
