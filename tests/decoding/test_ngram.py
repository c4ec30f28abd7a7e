"""The n-gram table, and the nodes that it gives."""

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.replay import ReplayedThread
from protocol.generation import DraftSettings
from workers.decoding.interface import Budget
from workers.decoding.ngram import LONGEST, Ngram, NgramTable, candidates
from workers.model.verification import ROOT

texts = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def path(token_ids: list[int], **draft: Any) -> ReplayedThread:
    """A thread as a method sees it."""
    return ReplayedThread(token_ids, len(token_ids), 100, DraftSettings(**draft))


class Dear(Budget):
    """No row is worth its price."""

    def worth(self, thread: Any, chances: Any, *, beside: int = 0) -> int:
        return 0


@given(texts, st.integers(0, 60))
def test_reading_in_pieces_is_reading_at_once(text: list[int], cut: int) -> None:
    whole, pieces = NgramTable(), NgramTable()
    whole.read(text)
    pieces.read(text[:cut])
    pieces.read(text)
    assert pieces.guesses(text[-LONGEST:]) == whole.guesses(text[-LONGEST:])


@given(texts)
def test_guesses_followed_the_last_token_before(text: list[int]) -> None:
    table = NgramTable()
    table.read(text)
    followers = {after for token, after in pairwise(text) if token == text[-1]}
    guesses = table.guesses(text[-LONGEST:])
    assert set(guesses) <= followers  # a long match may leave nothing to shorter ones
    assert bool(guesses) == bool(followers)
    assert sum(guesses.values()) <= 1.0 + 1e-9


@given(texts)
def test_nodes_come_by_falling_probability_and_after_their_parents(text: list[int]) -> None:
    nodes = [node for node, _ in zip(candidates(path(text)), range(30), strict=False)]
    chances = [chance for _, _, chance in nodes]
    assert chances == sorted(chances, reverse=True)
    assert all(ROOT <= parent < index for index, (parent, _, _) in enumerate(nodes))
    assert len({(parent, token) for parent, token, _ in nodes}) == len(nodes)


def test_the_longest_match_comes_first() -> None:
    """After "2 3" stood 4, after another "3" stood 5, later."""
    tree = Ngram().draft([path([1, 2, 3, 4, 9, 3, 5, 2, 3], nodes=2)], Budget(8))[0]
    assert tree.token_ids[0] == 4


def test_the_budget_limits_rows_and_worth_decides() -> None:
    thread = path([1, 2, 1, 2, 1, 2, 1])
    assert len(Ngram().draft([thread], Budget(3))[0]) == 3
    assert len(Ngram().draft([thread], Dear(8))[0]) == 0
    thread.draft = DraftSettings(nodes=5)
    assert len(Ngram().draft([thread], Dear(8))[0]) == 5
