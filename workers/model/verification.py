"""Which drafted rows become part of the answer.

The model chooses a token at the root and at every candidate row (:func:`workers.model.sampling.choose`). From the root
on, while a candidate child holds the chosen token, that child is accepted; the first choice without such a child is the
next token. Every emitted token is thus exactly what ordinary decoding would have chosen at its place. A request may ask
for typical acceptance instead, which is lossy: see :func:`typical_walk`.
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


def walk(tree: TokenTree, choices: Mapping[int, int], *, limit: int, terminal: Collection[int]) -> Walk:
    """Follow the model's choices through a tree.

    Args:
        tree: the draft.
        choices: the chosen token at ROOT and at each candidate row.
        limit: most tokens to emit, at least 1.
        terminal: tokens after which nothing may be emitted (EOS, stop tokens, [Fork]).
    """
    children = _candidate_children(tree)
    node, rows, tokens = ROOT, [], [choices[ROOT]]
    while (node, tokens[-1]) in children:
        node = children[node, tokens[-1]]
        rows.append(node)
        if len(tokens) == limit or tokens[-1] in terminal:
            break
        tokens.append(choices[node])
    return Walk(rows, tokens)


def typical_walk(
    tree: TokenTree,
    choices: Mapping[int, int],
    typical: Mapping[int, float],
    *,
    limit: int,
    terminal: Collection[int],
) -> Walk:
    """Medusa's typical acceptance: the longest path whose rows are all typical, then the model's choice behind it.

    Args:
        tree, choices, limit, terminal: as in :func:`walk`.
        typical: log-probability of the rows that may be accepted; of paths of equal length the likelier one is.
    """
    best: tuple[int, float, int] = (0, 0.0, ROOT)
    reached = {ROOT: (0, 0.0)}
    for row, parent in enumerate(tree.parents):
        if row not in typical or parent not in reached or (parent != ROOT and tree.token_ids[parent] in terminal):
            continue
        length, likelihood = reached[parent]
        if length < limit:
            reached[row] = (length + 1, likelihood + typical[row])
            best = max(best, (*reached[row], row))
    rows = _path_rows(tree, best[2])
    tokens = [tree.token_ids[row] for row in rows]
    if len(tokens) < limit and not (tokens and tokens[-1] in terminal):
        tokens.append(choices[best[2]])
    return Walk(rows, tokens)


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
