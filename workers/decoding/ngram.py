"""n-gram drafts (prompt lookup): what followed the latest tokens when they stood in the prompt or the answer before.

After Saxena's prompt lookup decoding, with suffixes of all lengths at once: a table for each length counts which token
followed which n-gram; a node's guesses come from the longest suffix of its path that was seen before, and what this
suffix leaves open from the next shorter one. The most probable nodes, best first, are the tree.
"""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import count, islice

from workers.decoding.interface import Budget, DraftThread, Method, Outcome
from workers.decoding.trie import Trie
from workers.model.tree import EMPTY_TREE, Needs, TokenTree
from workers.model.verification import ROOT

LONGEST = 5  # tokens of a suffix
# How often a guess was right by the length of the suffix that it came from, 1 to LONGEST, if it was the only one.
TRUST = (0.35, 0.55, 0.65, 0.7, 0.9)
LEAST = 0.02  # probability below which a node is not worth its row
MOST_NODES = 16  # without a wish


class NgramTable:
    """What followed every n-gram of a growing text, for n from 1 to LONGEST."""

    def __init__(self) -> None:
        self._followers: list[dict[tuple[int, ...], dict[int, int]]] = [{} for _ in range(LONGEST)]
        self._read = 0

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in what was appended to the text since the last call."""
        for end in range(max(1, self._read), len(token_ids)):
            token = token_ids[end]
            for length in range(1, min(LONGEST, end) + 1):
                counts = self._followers[length - 1].setdefault(tuple(token_ids[end - length : end]), {})
                counts[token] = counts.pop(token, 0) + 1  # the latest one stands last
        self._read = len(token_ids)

    def guesses(self, suffix: Sequence[int]) -> dict[int, float]:
        """Tokens that may follow ``suffix`` and how probable they are, from the longest n-gram down."""
        guesses: dict[int, float] = {}
        left = 1.0
        for length in range(min(LONGEST, len(suffix)), 0, -1):
            counts = self._followers[length - 1].get(tuple(suffix[-length:]))
            if not counts:
                continue
            trusted = left * TRUST[length - 1]
            latest = next(reversed(counts))
            total = sum(counts.values()) + 1  # the latest one counts twice
            for token, times in counts.items():
                guesses[token] = guesses.get(token, 0.0) + trusted * (times + (token == latest)) / total
            left -= trusted
            if left < LEAST:
                break
        return guesses


class Ngram(Method):
    """Drafts the most probable continuations by the thread's own text."""

    name = "ngram"

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        return [add_ngrams(EMPTY_TREE, thread, budget) for thread in threads]


class WithNgrams(Method):
    """Another method with the candidates of n-grams merged into its trees."""

    def __init__(self, base: Method) -> None:
        self.name = f"{base.name}+ngram"
        self.root_needs = base.root_needs
        self.row_needs = base.row_needs
        self.trees = base.trees
        self._base = base

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        trees = self._base.draft(threads, budget)
        merged = [add_ngrams(tree, thread, budget, self.row_needs) for tree, thread in zip(trees, threads, strict=True)]
        return [self._base.complete(tree, thread, budget) for tree, thread in zip(merged, threads, strict=True)]

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]) -> None:
        self._base.observe(threads, outcomes)


def add_ngrams(tree: TokenTree, thread: DraftThread, budget: Budget, needs: Needs = Needs.NOTHING) -> TokenTree:
    """``tree`` and the nodes by n-grams that it lacks, as many as the request asks for or as are worth their rows."""
    most = min(thread.draft.nodes or MOST_NODES, budget.rows - len(tree))
    nodes = list(islice(candidates(thread), max(0, most)))
    kept = (
        len(nodes) if thread.draft.nodes else budget.worth(thread, [chance for _, _, chance in nodes], beside=len(tree))
    )
    trie = Trie(tree, needs=needs)
    rows: list[int] = []
    for parent, token, chance in nodes[:kept]:
        rows.append(trie.add(ROOT if parent == ROOT else rows[parent], token, chance))
    return trie.tree()


def candidates(thread: DraftThread) -> Iterator[tuple[int, int, float]]:
    """Nodes from the most probable one on: the parent's number (ROOT, or as yielded before), token, probability.

    None is so deep that the answer would be over before it.
    """
    table: NgramTable = thread.state.setdefault("ngram", NgramTable())
    table.read(thread.token_ids)
    heap: list[tuple[float, int, int, int, tuple[int, ...], int]] = []
    order = count()

    def push(parent: int, suffix: tuple[int, ...], chance: float, depth: int) -> None:
        for token, share in table.guesses(suffix).items() if depth < thread.remaining else ():
            if chance * share >= LEAST:
                heappush(heap, (-chance * share, next(order), parent, token, suffix, depth))

    push(ROOT, tuple(thread.token_ids[-LONGEST:]), 1.0, 1)
    for node in count():
        if not heap:
            return
        negative, _, parent, token, suffix, depth = heappop(heap)
        yield parent, token, -negative
        push(node, (*suffix, token)[-LONGEST:], -negative, depth + 1)
