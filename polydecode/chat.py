"""``polydecode chat``: a conversation in the terminal, coloured by decoding step."""

import contextlib
import importlib.util
from collections.abc import Generator, Iterator
from itertools import cycle

from rich.console import Console
from rich.text import Text

from polydecode.streams import ChatOptions, LocalStream, Messages, Piece, RemoteStream, Stream
from protocol.errors import RequestError
from protocol.trace import TraceSummary

STEP_STYLES = ("default", "cyan", "green", "yellow")
_HINT = "each colour is one decoding step · Ctrl-C stops an answer · /clear forgets · /exit or Ctrl-D leaves"
_CONTROL_CODES = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run(options: ChatOptions, controller_url: str | None, system: str | None) -> int:
    """Chat until the user leaves; the exit status."""
    console = Console(highlight=False)
    try:
        stream = _open(options, controller_url, console)
    except (RequestError, OSError, ValueError) as error:
        console.print(Text(f"polydecode: {_line(error)}", "red"))
        return 1
    except KeyboardInterrupt:
        return 130
    try:
        Chat(stream, console, system).run()
    finally:
        stream.close()
    return 0


def _open(options: ChatOptions, controller_url: str | None, console: Console) -> Stream:
    if controller_url:
        return RemoteStream(options, controller_url)
    with console.status(f"loading {options.model}"):
        return LocalStream(options)


class Chat:
    """One conversation."""

    def __init__(self, stream: Stream, console: Console, system: str | None = None) -> None:
        self._stream = stream
        self._console = console
        self._opening: Messages = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def run(self) -> None:
        """Read and answer until the end of the input."""
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # gives the prompt a history and editing
        self._console.print(_HINT, style="dim", soft_wrap=True)
        for line in self._lines():
            if line == "/exit":
                return
            if line == "/clear":
                self._messages = list(self._opening)
                self._console.print("forgotten", style="dim")
            elif line:
                self._answer(line)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield self._console.input("\n[bold]›[/bold] ").strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:  # at the prompt it only discards the line
                self._console.print()

    def _answer(self, question: str) -> None:
        """Ask, and show the answer. What was said before a stop stays said; a failed question is forgotten."""
        self._messages.append({"role": "user", "content": question})
        said: list[str] = []
        try:
            self._show(self._stream.answer(list(self._messages)), said)
        except KeyboardInterrupt:
            self._console.print("\nstopped", style="dim")
        except (RequestError, OSError, ValueError) as error:
            self._console.print(Text(("\n" if said else "") + _line(error), "red"))
        if said:
            self._messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self._messages.pop()

    def _show(self, answer: Generator[Piece, None, None], said: list[str]) -> None:
        styles = cycle(STEP_STYLES)
        with contextlib.closing(answer):
            for piece in answer:
                if piece.text:
                    said.append(piece.text)
                    shown = Text(piece.text.translate(_CONTROL_CODES), next(styles))
                    self._console.print(shown, end="", soft_wrap=True)
                if piece.summary:
                    self._console.print("\n" + figures(piece.summary), style="dim", soft_wrap=True)


def figures(summary: TraceSummary) -> str:
    """The line under an answer."""
    parts = [
        f"{summary.tokens} tokens",
        f"{summary.steps} steps",
        f"{summary.tokens_per_step:.2f} tokens/step",
        f"{summary.tokens_per_s:.1f} tokens/s",
    ]
    if summary.ttft_ms is not None:
        parts.append(f"first token after {summary.ttft_ms / 1000:.2f} s")
    if summary.finish_reason == "length":
        parts.append("cut at the longest length")
    return " · ".join(parts)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
