"""The verifier emits what ordinary decoding would have emitted, for every tree and every model choice."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.model.tree import TokenTree
from workers.model.verification import ROOT, candidate_rows, path_tokens, walk

tokens = st.integers(0, 3)


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    size = draw(st.integers(0, 12))
    return TokenTree.of(
        [draw(tokens) for _ in range(size)],
        [draw(st.integers(-1, row - 1)) for row in range(size)],
        candidate=[draw(st.booleans()) for _ in range(size)],
    )


def next_token(path: tuple[int, ...], seed: int) -> int:
    """A deterministic model: what it chooses after a path."""
    return random.Random(f"{seed}{path}").randrange(4)


def by_steps(seed: int, limit: int, terminal: set[int]) -> list[int]:
    """Ordinary decoding with that model."""
    path: list[int] = []
    while len(path) < limit and not (path and path[-1] in terminal):
        path.append(next_token(tuple(path), seed))
    return path


@given(tree=trees(), seed=st.integers(0, 500), limit=st.integers(1, 6), terminal=st.sets(tokens, max_size=2))
def test_walks_emit_what_ordinary_decoding_emits(tree: TokenTree, seed: int, limit: int, terminal: set[int]) -> None:
    choices = {node: next_token(tuple(path_tokens(tree, node)), seed) for node in (ROOT, *candidate_rows(tree))}
    taken = walk(tree, choices, limit=limit, terminal=terminal)
    expected = by_steps(seed, limit, terminal)
    assert taken.token_ids == expected[: len(taken.token_ids)]
    assert [tree.token_ids[row] for row in taken.rows] == expected[: len(taken.rows)]
    assert all(tree.candidate[row] for row in taken.rows)
    assert [tree.parents[row] for row in taken.rows] == [ROOT, *taken.rows][: len(taken.rows)]
    cut = len(expected) == limit or expected[-1] in terminal
    stuck = not any(
        tree.candidate[row] and tree.parents[row] == ([ROOT, *taken.rows])[-1] and token == taken.token_ids[-1]
        for row, token in enumerate(tree.token_ids)
    )
    assert stuck or cut, "the walk stopped although a drafted token was the chosen one"


def test_the_bonus_token_of_a_full_match_is_kept() -> None:
    chain = TokenTree.of([1, 2], [-1, 0])
    assert walk(chain, {ROOT: 1, 0: 2, 1: 3}, limit=9, terminal=()).token_ids == [1, 2, 3]


def test_nothing_follows_a_terminal_token_even_if_it_was_drafted() -> None:
    chain = TokenTree.of([1, 2], [-1, 0])
    taken = walk(chain, {ROOT: 1, 0: 2, 1: 3}, limit=9, terminal={1})
    assert (taken.rows, taken.token_ids) == ([0], [1])


@pytest.mark.parametrize(
    "columns",
    [
        {"token_ids": [1, 2], "parents": [1, -1]},
        {"token_ids": [1], "parents": [0]},
        {"token_ids": [1], "parents": [-1, -1]},
        {"token_ids": [-1], "parents": [-1], "candidate": [False]},
        {"token_ids": [1], "parents": [-1], "candidate": []},
    ],
)
def test_malformed_trees_are_refused(columns: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError):
        TokenTree.of(**columns)


def test_max_accepted_counts_candidates_only() -> None:
    tree = TokenTree.of([1, 2, 3, 4], [-1, 0, 1, 0], candidate=[True, False, True, True])
    assert tree.max_accepted == 2
