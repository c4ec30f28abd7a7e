"""The window's levels, rows and n-grams against the published algorithm, and the pool."""

import pytest

from benchmarks.replay import ReplayedThread
from protocol.generation import DraftSettings
from workers.decoding.interface import Budget
from workers.decoding.lookahead import Lookahead, Pool, Window
from workers.decoding.trie import with_paths
from workers.model.tree import Needs
from workers.model.verification import ROOT, candidate_rows


def filled(width: int, level: int) -> tuple[Window, list[list[int]]]:
    """A window whose column i of level l holds position 1000 * l + place; and its sizes while it fills."""
    window = Window([list(range(width + level - 3))], level - 1, [Pool(5)], root=7)
    sizes = []
    while len(window.levels) < level - 1:
        sizes.append([len(each) for each in window.levels])
        window.advance([1000 * len(window.levels) + place for place in range(len(window.levels[-1]))])
    return window, [*sizes, [len(each) for each in window.levels]]


@pytest.mark.parametrize(("width", "level"), [(5, 4), (7, 5), (1, 3), (15, 5)])
def test_levels_fill_as_published(width: int, level: int) -> None:
    window, sizes = filled(width, level)
    assert sizes[0] == [width + level - 3]
    assert sizes[-1] == [width - 1, *[width] * (level - 2)]
    if (width, level) == (5, 4):
        assert sizes == [[6], [5, 6], [4, 5, 5]]
    window.advance([9] * width)
    assert [len(each) for each in window.levels] == sizes[-1]


def test_rows_stand_where_the_paper_puts_them() -> None:
    """W = 3, N = 4: column i of level l sees the trunk up to column i and the levels above it, at position l + i."""
    window = Window([[10, 11], [20, 21, 22], [30, 31, 32]], 3, [Pool(5)], root=7)
    tree = window.tree()
    assert tree.token_ids == [10, 11, 20, 21, 22, 30, 31, 32]
    assert list(tree.parents) == [ROOT, 0, ROOT, 0, 1, 2, 3, 4]
    assert list(tree.depths) == [1, 2, 1, 2, 3, 2, 3, 4]
    assert not any(tree.candidate)
    assert [row for row, need in enumerate(tree.needs) if need & Needs.LOGITS] == [5, 6, 7]
    assert window.reach == max(tree.depths)


def test_a_step_completes_one_ngram_a_column() -> None:
    window = Window([[10, 11], [20, 21, 22], [30, 31, 32]], 3, [Pool(5)], root=7)
    window.advance([40, 41, 42])
    assert list(window.pools[0].following(7)) == [(20, 30, 40)]
    assert list(window.pools[0].following(10)) == [(21, 31, 41)]
    assert list(window.pools[0].following(11)) == [(22, 32, 42)]
    assert window.levels == [[21, 22], [30, 31, 32], [40, 41, 42]]


def test_the_pool_forgets_the_oldest() -> None:
    pool = Pool(per_key=2, keys=2)
    for rest in ((1, 1), (2, 2), (1, 1), (3, 3)):
        pool.add(5, rest)
    assert list(pool.following(5)) == [(3, 3), (1, 1)]
    pool.add(6, (1, 1))
    pool.add(7, (1, 1))
    assert list(pool.following(5)) == []


def test_the_pool_reads_a_text_once() -> None:
    window = Window([[0]], 2, [Pool(5)])
    window.read_path([1, 2, 3])
    window.read_path([1, 2, 3, 4])
    assert list(window.pools[0].following(1)) == [(2, 3)]
    assert list(window.pools[0].following(2)) == [(3, 4)]


def test_paths_share_rows_and_keep_a_trees_own_numbers() -> None:
    window = Window([[50, 51]], 3, [Pool(5)])
    window.read_path([7, 1, 2, 3, 7, 1, 2, 4, 7, 50, 9, 6])
    tree = with_paths(window.tree(), list(window.guesses(7, most=3).items()))
    assert tree.token_ids == [50, 51, 50, 1, 9, 6, 2, 4, 3]
    assert list(tree.parents) == [-1, 0, -1, -1, 2, 4, 3, 6, 6]
    assert list(tree.candidate) == [False, False, *[True] * 7]
    assert all(tree.chances[row] <= tree.chances[parent] for row, parent in enumerate(tree.parents) if parent >= 2)


@pytest.mark.parametrize("shares", [False, True])
def test_the_pool_of_all_requests_serves_those_that_share(shares: bool) -> None:
    method = Lookahead()
    draft = DraftSettings(window=1, level=3, guesses=2, shared_pool=shares)
    written = ReplayedThread([1, 2, 3, 4, 5], 5, 20, draft)
    reader = ReplayedThread([9, 8, 2], 3, 20, draft)
    outsider = ReplayedThread([9, 8, 2], 3, 20, DraftSettings(window=1, level=3, guesses=2))
    method.draft([written], Budget(64))
    drafted = [
        [tree.token_ids[row] for row in candidate_rows(tree)] for tree in method.draft([reader, outsider], Budget(64))
    ]
    assert drafted == [[3, 4] if shares else [], []]
