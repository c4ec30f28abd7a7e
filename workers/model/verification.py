"""Which drafted rows become part of the answer.

The model chooses a token at the root and at every candidate row (:func:`workers.model.sampling.choose`). From the root
on, while a candidate child holds the chosen token, that child is accepted; the first choice without such a child is the
next token. Every emitted token is thus exactly what ordinary decoding would have chosen at its place.
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


def path_tokens(tree: TokenTree, row: int) -> list[int]:
    """The tree's tokens from the root's child down to ``row``."""
    tokens: list[int] = []
    while row != ROOT:
        tokens.append(tree.token_ids[row])
        row = tree.parents[row]
    return tokens[::-1]


def candidate_rows(tree: TokenTree) -> list[int]:
    """Rows at which the model's choice matters."""
    return [row for row, candidate in enumerate(tree.candidate) if candidate]


def _candidate_children(tree: TokenTree) -> dict[tuple[int, int], int]:
    children: dict[tuple[int, int], int] = {}
    for row in candidate_rows(tree):
        children.setdefault((tree.parents[row], tree.token_ids[row]), row)  # of equal siblings the first counts
    return children
