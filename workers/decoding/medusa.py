"""Medusa: heads on the last hidden state guess the next tokens, and a sparse tree of their best guesses is drafted."""

from collections.abc import Sequence
from itertools import islice

import torch

from workers.decoding.heads import MedusaHeads
from workers.decoding.interface import Budget, DraftThread, Method, Outcome
from workers.decoding.sparse_tree import best_paths
from workers.decoding.trie import Trie
from workers.model.tree import EMPTY_TREE, Needs, TokenTree
from workers.model.verification import ROOT

WIDTH = 10  # guesses of a head, as published
MOST_NODES = 64  # without a wish
STATE = "medusa"


class Medusa(Method):
    """Drafts the paths that are most probable by what the heads say in this step.

    The heads read the hidden state of the row that chose the thread's last token; head 0 guesses what follows it.
    """

    name = "medusa"
    root_needs = Needs.LOGITS | Needs.HIDDEN
    row_needs = Needs.HIDDEN

    def __init__(self, heads: MedusaHeads) -> None:
        self._heads = heads

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        trees = [EMPTY_TREE] * len(threads)
        ready = [index for index, thread in enumerate(threads) if STATE in thread.state]
        if not ready:
            return trees
        most = [min(threads[index].draft.nodes or MOST_NODES, budget.rows) for index in ready]
        depth = min(len(self._heads), max(most), max(threads[index].remaining for index in ready))
        if depth < 1:
            return trees
        hidden = torch.stack([threads[index].state[STATE] for index in ready])
        tokens, chances = self._heads.guesses(hidden, depth, min(WIDTH, max(most)))
        for index, rows, own_tokens, own_chances in zip(ready, most, tokens, chances, strict=True):
            trees[index] = _tree(threads[index], rows, own_tokens, own_chances, budget)
        return trees

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]) -> None:
        for thread, outcome in zip(threads, outcomes, strict=True):
            last = 1 + outcome.rows[-1] if outcome.rows else 0  # every row of the tree asked, after the root
            thread.state[STATE] = outcome.hidden[last].clone()  # a view would keep the whole step


def _tree(
    thread: DraftThread, most: int, tokens: list[list[int]], chances: list[list[float]], budget: Budget
) -> TokenTree:
    nodes = list(islice(best_paths(chances[: max(0, thread.remaining)]), most))
    if not thread.draft.nodes:
        nodes = nodes[: budget.worth(thread, [chance for _, chance in nodes])]
    trie = Trie(needs=Needs.HIDDEN)
    rows: dict[tuple[int, ...], int] = {(): ROOT}
    for path, chance in nodes:
        rows[path] = trie.add(rows[path[:-1]], tokens[len(path) - 1][path[-1]], chance)
    return trie.tree()
