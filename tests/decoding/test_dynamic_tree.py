"""Published dynamic trees, files of them, the builder beside the published one and beside every choice there is."""

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import product
from math import nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ppd_buffers import buffers
from workers.decoding.dynamic_tree import DynamicTree, PromptNode, expected_tokens, read_dynamic_trees, trees_json
from workers.decoding.sparse_tree import BadTree, RankPath
from workers.decoding.tree_builder import build_tree

SHIPPED = Path(str(files("configs") / "trees" / "ppd.json"))
PUBLISHED = read_dynamic_trees(SHIPPED)

# name -> (candidates, prompts, tokens a step) of each state
SIZES = {
    "vicuna_7b_60": ((10, 20, 20), (30, 40, 40), 2.245),
    "vicuna_7b_105": ((10, 33, 34), (30, 72, 71), 2.37),
    "vicuna_13b_60": ((10, 20, 20), (30, 40, 40), 2.31),
    "mobilellama_285": ((10, 84, 89), (30, 201, 196), 2.21),
    "2_vicuna_7b_60": ((10, 20), (20, 40), 2.24),
}

# Accuracies by which the trees were built, to four digits; the last ones of vicuna_13b are not known.
VICUNA_7B = [
    [0.4834, 0.1434, 0.0736, 0.0454, 0.0309, 0.0216, 0.0166, 0.0132, 0.0093, 0.0084],
    [0.2626, 0.1456, 0.0811, 0.0576, 0.0428, 0.0323, 0.0257, 0.0215, 0.0190, 0.0155],
    [0.1641, 0.1176, 0.0809, 0.0578, 0.0459, 0.0367, 0.0313, 0.0232, 0.0237, 0.0179],
]
VICUNA_13B = [
    [0.5181, 0.1446, 0.0704, 0.0381, 0.0248, 0.0195, 0.0130, 0.0120, 0.0087, 0.0082],
    [0.2941, 0.1459, 0.0873, 0.0577, 0.0386, 0.0324, 0.0251, 0.0205, 0.0155, 0.0134],
    [0.1794, 0.1257, 0.0833, 0.0626, 0.0456],
]

Shape = list[list[tuple[RankPath, int]]]


def shape(tree: DynamicTree) -> Shape:
    return [[(node.path, node.prompts) for node in nodes] for nodes in tree.states]


def accuracies_of(tree: DynamicTree) -> list[list[float]]:
    """As far as a tree tells them: by the probabilities to reach the first node of each depth and its siblings."""
    table = []
    for depth, nodes in enumerate(tree.states):
        reached: Counter[RankPath] = Counter()
        for node in nodes:
            for end in range(len(node.path) + 1):
                reached[node.path[:end]] += node.ends  # type: ignore[assignment]
        above = reached[(0,) * depth] if depth else 1
        table.append([reached[path] / above for rank in range(10) if (path := (*(0,) * depth, rank)) in reached])
    return table


# ---- published trees -------------------------------------------------------------------------------------------------


def test_published_trees_ship() -> None:
    assert PUBLISHED.keys() == SIZES.keys()
    assert trees_json(PUBLISHED) == SHIPPED.read_text()


@pytest.mark.parametrize("name", SIZES)
def test_published_trees_have_the_published_sizes(name: str) -> None:
    tree, (candidates, prompts, tokens) = PUBLISHED[name], SIZES[name]
    assert tuple(map(len, tree.states)) == candidates
    assert tuple(sum(node.prompts for node in nodes) for nodes in tree.states) == prompts
    assert tree.widths == tuple(tree.special + sum(pair) for pair in zip(candidates, prompts, strict=True))
    assert max(tree.widths) == tree.special + int(name.split("_")[-1])
    assert expected_tokens(tree) == pytest.approx(tokens, abs=0.006)


def test_expected_tokens_of_a_chain_by_hand() -> None:
    def tree(*states: tuple[float, int]) -> DynamicTree:
        return DynamicTree.of([[PromptNode((0,), *state)] for state in states])

    assert expected_tokens(tree((0.5, 1))) == pytest.approx(1.5)
    # An eighth of the steps in state 2 leads to state 1 and all steps in state 1 lead back: 8 steps in 2 and 1 in 1.
    assert expected_tokens(tree((0.5, 2), (0.125, 1))) == pytest.approx(1 + (8 * 0.125 + 1 * 0.5) / 9)
    assert expected_tokens(tree((1.0, 1), (1.0, 2))) == pytest.approx(2), "answers begin in the last state"
    for wrong in (1.5, -0.5):
        with pytest.raises(BadTree, match="state 1: its probabilities"):
            expected_tokens(tree((wrong, 1)))


# ---- trees and their files -------------------------------------------------------------------------------------------

ONE = [PromptNode((0,), 0.5, 1)]
TWO = [PromptNode((0,), 0.4, 2), PromptNode((0, 0), 0.1, 1)]

BROKEN: dict[str, tuple[list[list[PromptNode]], str]] = {
    "no states": ([], "at least one state"),
    "empty state": ([ONE, []], "state 2 has no nodes"),
    "lost beginning": ([ONE, [PromptNode((1, 0), 0.1, 1)]], r"state 2: path \[1, 0\] is there without its beginning"),
    "too deep": ([TWO, TWO], r"state 1: path \[0, 0\] is deeper than 1"),
    "negative rank": ([[PromptNode((-1,), 0.1, 1)]], "ranks from 0"),
    "root": ([[PromptNode((), 0.1, 1)]], "ranks from 0"),
    "twice": ([ONE + ONE], "state 1: a path occurs twice"),
    "no prompts": ([[PromptNode((0,), 0.5, 0)]], r"path \[0\] has 0 prompts, not 1 to 1"),
    "too many prompts": ([[PromptNode((0,), 0.5, 3)], TWO], r"path \[0\] has 3 prompts, not 1 to 2"),
    "no probability": ([[PromptNode((0,), nan, 1)]], r"path \[0\] ends with nan"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_trees_are_refused_in_one_line(fault: str) -> None:
    states, words = BROKEN[fault]
    with pytest.raises(BadTree, match=words) as caught:
        DynamicTree.of(states)
    assert "\n" not in str(caught.value)


def test_parents_are_put_first() -> None:
    assert DynamicTree.of([ONE, TWO[::-1]]) == DynamicTree.of([ONE, TWO])


def read(folder: Path, content: str, name: str = "tree.json") -> dict[str, DynamicTree]:
    (folder / name).write_text(content)
    return read_dynamic_trees(folder / name)


def test_json_of_one_tree_and_of_several(tmp_path: Path) -> None:
    tree = DynamicTree.of([ONE, TWO])
    one = json.loads(trees_json({"any": tree}))["any"]
    assert read(tmp_path, json.dumps(one)) == {"tree": tree}
    assert read(tmp_path, trees_json({"a": tree, "b": tree})) == {"a": tree, "b": tree}


LISTS = "dynamic_sparse_trees_4 = {1: [[[0], 0.5, 1]], 2: [[[0], 0.4, 2], [[0, 0], 0.1, 1]]}"
TUPLES = "dynamic_sparse_trees_4 = {1: [([0], 0.5, 1)], 2: [([0], 0.4, 2), ([0, 0], 0.1, 1)]}"
REACHED = "dynamic_sparse_trees_4 = {1: [([0], 0.5, 1)], 2: [([0], 0.5, 2), ([0, 0], 0.1, 1)]}"


@pytest.mark.parametrize("source", [LISTS, TUPLES, REACHED], ids=["lists", "tuples", "probabilities of reaching"])
def test_published_python_files(tmp_path: Path, source: str) -> None:
    (tree,) = read(tmp_path, f"# Trees\nimport torch\n{source}\n", "trees.py").values()
    assert shape(tree) == shape(DynamicTree.of([ONE, TWO]))
    assert [[node.ends for node in nodes] for nodes in tree.states] == [[0.5], pytest.approx([0.4, 0.1])]


def test_longer_chains_are_cut(tmp_path: Path) -> None:
    (tree,) = read(tmp_path, LISTS.replace("2]", "6]"), "trees.py").values()
    assert tree == DynamicTree.of([ONE, TWO])


def test_python_files_are_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    call = f"open({str(mark)!r}, 'w')"
    evil = f"{call}\nf = lambda: 0\na = {call}\nb = {{1: [[[0], {call}, 1]]}}\n{{1: {call}}}\nc: dict = {{}}\n"
    assert list(read(tmp_path, f"{evil}{LISTS}\n", "trees.py")) == ["dynamic_sparse_trees_4"]
    with pytest.raises(BadTree, match="there is no tree in it"):
        read(tmp_path, evil, "trees.py")
    assert not mark.exists()


NO_TREES = {
    "3": "object of states",
    "[]": "object of states",
    "{}": "there is no tree",
    "{": "cannot be read",
    "{" * 100_000: "cannot be read",
    '{"a": {}}': "'a': a dynamic tree has at least one state",
    '{"2": [[[0], 0.5, 1]]}': r"numbered from 1 without gaps, not \[2\]",
    '{"x": [[[0], 0.5, 1]]}': "cannot be read",
    '{"1": 7}': "cannot be read",
    '{"1": [[[0], 0.5]]}': r"an entry is \[path, probability, prompts\], not \[\[0\], 0.5\]",
    '{"1": [[[0.5], 0.5, 1]]}': "an entry is",
    '{"1": [["0", 0.5, 1]]}': "an entry is",
    '{"1": [[[0], "0.5", 1]]}': "an entry is",
    '{"1": [[[0], 0.5, 1.5]]}': "an entry is",
    '{"1": [[[0], 1%s, 1]]}' % ("0" * 400): "cannot be read",
    '{"1": [[[0], NaN, 1]]}': "ends with nan",
    '{"1": [[[0], 0.5, 0]]}': "has 0 prompts",
}  # fmt: skip


@pytest.mark.parametrize("content", NO_TREES, ids=lambda content: str(content)[:24])
def test_files_without_trees_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(BadTree, match=NO_TREES[content]) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    for content in ("a = {", "a = {[]: 1}", "\0", "a = {1: 2}", f"a = {'-' * 100_000}1"):
        with pytest.raises(BadTree, match=r"trees\.py") as caught:
            read(tmp_path, content, "trees.py")
        assert "\n" not in str(caught.value)
    with pytest.raises(BadTree, match="cannot be read"):
        read_dynamic_trees(tmp_path / "nowhere.json")


# ---- the builder -----------------------------------------------------------------------------------------------------

TABLES = {"vicuna_7b_60": VICUNA_7B, "vicuna_7b_105": VICUNA_7B, "vicuna_13b_60": VICUNA_13B}


@pytest.mark.parametrize("name", TABLES)
def test_the_published_builder_is_reproduced(name: str) -> None:
    tree = build_tree(TABLES[name], int(name.split("_")[-1]), reference=True)
    assert shape(tree) == shape(PUBLISHED[name]), "node by node, in the published order"
    for mine, theirs in zip(tree.states, PUBLISHED[name].states, strict=True):
        assert [node.ends for node in mine] == pytest.approx([node.ends for node in theirs], abs=1e-4)


def test_the_published_builder_is_reproduced_by_the_trees_own_accuracies() -> None:
    published = PUBLISHED["mobilellama_285"]
    tree = build_tree(accuracies_of(published), 285, reference=True)
    for mine, theirs in zip(shape(tree), shape(published), strict=True):
        assert dict(mine) == dict(theirs), "two nodes that are equal to five digits may change places"


@pytest.mark.parametrize("name", TABLES)
def test_the_corrected_objective_agrees_with_the_published_one_there(name: str) -> None:
    rows = int(name.split("_")[-1])
    tree = build_tree(TABLES[name], rows)
    assert tuple(map(len, tree.states)) == SIZES[name][0]
    assert max(tree.widths) == rows + 3
    assert expected_tokens(tree) == pytest.approx(expected_tokens(PUBLISHED[name]), abs=5e-4)


@pytest.mark.parametrize("rows", [2, 3, 5, 10, 20, 35, 105, 500])
@pytest.mark.parametrize("special", [1, 2, 3, 4, 5])
def test_any_number_of_prompts_and_rows(special: int, rows: int) -> None:
    table = (VICUNA_7B * 2)[:special]
    tree = build_tree(table, rows)
    assert tree.special == special and max(tree.widths) <= rows + special
    assert expected_tokens(build_tree(table, rows + 1)) >= expected_tokens(tree) - 1e-9
    if rows >= 20 and special <= 3:
        published = build_tree(table, min(rows, 105), reference=True)
        assert expected_tokens(tree) >= expected_tokens(published) - 1e-4  # whose probabilities are rounded


def test_published_expectations_are_reached() -> None:
    """Tokens a step of the published trees of other sizes for vicuna_7b."""
    for rows, tokens in ((10, 1.83), (20, 1.98), (35, 2.11), (50, 2.20), (75, 2.29), (120, 2.39), (200, 2.49)):
        assert expected_tokens(build_tree(VICUNA_7B, rows)) > tokens - 0.006


tables = st.lists(
    st.lists(st.floats(0, 1), min_size=1, max_size=4).map(
        lambda ranks: [rank / max(1, sum(ranks)) for rank in ranks],
    ),
    min_size=1,
    max_size=4,
)


@given(table=tables, rows=st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_built_trees_are_trees(table: list[list[float]], rows: int) -> None:
    tree = build_tree(table, rows)
    assert DynamicTree.of(tree.states) == tree, "every invariant, parents first"
    assert max(tree.widths) <= rows + len(table)
    assert 1 - 1e-9 <= expected_tokens(tree) <= 1 + len(table)
    for nodes in tree.states:
        assert [node.ends for node in nodes] == pytest.approx(stopping(table, [node.path for node in nodes]), abs=1e-9)


def stopping(table: list[list[float]], paths: Sequence[RankPath]) -> list[float]:
    reached = {path: float(np.prod([table[depth][rank] for depth, rank in enumerate(path)])) for path in paths}
    return [chance - sum(reached[below] for below in paths if below[:-1] == path) for path, chance in reached.items()]


def every_choice(table: list[list[float]], rows: int) -> list[list[tuple[PromptNode, ...]]]:
    """[state][choice]: all chains on the most probable paths of that state, or of one before."""
    choices: list[list[tuple[PromptNode, ...]]] = []
    for depth in range(1, len(table) + 1):
        mine = list(choices[-1]) if choices else []
        everything = [path for end in range(depth) for path in product(*(range(len(r)) for r in table[: end + 1]))]
        reached = {path: np.prod([table[d][rank] for d, rank in enumerate(path)]) for path in everything}
        ranked = sorted(everything, key=lambda path: (-reached[path], path))
        for size in range(1, min(rows // 2, len(ranked)) + 1):
            paths = ranked[:size]
            for prompts in product(range(1, len(table) + 1), repeat=size):
                if size + sum(prompts) <= rows:
                    mine.append(tuple(map(PromptNode, paths, stopping(table, paths), prompts)))
        choices.append(mine)
    return choices


@given(table=tables.filter(lambda table: len(table) == 2), rows=st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_no_choice_is_better(table: list[list[float]], rows: int) -> None:
    best = max(expected_tokens(DynamicTree(states)) for states in product(*every_choice(table, rows)))
    assert expected_tokens(build_tree(table, rows)) == pytest.approx(best, abs=1e-6)


BAD_ACCURACIES: list[list[list[float]]] = [[], [[]], [[0.5], []], [[-0.1]], [[nan]], [[0.6, 0.5]], [[[0.5]]]]  # type: ignore[list-item]


@pytest.mark.parametrize("table", BAD_ACCURACIES, ids=str)
def test_bad_accuracies_are_refused(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="accuracies"):
        build_tree(table, 10)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        build_tree([[0.5]], 1)
    with pytest.raises(ValueError, match="at least 20 rows"):
        build_tree(VICUNA_7B, 19, reference=True)


# ---- buffers ---------------------------------------------------------------------------------------------------------


def test_worked_buffers() -> None:
    """0 root; 1 [-1]; 2 [0]; 3 [1]; 4 [-1,-2]; 5 [0,-1]; 6 [0,0]; 7 [1,-1]; 8 [-1,-2,-3]; 9 [0,-1,-2]; 10 [0,0,-1]."""
    made = buffers([PromptNode((0,), 0.4, 2), PromptNode((1,), 0.2, 1), PromptNode((0, 0), 0.1, 1)], 3)
    assert made.position_ids.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert made.tree_indices.tolist() == [0, -3, 1, 2, -2, -3, 11, -3, -1, -2, -3]
    assert made.normal_token_indices.tolist() == [0, 2, 3, 6]
    assert made.special_token_indices == ((1, 4, 8), (5, 9), (7,), (10,))
    assert made.retrieve_indices.tolist() == [[0, 1, 3], [0, 2, -1]]
    ancestors = [[], [], [], [], [1], [2], [2], [3], [1, 4], [2, 5], [2, 6]]
    seen = [sorted({0, *above, row}) for row, above in enumerate(ancestors)]
    assert [np.flatnonzero(row).tolist() for row in made.attn_mask] == seen


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_buffers_have_the_published_widths(name: str) -> None:
    tree = PUBLISHED[name]
    for nodes, width in zip(tree.states, tree.widths, strict=True):
        made = buffers(nodes, tree.special)
        assert made.attn_mask.shape == (width + 1, width + 1)
        assert made.attn_mask.sum(axis=1).tolist() == (made.position_ids + 1).tolist()
        rows = [*made.normal_token_indices.tolist(), *(row for chain in made.special_token_indices for row in chain)]
        assert sorted(rows) == list(range(width + 1))
        assert set(made.retrieve_indices.ravel().tolist()) | {-1} == set(range(-1, len(nodes) + 1))


def test_buffers_have_ten_guesses() -> None:
    with pytest.raises(BadTree, match="10 guesses"):
        buffers([PromptNode((10,), 0.1, 1)], 1)
