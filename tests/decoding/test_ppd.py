"""Prompt tokens in the published format, and drafts that change no answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.replay import ReplayedThread
from polydecode import custom_generate
from protocol.errors import RequestError
from protocol.generation import DraftSettings
from tests.decoding.test_methods import (
    answers,
    assert_answers_fill_the_context,
    assert_preemption_changes_nothing,
    assert_same,
    assert_sampled_equals_vanilla,
    requests,
)
from tests.support.ppd_buffers import buffers
from tests.support.tiny import tiny_checkpoint, tiny_engine
from workers.decoding.interface import BadAdapter, Budget, Outcome
from workers.decoding.ngram import WithNgrams
from workers.decoding.ppd import STATE, Foreseen, Ppd, chains_of, published_trees
from workers.decoding.ppd_checkpoint import load_prompt_tokens, save_prompt_tokens
from workers.decoding.prompt_plan import plan_rows
from workers.decoding.prompt_tokens import ATTENTIONS, Attention, PromptTokens
from workers.decoding.sparse_tree import best_paths
from workers.model.quantization import input_embeddings
from workers.model.tree import TokenTree
from workers.model.verification import ROOT

METHODS = ["ppd", "ppd+ngram"]
SIZES: list[dict[str, Any]] = [{}, {"nodes": 1}, {"nodes": 40}, {"tree": "vicuna_7b_60"}, {"tree": "2_vicuna_7b_60"}]
# As published for Vicuna: without ``peft_type``.
CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
    "num_virtual_tokens": 3,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "Next 2 word",
    "token_dim": 64,
    "num_special_tokens": 3,
    "virtual_tokens_per_special_token": 1,
    "num_exits": 1,
    "use_custom_lm_head": False,
    "use_prefix_tuning": False,
    "vt_attention_type": "ensemble",
    "aggregation_type": "mean",
}


def random_tokens(
    special: int = 3, virtual: int = 1, attention: Attention = "ensemble", family: str = "llama"
) -> PromptTokens:
    """Near the embedding of a token, so that a random model says now and then what it would say there."""
    table = input_embeddings(tiny_checkpoint(family).model)
    noise = torch.randn(special, virtual, table.shape[1], generator=torch.Generator().manual_seed(virtual))
    return PromptTokens(table[70] + 0.05 * noise, attention)


def written(folder: Path, *shape: Any, family: str = "llama") -> Path:
    save_prompt_tokens(random_tokens(*shape, family=family), folder, "tiny")
    return folder


def published(folder: Path, config: dict[str, Any], name: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"prompt_embeddings": random_tokens().embeddings.flatten(0, 1).contiguous()}
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("more", [{}, {"peft_type": "PROMPT_TUNING"}, {"tokenizer_kwargs": None}], ids=str)
def test_published_checkpoints_load_and_are_left_alone(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    folder = published(tmp_path, {**CONFIG, **more}, name)
    before = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").chmod(0o444)
    tokens = load_prompt_tokens(folder, tiny_checkpoint().model)
    assert torch.equal(tokens.embeddings, random_tokens().embeddings)
    assert (len(tokens), tokens.virtual, tokens.attention) == (3, 1, "ensemble")
    assert (folder / "adapter_config.json").read_bytes() == before


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    tokens = random_tokens(4, 2, "encoder")
    save_prompt_tokens(tokens, tmp_path, "tiny")
    loaded = load_prompt_tokens(tmp_path, tiny_checkpoint().model)
    assert torch.equal(loaded.embeddings, tokens.embeddings) and loaded.attention == "encoder"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"aggregation_type": "adaptive_weighted"}, "aggregation_type is 'adaptive_weighted'"),
        ({"num_exits": 3}, "num_exits is 3"),
        ({"use_custom_lm_head": True}, "use_custom_lm_head is True"),
        ({"use_prefix_tuning": True}, "use_prefix_tuning is True"),
        ({"vt_attention_type": "maskd"}, "vt_attention_type 'maskd' is unknown"),
        ({"virtual_tokens_per_special_token": 2}, "is 3x64, but 3 special tokens of 2"),
    ],
)
def test_broken_checkpoints_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = published(tmp_path / "tokens", {**CONFIG, **change})
    with pytest.raises(BadAdapter, match=words) as caught:
        load_prompt_tokens(folder, tiny_checkpoint().model)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_files_that_are_no_prompt_tokens_are_refused_in_one_line(tmp_path: Path) -> None:
    model = tiny_checkpoint().model
    with pytest.raises(BadAdapter, match="no prompt tokens here"):
        load_prompt_tokens(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(BadAdapter, match="cannot be read"):
        load_prompt_tokens(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(BadAdapter, match="no weights here"):
        load_prompt_tokens(tmp_path, model)
    save_file({"other": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadAdapter, match="has no prompt_embeddings"):
        load_prompt_tokens(tmp_path, model)
    published(tmp_path, CONFIG)
    (tmp_path / "trees.json").write_text("[1]")
    with pytest.raises(BadAdapter, match="trees"):
        load_prompt_tokens(tmp_path, model)


# ---- chains ----------------------------------------------------------------------------------------------------------


def test_visibility_by_attention_type() -> None:
    """Rows (1, a), (1, b), (2, a), (2, b) of two special tokens of two virtual ones each."""
    expected = {
        "ensemble": [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]],
        "decoder": [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        "encoder": [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
    }
    for attention in ATTENTIONS:
        assert random_tokens(2, 2, attention).visible.astype(int).tolist() == expected[attention]


def drafting_thread(chances: list[list[float]], **draft: Any) -> ReplayedThread:
    thread = ReplayedThread([1, 2, 3], 3, 99, DraftSettings(**draft))
    tokens = [[100 * (depth + 1) + rank for rank in range(len(ranks))] for depth, ranks in enumerate(chances)]
    thread.state[STATE] = Foreseen([0.6, 0.3, 0.1], tokens, chances)
    return thread


tables = st.lists(
    st.lists(st.floats(0.01, 0.3), min_size=3, max_size=3).map(lambda ranks: sorted(ranks, reverse=True)), max_size=3
)


@given(table=tables, nodes=st.integers(1, 64), virtual=st.integers(1, 3), attention=st.sampled_from(ATTENTIONS))
def test_trees_are_trees_within_their_budget(
    table: list[list[float]], nodes: int, virtual: int, attention: Attention
) -> None:
    method = Ppd(random_tokens(3, virtual, attention))
    (tree,) = method.draft([drafting_thread(table, nodes=nodes)], Budget(60))
    assert len(tree) <= min(nodes, 60)
    candidates = [row for row, candidate in enumerate(tree.candidate) if candidate]
    paths = {row: tree.depths[row] for row in candidates}
    assert all(tree.token_ids[row] // 100 == depth for row, depth in paths.items())
    owned = [row for node in (ROOT, *candidates) for row in chains_of(tree).get(node, [])]
    assert sorted(owned + candidates) == list(range(len(tree))), "every prompt row hangs on one node"
    visible = tree.visibility()
    for node in (ROOT, *candidates):
        chain = chains_of(tree).get(node, [])
        if not chain:
            continue
        start = tree.depths[node] if node != ROOT else 0
        assert [tree.depths[row] for row in chain] == [start + 1 + place // virtual for place in range(len(chain))]
        size = len(chain)
        assert np.array_equal(visible[np.ix_(chain, chain)], random_tokens(3, virtual, attention).visible[:size, :size])
        above = visible[node, candidates] if node != ROOT else np.zeros(len(candidates), dtype=bool)
        assert (visible[np.ix_(chain, candidates)] == above).all()


@given(table=tables, most=st.integers(1, 40), cost=st.integers(1, 3))
def test_a_plan_is_worth_what_it_says(table: list[list[float]], most: int, cost: int) -> None:
    nodes = list(best_paths(table))
    gains = [0.6, 0.3, 0.1]
    plan = plan_rows(nodes, gains, most, cost)
    for rows in range(1, most + 1):
        count, chains = int(plan.candidates[rows]), plan.chains(rows)
        if plan.values[rows] == 0:
            continue
        assert len(chains) == 1 + count and count + cost * sum(chains) <= rows
        ends = [1.0 - sum(chance for path, chance in nodes[:count] if len(path) == 1)]
        ends += [own - sum(c for path, c in nodes[:count] if path[:-1] == node) for node, own in nodes[:count]]
        value = sum(chance for _, chance in nodes[:count])
        value += sum(end * sum(gains[:length]) for end, length in zip(ends, chains, strict=True))
        assert value == pytest.approx(plan.values[rows])


@pytest.mark.parametrize("name", published_trees())
def test_published_trees_have_the_published_buffers(name: str) -> None:
    """What is drafted by a named tree is the published layout's step, in another order of rows."""
    published = published_trees()[name]
    for state, nodes in enumerate(published.states, 1):
        ranks = [[0.3 / (1 + rank) for rank in range(10)]] * state
        thread = drafting_thread(ranks, tree=name)
        (tree,) = Ppd(random_tokens(published.special)).draft([thread], Budget(400))
        rows = sorted([(), *labels(tree)], key=lambda path: (len(path), path))
        order = [1 + labels(tree).index(path) if path else 0 for path in rows]
        visible = np.eye(1 + len(tree), dtype=bool)
        visible[:, 0] = True
        visible[1:, 1:] = tree.visibility()
        made = buffers(nodes, published.special)
        assert np.array_equal(visible[np.ix_(order, order)], made.attn_mask)
        assert [0, *(tree.depths[row - 1] for row in order[1:])] == made.position_ids.tolist()
        assert tuple(np.flatnonzero([not path or path[-1] >= 0 for path in rows])) == tuple(made.normal_token_indices)


def labels(tree: TokenTree) -> list[tuple[int, ...]]:
    """The path of every row: ranks of its candidates, then -1, -2, ... along its chain."""
    chains = {row: (node, place) for node, rows in chains_of(tree).items() for place, row in enumerate(rows, 1)}
    found: list[tuple[int, ...]] = []
    for row, token in enumerate(tree.token_ids):
        node, length = chains.get(row, (tree.parents[row], 0))
        above = found[node] if node != ROOT else ()
        found.append(above + (tuple(range(-1, -length - 1, -1)) or (token % 100,)))
    return found


def test_the_guesses_are_those_of_the_accepted_node() -> None:
    method = Ppd(random_tokens(3, 2))
    thread = drafting_thread([[0.4, 0.3, 0.2], [0.4, 0.3, 0.2]], nodes=60)
    (tree,) = method.draft([thread], Budget(60))
    node, chain = max((row, rows) for row, rows in chains_of(tree).items() if row != ROOT)
    logits = torch.full((1 + len(tree), 300), -9.0)
    for place, row in enumerate(chain):
        logits[1 + row, 50 + place // 2] = 5.0 + place % 2
    every = range(len(logits))
    method.observe([thread], [Outcome(tree, [node], [1, 2], logits, None, every, every)])
    guesses = thread.state[STATE].tokens
    assert [ranks[0] for ranks in guesses] == [50 + depth for depth in range(len(chain) // 2)]


def test_candidates_of_others_get_chains() -> None:
    """Behind n-grams that prompt tokens did not foresee, the next step has guesses as well."""
    thread = drafting_thread([[0.4, 0.3, 0.2]], nodes=12)
    thread.token_ids = thread.token_ids * 4
    (alone,) = Ppd(random_tokens()).draft([thread], Budget(60))
    (tree,) = WithNgrams(Ppd(random_tokens())).draft([thread], Budget(60))
    assert alone.token_ids == tree.token_ids[: len(alone)]
    added = [row for row in range(len(alone), len(tree)) if tree.candidate[row]]
    assert added and any(chains_of(tree).get(row) for row in added)


# ---- drafts ----------------------------------------------------------------------------------------------------------

Shape = tuple[int, int, Attention]
SHAPES: list[Shape] = [
    (3, 1, "ensemble"),
    (4, 2, "ensemble"),
    (3, 2, "decoder"),
    (4, 2, "encoder"),
]


@pytest.mark.parametrize(
    ("family", "shape"),
    [*(("llama", shape) for shape in SHAPES), ("gemma3", SHAPES[3]), ("gpt2", SHAPES[1]), ("gpt_oss", SHAPES[0])],
    ids=str,
)
def test_greedy_equals_vanilla(family: str, shape: Shape, tmp_path: Path) -> None:
    model = tiny_checkpoint(family).model
    adapters = {"ppd": written(tmp_path, *shape, family=family)}
    with tiny_engine(family, methods=METHODS, adapters=adapters) as engine:
        plain = answers(engine, requests(temperature=0, method="vanilla"))
        for method in METHODS:
            for sizes in SIZES:
                mine = requests(temperature=0, method=method, draft=sizes)
                texts = [request["prompt"] for request in mine]
                assert_same(engine, model, texts[:1], answers(engine, mine[:1]), plain)
                assert_same(engine, model, texts, answers(engine, mine), plain)
        assert engine.counters.accepted > 0
        assert engine.status().free_pages == engine.status().total_pages


@pytest.mark.parametrize(
    ("method", "shape"), [*(("ppd", shape) for shape in SHAPES), ("ppd+ngram", SHAPES[1])], ids=str
)
def test_sampled_equals_vanilla_by_seed(method: str, shape: Shape, tmp_path: Path) -> None:
    assert_sampled_equals_vanilla(method, adapters={"ppd": written(tmp_path, *shape)})


def test_preempted_requests_go_on_with_the_same_answer(tmp_path: Path) -> None:
    assert_preemption_changes_nothing("ppd", adapters={"ppd": written(tmp_path)})


def test_answers_may_fill_the_context(tmp_path: Path) -> None:
    with tiny_engine("gpt2", methods=METHODS, adapters={"ppd": written(tmp_path, 4, 2, family="gpt2")}) as engine:
        assert_answers_fill_the_context(engine, METHODS)


def test_inside_generate(tmp_path: Path) -> None:
    model = tiny_checkpoint().model
    inputs = {"input_ids": torch.tensor([[65, 66] * 4]), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(**inputs, custom_generate=custom_generate("ppd", adapter=written(tmp_path), nodes=20))
    assert torch.equal(ours, model.generate(**inputs))
    with pytest.raises(ValueError, match="unknown tree 'oak'; known: vicuna_7b_60"):
        model.generate(**inputs, custom_generate=custom_generate("ppd", adapter=tmp_path, tree="oak"))


def test_they_take_the_memory_of_their_embeddings(tmp_path: Path) -> None:
    with tiny_engine(methods=METHODS, adapters={"ppd": written(tmp_path)}) as engine:
        assert engine.memory()["ppd"] == 3 * 64 * 4
        assert engine.description().endswith("ppd 768 bytes")


def test_trees_are_known_by_method(tmp_path: Path) -> None:
    with tiny_engine(methods=METHODS, adapters={"ppd": written(tmp_path)}) as engine:
        for method, known in (("ppd", "vicuna_7b_60"), ("vanilla", "this method has none")):
            with pytest.raises(RequestError, match=f"unknown tree 'mc_sim_7b_63'; known: {known}"):
                list(engine.generate("a", method=method, draft={"tree": "mc_sim_7b_63"}))
