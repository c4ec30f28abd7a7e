"""What the threads of an answer said, and that it is what plain decoding of each path alone says."""

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.verify import TIE
from tests.support.tiny import CHILD, FORK
from workers.forking import ControlTokens
from workers.request import Event

CONTROL = ControlTokens(FORK, CHILD)


@dataclass
class Told:
    """What a thread was told by its events."""

    parent: int | None = None
    tokens: list[int] = field(default_factory=list)


def threads_of(events: list[Event]) -> dict[int, Told]:
    """What each thread said."""
    threads: dict[int, Told] = {}
    for event in events:
        for step in event.step.threads if event.step else []:
            told = threads.setdefault(step.thread, Told(step.parent))
            told.tokens += step.token_ids
    return threads


@dataclass
class Path:
    """A thread's whole path; its own tokens start at ``start``."""

    tokens: list[int]
    start: int
    control: ControlTokens

    @property
    def forks(self) -> list[int]:
        return [place for place, token in enumerate(self.tokens) if token == self.control.fork and place >= self.start]


Paths = dict[tuple[int, ...], Path]


def paths_of(threads: dict[int, Told], prompt: list[int], control: ControlTokens = CONTROL) -> Paths:
    """Each thread's path by its number among its siblings, behind its parent's."""
    places: dict[int, tuple[int, ...]] = {0: ()}
    paths = {(): Path(prompt + threads[0].tokens, len(prompt), control)}
    for number in sorted(threads)[1:]:
        parent = threads[number].parent
        assert parent is not None
        above = places[parent]
        child = sum(place[:-1] == above for place in paths if place)
        prefix = [*paths[above].tokens[: paths[above].forks[child] + 1], control.child]
        places[number] = (*above, child)
        paths[places[number]] = Path(prefix + threads[number].tokens, len(prefix), control)
    return paths


def in_reading_order(paths: Paths, place: tuple[int, ...] = ()) -> list[int]:
    """What all threads say, in the order in which it is read."""
    path, tokens = paths[place], []
    for index in range(path.start, len(path.tokens)):
        if index not in path.forks:
            tokens.append(path.tokens[index])
        elif (child := (*place, path.forks.index(index))) in paths:
            tokens += in_reading_order(paths, child)
    return tokens


@torch.inference_mode()
def assert_greedy(
    model: Any, path: Path, depth: int, *, bias: float = 0.0, max_depth: int = 2, max_children: int = 64
) -> None:
    """Each own token is what plain decoding of the path alone chooses, with the bans."""
    fork, child = path.control.fork, path.control.child
    logits = model(torch.tensor([path.tokens])).logits[0].float()
    for place in range(path.start, len(path.tokens)):
        row = logits[place - 1].clone()
        row[fork] += bias
        row[child] = -torch.inf
        forked = sum(earlier < place for earlier in path.forks)
        if depth >= max_depth or forked >= max_children or path.tokens[place - 1] in (fork, child):
            row[fork] = -torch.inf
        assert row[path.tokens[place]] >= row.max() - TIE
