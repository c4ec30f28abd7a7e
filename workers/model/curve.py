"""The latency curve: what a forward pass costs by its rows and its context, measured on the device that serves."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from workers.model.batch import Run
from workers.model.checkpoint import cache_folder
from workers.model.devices import device_name
from workers.model.pages import PageTable
from workers.model.runner import ModelRunner
from workers.model.tree import Needs, TokenTree

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (64, 1024)  # rows of KV; models and budgets too small for the second one are measured at what they hold
ROUNDS = 5

Result = TypeVar("Result")


class Lend(Protocol):
    """Runs a function on a runner, between two steps where it serves."""

    def __call__(self, work: Callable[[ModelRunner], Result], /) -> Result: ...


@dataclass(frozen=True)
class LatencyCurve:
    """Milliseconds of a forward pass, ``ms[i][j]`` for ``contexts[i]`` rows of KV and ``rows[j]`` rows of one thread.

    Every row wants its logits, as in the verification of a tree.
    """

    device: str
    dtype: str
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def at(self, rows: float, context: float) -> float:
        """Milliseconds between and beyond the measured points: linear in both, never below the fewest rows' cost."""
        costs = [_interpolated(self.rows, costs, max(rows, self.rows[0])) for costs in self.ms]
        return max(_interpolated(self.contexts, costs, context), min(costs)) if len(costs) > 1 else costs[0]

    def __str__(self) -> str:
        width = max(7, *(len(f"{cost:.1f}") + 1 for costs in self.ms for cost in costs))
        lines = ["context " + "".join(f"{rows:>{width}}" for rows in self.rows) + "  rows"]
        for context, costs in zip(self.contexts, self.ms, strict=True):
            lines.append(f"{context:>7} " + "".join(f"{cost:>{width}.1f}" for cost in costs) + "  ms")
        return "\n".join(lines)


def _interpolated(points: Sequence[int], values: Sequence[float], at: float) -> float:
    """Linear between the points; beyond them along the nearest pair."""
    if len(points) == 1:
        return values[0]
    right = min(max(bisect_left(points, at), 1), len(points) - 1)
    share = (at - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def latency_curve(lend: Lend, *, fresh: bool = False) -> LatencyCurve:
    """The curve of the runner that ``lend`` lends: from the cache unless ``fresh``, else measured now.

    One forward pass is lent at a time, so that a serving engine goes on with its requests meanwhile.

    Raises:
        OutOfPages: requests hold so many pages that not even a short context can be measured.
    """
    path = lend(_cache_path)
    if path.is_file() and not fresh:
        return _read(path)
    curve = measure(lend)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(curve)))
    return curve


def measure(lend: Lend, *, rows: Sequence[int] = ROWS, rounds: int = ROUNDS) -> LatencyCurve:
    """The fastest of ``rounds`` passes of every size in turn. Raises OutOfPages."""
    contexts = lend(_contexts)
    tables: list[PageTable] = []
    try:
        for context in contexts:
            tables.append(lend(partial(stored_thread, context=context)))
        sizes = [(index, count) for index in range(len(contexts)) for count in rows]
        for _, count in sizes[: len(rows)]:  # the first of its size may compile or capture
            lend(partial(timed_pass, tables[0], count))
        taken: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
        for _ in range(rounds):
            for index, count in sizes:
                taken[index, count].append(lend(partial(timed_pass, tables[index], count)))
    finally:
        lend(partial(_release, tables))
    ms = tuple(_rising([min(taken[index, count]) for count in rows]) for index in range(len(contexts)))
    device, dtype = lend(lambda runner: (device_name(runner.device), runner.number_type))
    return LatencyCurve(device, dtype, contexts, tuple(rows), ms)


def _rising(costs: Sequence[float]) -> tuple[float, ...]:
    """Without what other programs added: they slow passes down, never up, and more rows never cost less."""
    return tuple(min(costs[index:]) for index in range(len(costs)))


def _contexts(runner: ModelRunner) -> tuple[int, ...]:
    """At most a quarter of the budget, with room for the rows behind them."""
    most = min(runner.kv_tokens // 4, runner.context_length - 2)
    return tuple(dict.fromkeys(max(1, min(context, most)) for context in CONTEXTS))


def stored_thread(runner: ModelRunner, context: int) -> PageTable:
    """A thread of ``context`` rows, with room for one more. Raises OutOfPages."""
    table = runner.new_table()
    table.reserve(context + 1)
    ids = [row % runner.vocabulary for row in range(context)]
    for start in range(0, context, runner.step_rows):
        chunk = ids[start : start + runner.step_rows]
        runner.forward(runner.prepare([Run(chunk, table, last_needs=Needs.NOTHING)]))
        table.advance(len(chunk))
    return table


def _release(tables: Sequence[PageTable], runner: ModelRunner) -> None:
    for table in tables:
        table.release()


def timed_pass(table: PageTable, rows: int, runner: ModelRunner) -> float:
    """Milliseconds of a pass over one token and a tree of ``rows`` - 1."""
    tree = TokenTree.of([row % runner.vocabulary for row in range(1, rows)], [-1] * (rows - 1))
    return runner.forward(runner.prepare([Run([0], table, tree)])).watch.ms()


def _cache_path(runner: ModelRunner) -> Path:
    parts = [runner.identity, device_name(runner.device), str(torch.get_num_threads()), str(runner.compiled)]
    parts.append(Path(__file__).read_text())
    return cache_folder() / "curves" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> LatencyCurve:
    stored = json.loads(path.read_text())
    ms = tuple(map(tuple, stored.pop("ms")))
    return LatencyCurve(**{**stored, "contexts": tuple(stored["contexts"]), "rows": tuple(stored["rows"])}, ms=ms)
