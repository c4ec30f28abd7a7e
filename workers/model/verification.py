"""Which drafted rows become part of the answer.

The model chooses a token at the root and at every row that is reached (:func:`workers.model.sampling.choose`). While a
candidate child holds the chosen token, that child is accepted; the first choice without such a child is the next token.
Every emitted token is thus exactly what ordinary decoding would have chosen at its place. A request may ask for typical
acceptance instead, which is lossy: see :meth:`Walker.accept`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from workers.model.tree import TokenTree

ROOT = -1


@dataclass(frozen=True)
class Walk:
    """Accepted rows of the tree, in path order, and the emitted tokens.

    The tokens are the accepted rows' and one that follows; after a cut (limit, terminal) none follows.
    """

    rows: list[int]
    token_ids: list[int]


class Walker:
    """Follows the model's choices through a tree: told the choice at ``node`` by :meth:`take`, until it is ``done``.

    So only rows that are reached are ever chosen at: a draw costs a pass over the vocabulary.
    """

    def __init__(self, tree: TokenTree, *, limit: int, terminal: Collection[int]) -> None:
        """
        Args:
            tree: the draft.
            limit: most tokens to emit, at least 1.
            terminal: tokens after which nothing may be emitted (EOS, stop tokens, [Fork]).
        """
        self._tree = tree
        self._limit = limit
        self._terminal = terminal
        self._children = _candidate_children(tree)
        self.node = ROOT
        self.done = False
        self.walk = Walk([], [])

    def take(self, token: int) -> None:
        """Emit the model's choice at ``node``, and accept the row that holds it, if there is one."""
        self.walk.token_ids.append(token)
        child = self._children.get((self.node, token))
        if child is not None:
            self.node = child
            self.walk.rows.append(child)
        self.done = child is None or self._is_full

    def accept(self, typical: Mapping[int, float]) -> None:
        """Medusa's typical acceptance: emit the longest path whose rows are all typical; one choice may follow it.

        Args:
            typical: log-probability of the rows that may be accepted; of paths of equal length the likelier one is.
        """
        best: tuple[int, float, int] = (0, 0.0, ROOT)
        reached = {ROOT: (0, 0.0)}
        for row, parent in enumerate(self._tree.parents):
            ended = parent != ROOT and self._tree.token_ids[parent] in self._terminal
            if row in typical and parent in reached and not ended and reached[parent][0] < self._limit:
                length, likelihood = reached[parent]
                reached[row] = (length + 1, likelihood + typical[row])
                best = max(best, (*reached[row], row))
        self.node = best[2]
        self._children = {}
        self.walk = Walk(_path_rows(self._tree, self.node), path_tokens(self._tree, self.node))
        self.done = self._is_full

    @property
    def _is_full(self) -> bool:
        tokens = self.walk.token_ids
        return len(tokens) == self._limit or bool(tokens and tokens[-1] in self._terminal)


def walk(tree: TokenTree, choices: Mapping[int, int], *, limit: int, terminal: Collection[int]) -> Walk:
    """All of it where the choices at ROOT and at the candidate rows are known; see :class:`Walker`."""
    walker = Walker(tree, limit=limit, terminal=terminal)
    while not walker.done:
        walker.take(choices[walker.node])
    return walker.walk


def path_tokens(tree: TokenTree, row: int) -> list[int]:
    """The tree's tokens from the root's child down to ``row``."""
    return [tree.token_ids[above] for above in _path_rows(tree, row)]


def _path_rows(tree: TokenTree, row: int) -> list[int]:
    rows: list[int] = []
    while row != ROOT:
        rows.append(row)
        row = tree.parents[row]
    return rows[::-1]


def candidate_rows(tree: TokenTree) -> list[int]:
    """Rows at which the model's choice matters."""
    return [row for row, candidate in enumerate(tree.candidate) if candidate]


def _candidate_children(tree: TokenTree) -> dict[tuple[int, int], int]:
    children: dict[tuple[int, int], int] = {}
    for row in candidate_rows(tree):
        children.setdefault((tree.parents[row], tree.token_ids[row]), row)  # of equal siblings the first counts
    return children
