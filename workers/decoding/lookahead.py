"""Lookahead decoding (Fu et al. 2024): Jacobi iterations in a window make n-grams, a pool keeps them, the model checks.

The window has N - 1 levels of W columns; column i of level l stands l + i positions behind the root. It is a tree:
level 0 is a chain below the root, and from its row i hangs column i through the levels. Each step the last level's
choices complete W n-grams, and every level moves up by one. Drafted are the n-grams of the pool that begin with the
root's token, merged into a trie, from the first step on.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random

import torch

from workers.decoding.interface import Budget, DraftThread, Method, Outcome
from workers.decoding.trie import with_paths
from workers.model.sampling import most_probable
from workers.model.tree import EMPTY_TREE, Needs, TokenTree
from workers.model.verification import ROOT

LEVEL, GUESSES = 5, 7
# (W, N) from which the tuner chooses, and the tokens a step that such a window adds in the long run to what the text
# itself offers; without prices it is the second one, published for small models.
WINDOWS = (((3, 4), 0.12), ((7, 5), 0.3), ((15, 5), 0.39))
PUBLISHED = 1
SHARED_GUESSES = 32  # n-grams of a first token in the pool of all requests
# How often the first token of the latest n-gram was right (of the second latest half as often, and so on), and how
# often each further token after right ones: of the latest n-gram, and of others.
FIRST, NEXT_OF_LATEST, NEXT = 0.45, 0.8, 0.55


class Pool:
    """n-grams by their first token, the ``per_key`` latest of each, of the ``keys`` latest first tokens."""

    def __init__(self, per_key: int, keys: int = 1 << 16) -> None:
        self._per_key = per_key
        self._keys = keys
        self._grams: OrderedDict[int, OrderedDict[tuple[int, ...], None]] = OrderedDict()

    def add(self, first: int, rest: tuple[int, ...]) -> None:
        """Keep an n-gram, as the latest of its first token."""
        grams = self._grams.setdefault(first, OrderedDict())
        self._grams.move_to_end(first)
        grams[rest] = None
        grams.move_to_end(rest)
        if len(grams) > self._per_key:
            grams.popitem(last=False)
        if len(self._grams) > self._keys:
            self._grams.popitem(last=False)

    def following(self, first: int) -> Iterable[tuple[int, ...]]:
        """What may follow ``first``, latest first."""
        return reversed(self._grams.get(first, OrderedDict()))


@dataclass
class Window:
    """The levels of one thread's window; while it is filled, fewer than N - 1 and longer ones.

    Attributes:
        levels: level 0 lacks the first column, which is the root.
        height: N - 1.
        gain: tokens a step that the window is taken to add; None for one that was asked for.
        pools: the thread's own n-grams, and those of all threads where the request shares them.
        root: the token at the head of the running step's window; None if the step runs without one.
        read: tokens of the thread that are in the pool.
    """

    levels: list[list[int]]
    height: int
    pools: list[Pool]
    gain: float | None = None
    root: int | None = None
    read: int = 0

    @property
    def rows(self) -> int:
        return sum(map(len, self.levels))

    @property
    def reach(self) -> int:
        """Positions behind the root up to the last row's."""
        return len(self.levels[0]) + len(self.levels) - 1

    def tree(self) -> TokenTree:
        """The window's rows: level 0's chain, then level after level."""
        first, *others = self.levels
        parents = list(range(-1, len(first) - 1))
        above = [ROOT, *range(len(first))]
        token_ids = list(first)
        for level in others:
            parents += above[: len(level)]
            above = list(range(len(token_ids), len(token_ids) + len(level)))
            token_ids += level
        last = len(self.levels[-1])
        rows = len(token_ids)
        needs = [Needs.NOTHING] * (rows - last) + [Needs.LOGITS] * last
        return TokenTree.of(token_ids, parents, candidate=[False] * rows, needs=needs, chances=[0.0] * rows)

    def advance(self, new: list[int]) -> None:
        """Take in the model's choices behind the last level's rows."""
        if len(self.levels) < self.height:
            self.levels = [level[1:] for level in self.levels] + [new[1:] if len(self.levels) > 1 else new]
            return
        assert self.root is not None, "a step without a window has nothing to tell it"
        first, *others = self.levels
        for column, head in enumerate([self.root, *first]):
            self._add(head, (*(level[column] for level in others), new[column]))
        self.levels = [others[0][1:], *others[1:], new]

    def read_path(self, token_ids: Sequence[int]) -> None:
        """Put the n-grams of a thread's own text into the pool, from where the last call stopped."""
        for end in range(max(self.height, self.read), len(token_ids)):
            self._add(token_ids[end - self.height], tuple(token_ids[end - self.height + 1 : end + 1]))
        self.read = len(token_ids)

    def guesses(self, first: int, most: int) -> dict[tuple[int, ...], float]:
        """Paths that may follow ``first`` by the ``most`` latest n-grams of the pools, and how probable they are.

        A path stands behind its beginnings and is at most as probable.
        """
        grams = dict.fromkeys(chain.from_iterable(pool.following(first) for pool in self.pools))
        guesses: dict[tuple[int, ...], float] = {}
        for rank, gram in enumerate(islice(grams, most)):
            chance = FIRST / (1 + rank)
            for length in range(1, len(gram) + 1):
                guesses[gram[:length]] = guesses.get(gram[:length], 0.0) + chance
                chance *= NEXT if rank else NEXT_OF_LATEST
        return dict(sorted(guesses.items(), key=lambda guess: -guess[1]))  # stable: beginnings stay in front

    def _add(self, first: int, rest: tuple[int, ...]) -> None:
        for pool in self.pools:
            pool.add(first, rest)


class Lookahead(Method):
    """Lookahead with W, N and G from the request, else those that are published for small models."""

    name = "lookahead"

    def __init__(self) -> None:
        self._shared = Pool(SHARED_GUESSES)

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        return [self._tree(thread, budget) for thread in threads]

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]) -> None:
        windows: list[Window] = [thread.state["lookahead"] for thread in threads]
        ran = [
            (window, outcome.logits[1 : 1 + len(window.levels[-1])])
            for window, outcome in zip(windows, outcomes, strict=True)
            if window.root is not None and len(outcome.tree) >= window.rows  # the engine may have dropped the draft
        ]
        if not ran:
            return
        new = iter(most_probable(torch.cat([logits for _, logits in ran])))
        for window, logits in ran:
            window.advance(list(islice(new, len(logits))))

    def _tree(self, thread: DraftThread, budget: Budget) -> TokenTree:
        window: Window = thread.state.get("lookahead") or self._new_window(thread, budget)
        thread.state["lookahead"] = window
        if thread.draft.pool_from_prompt is not False:
            window.read_path(thread.token_ids)
        runs = _runs(window, thread, budget)
        window.root = thread.token_ids[-1] if runs else None
        tree = window.tree() if runs else EMPTY_TREE
        guesses = window.guesses(thread.token_ids[-1], thread.draft.guesses or GUESSES)
        nodes = [(path, chance) for path, chance in guesses.items() if len(path) <= thread.remaining]
        most = max(0, min(thread.draft.nodes or budget.rows, budget.rows - len(tree)))
        wished = thread.draft.nodes or thread.draft.guesses
        kept = most if wished else budget.worth(thread, [chance for _, chance in nodes[:most]], beside=len(tree))
        return with_paths(tree, nodes[: min(most, kept)])

    def _new_window(self, thread: DraftThread, budget: Budget) -> Window:
        """Level 0 of W + N - 3 tokens of the prompt, drawn by the request's seed and the thread's path."""
        draft = thread.draft
        gain: float | None
        (width, level), gain = WINDOWS[budget.best([(_rows(*size), gain) for size, gain in WINDOWS], PUBLISHED) or 0]
        if draft.window or draft.level:
            width, level, gain = draft.window or width, draft.level or LEVEL, None
        random = Random(f"{thread.sampling.seed} {thread.path}")
        prompt = thread.token_ids[: thread.prompt_length]
        first = [random.choice(prompt) for _ in range(width + level - 3)]
        shared = [self._shared] if draft.shared_pool else []
        return Window([first], level - 1, [Pool(draft.guesses or GUESSES), *shared], gain)


def _runs(window: Window, thread: DraftThread, budget: Budget) -> bool:
    """Whether the window takes part in a step: not beyond the answer's end, where there is nothing left to find."""
    fits = window.rows <= budget.rows and window.reach < thread.remaining
    return fits and (window.gain is None or budget.best([(window.rows, window.gain)], 0) is not None)


def _rows(width: int, level: int) -> int:
    """Of a full window, without the root."""
    return width * (level - 1) - 1
