"""Heads of every published layout, the published trees, and drafts that change no answer."""

import importlib.resources
import json
from collections.abc import Callable
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
from protocol.generation import DraftSettings
from tests.decoding.test_methods import (
    answers,
    assert_answers_fill_the_context,
    assert_preemption_changes_nothing,
    assert_same,
    assert_sampled_equals_vanilla,
    requests,
)
from tests.support.tiny import tiny_checkpoint, tiny_engine
from workers.decoding.int8_heads import load_drafting_heads
from workers.decoding.interface import BadAdapter, Budget
from workers.decoding.medusa import STATE, Medusa, published_trees
from workers.decoding.medusa_checkpoint import load_heads
from workers.decoding.sparse_tree import BadTree, SparseTree, best_paths, read_trees, search_tree
from workers.model.kernels.build import load_kernels
from workers.model.quantization import output_projection
from workers.model.verification import path_tokens

HEADS, TOPK = 3, 10
ANY = torch.tensor(0)  # the chosen token, for heads that do not read it
Tensors = dict[str, torch.Tensor]


def output() -> torch.Tensor:
    return output_projection(tiny_checkpoint().model)


def random_heads(count: int = HEADS, layers: int = 1, *, own: bool = True) -> Tensors:
    """Random weights in the layout of Medusa 0.1."""
    generator = torch.Generator().manual_seed(count)
    vocabulary, hidden = output().shape

    def noise(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    tensors: Tensors = {}
    for head in range(count):
        for layer in range(layers):
            tensors[f"{head}.{layer}.linear.weight"] = noise(hidden, hidden)
            tensors[f"{head}.{layer}.linear.bias"] = noise(hidden)
        if own:
            tensors[f"{head}.{layers}.weight"] = output() + 0.05 * noise(vocabulary, hidden)
    return tensors


def reference(tensors: Tensors, hidden: torch.Tensor, count: int, layers: int) -> torch.Tensor:
    """As medusa-llm computes it: Sequential(ResBlock × layers, Linear)."""
    logits = []
    for head in range(count):
        x = hidden
        for layer in range(layers):
            block = torch.nn.functional.linear(
                x, tensors[f"{head}.{layer}.linear.weight"], tensors[f"{head}.{layer}.linear.bias"]
            )
            x = x + torch.nn.functional.silu(block)
        logits.append(x @ tensors.get(f"{head}.{layers}.weight", output()).T)
    return torch.stack(logits)


def merged(tensors: Tensors) -> Tensors:
    others = {"lm_head.weight": torch.zeros(3, 4), "model.layers.0.mlp.weight": torch.zeros(2)}
    return {**others, **{f"medusa_head.{name}": tensor for name, tensor in tensors.items()}}


def as_vllm(tensors: Tensors) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        head, layer, *rest = name.split(".")
        renamed[f"blocks.{head}.layers.{layer}.{rest[1]}" if len(rest) == 2 else f"lm_heads.{head}.weight"] = tensor
    return renamed


def write(folder: Path, name: str, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 7}))  # as published
    return folder


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "0.1 pt": ("medusa_lm_head.pt", dict),
    "0.1 safetensors": ("medusa_lm_head.safetensors", dict),
    "merged": ("model.safetensors", merged),
    "merged shard": ("model-00002-of-00002.safetensors", merged),
    "vllm": ("model.safetensors", as_vllm),
    "vllm bin": ("pytorch_model.bin", as_vllm),
}


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("count", "layers"), [(2, 1), (5, 1), (2, 2)])
def test_every_layout_gives_the_same_logits(tmp_path: Path, layout: str, count: int, layers: int, own: bool) -> None:
    tensors = random_heads(count, layers, own=own)
    name, change = LAYOUTS[layout]
    loaded = load_heads(write(tmp_path / "heads", name, change(tensors)), tiny_checkpoint().model)
    hidden = torch.randn(7, output().shape[1])
    assert len(loaded) == count
    assert torch.allclose(loaded.logits(hidden, ANY), reference(tensors, hidden, count, layers), atol=1e-4)
    assert torch.allclose(loaded.logits(hidden, ANY, 1), reference(tensors, hidden, 1, layers), atol=1e-4)


def test_tied_layers_are_applied_once_for_each_key(tmp_path: Path) -> None:
    """``[ResBlock(h)] * 2`` is one module twice; its checkpoint lists both names."""
    tensors = random_heads(2, 1)
    tied = {name.replace(".1.weight", ".2.weight"): tensor for name, tensor in tensors.items()}
    tied |= {name.replace(".0.linear", ".1.linear"): t for name, t in tensors.items() if ".0.linear" in name}
    loaded = load_heads(write(tmp_path / "heads", "medusa_lm_head.pt", tied), tiny_checkpoint().model)
    hidden = torch.randn(3, output().shape[1])
    assert torch.allclose(loaded.logits(hidden, ANY), reference(tied, hidden, 2, 2), atol=1e-4)


def test_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    """Our own heads and vLLM's truncated ones: guesses are ids of the whole vocabulary."""
    token_ids = torch.tensor([3, 70, 71, 72, 90])
    tensors = {**random_heads(2, own=False), "token_map": token_ids}
    loaded = load_heads(write(tmp_path / "ours", "medusa_lm_head.safetensors", tensors), tiny_checkpoint().model)
    truncated = {name: t[token_ids] if name.endswith("1.weight") else t for name, t in random_heads(2).items()}
    vllm = {**as_vllm(truncated), "token_map": token_ids}
    other = load_heads(write(tmp_path / "vllm", "model.safetensors", vllm), tiny_checkpoint().model)
    for heads in (loaded, other):
        tokens, chances = heads.guesses(torch.randn(4, output().shape[1]), [0] * 4, 2, 9)
        assert {token for row in tokens for head in row for token in head} <= set(token_ids.tolist())
        assert all(len(head) == 5 and sum(head) == pytest.approx(1, abs=1e-4) for row in chances for head in row)


def test_int8_heads_guess_the_same(tmp_path: Path) -> None:
    hidden = torch.randn(4, output().shape[1])
    for own in (True, False):
        tensors = {**random_heads(2, 2, own=own), "token.weight": 0.1 * torch.randn(hidden.shape[1], hidden.shape[1])}
        folder = write(tmp_path / str(own), "medusa_lm_head.safetensors", tensors)
        exact = load_heads(folder, tiny_checkpoint().model)
        tokens, chances = exact.guesses(hidden, [5, 6, 7, 8], 2, 3)
        near, near_chances = load_drafting_heads(folder, tiny_checkpoint().model).guesses(hidden, [5, 6, 7, 8], 2, 3)
        assert np.mean(np.array(near)[..., 0] == np.array(tokens)[..., 0]) > 0.8
        assert np.abs(np.array(near_chances) - np.array(chances)).mean() < 0.02
        if own and load_kernels():
            assert exact.nbytes > 3 * load_drafting_heads(folder, tiny_checkpoint().model).nbytes
        assert exact.guesses(hidden, [8, 7, 6, 5], 2, 3)[0] != tokens, "the chosen token counts"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no heads": (lambda tensors: {"lm_head.weight": output()}, "no Medusa heads"),
    "lost block": (without("1.0.linear.weight"), "head 1 lacks the weight of its block 0"),
    "lost projection": (without("2.1.weight"), "head 2 lacks its projection"),
    "other model": (
        lambda tensors: {k: t[:8, :8] if t.ndim == 2 else t[:8] for k, t in tensors.items()},
        "is 8x8, but",
    ),
    "other vocabulary": (lambda tensors: {**tensors, "0.1.weight": torch.zeros(99_999, 64)}, "head 0 projects"),
    "token weight": (lambda tensors: {**tensors, "token.weight": torch.zeros(8, 8)}, "token.weight is 8x8, but"),
    "wrong tokens": (lambda tensors: {**tensors, "token_map": torch.tensor([1, 10**6])}, "token ids below"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_heads_are_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    change, words = BROKEN[fault]
    folder = write(tmp_path / "heads", "medusa_lm_head.safetensors", change(random_heads()))
    with pytest.raises(BadAdapter, match=words) as caught:
        load_heads(folder, tiny_checkpoint().model)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_files_that_are_no_heads_are_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BadAdapter, match="no Medusa heads here"):
            load_heads(folder, tiny_checkpoint().model)
    (tmp_path / "medusa_lm_head.safetensors").write_bytes(b"garbage")
    with pytest.raises(BadAdapter, match="cannot be read"):
        load_heads(tmp_path, tiny_checkpoint().model)
    torch.save({"0.0.linear.weight": Path}, tmp_path / "code.pt")
    with pytest.raises(BadAdapter, match="does not hold plain tensors"):
        load_heads(tmp_path / "code.pt", tiny_checkpoint().model)


# ---- trees -----------------------------------------------------------------------------------------------------------


class NumberedGuesses:
    """Heads whose guess of rank r at depth d is the token 1 + 10 d + r: its place in [root, top-10 of each head]."""

    def __len__(self) -> int:
        return 4

    def guesses(self, hidden: torch.Tensor, tokens: list[int], heads: int, width: int) -> Any:
        guesses = [[1 + TOPK * head + rank for rank in range(width)] for head in range(heads)]
        return [guesses] * len(hidden), [[[1 / (2 + rank) for rank in range(width)]] * heads] * len(hidden)


@pytest.mark.parametrize("name", published_trees())
def test_published_trees_have_the_published_buffers(name: str) -> None:
    """Mask, positions, indices into the flat guesses and retrieval paths, as medusa's utils.py defines them."""
    thread = ReplayedThread([1, 2, 3], 3, 99, DraftSettings(tree=name))
    thread.state[STATE] = torch.zeros(8)
    (tree,) = Medusa(NumberedGuesses()).draft([thread], Budget(256))  # type: ignore[arg-type]
    paths = published_trees()[name].paths
    assert len(paths) == len(tree) == 63
    mask = np.zeros((63, 63), dtype=bool)
    for row, path in enumerate(paths):
        mask[row, [paths.index(path[:end]) for end in range(1, len(path) + 1)]] = True
    assert np.array_equal(tree.visibility(), mask)
    assert list(tree.depths) == [len(path) for path in paths]
    assert tree.token_ids == [path[-1] + TOPK * (len(path) - 1) + 1 for path in paths]
    for row, path in enumerate(paths):
        flat = [rank + TOPK * depth + 1 for depth, rank in enumerate(path)]
        assert path_tokens(tree, row) == flat


def test_published_trees_have_the_published_sizes() -> None:
    counts = [len(path) for path in published_trees()["mc_sim_7b_63"].paths]
    assert [counts.count(depth) for depth in (1, 2, 3, 4)] == [10, 28, 23, 2]
    for name in ("mc_sim_7b_63", "vicuna_7b_stage2"):
        paths = published_trees()[name].paths
        inner = {path[:-1] for path in paths}
        assert sum(path not in inner for path in paths) == 42  # leaves, as many retrieval paths


accuracy_tables = st.lists(st.lists(st.floats(0.01, 0.5), min_size=1, max_size=4), min_size=1, max_size=4)


@given(table=accuracy_tables, size=st.integers(1, 20))
def test_a_searched_tree_is_the_best_of_its_size(table: list[list[float]], size: int) -> None:
    falling = [sorted(ranks, reverse=True) for ranks in table]
    tree = search_tree(table, size)
    everything = sorted((value for _, value in best_paths(falling)), reverse=True)
    found = dict(best_paths(falling))
    assert sum(found[path] for path in tree.paths) == pytest.approx(sum(everything[:size]))
    assert SparseTree.of(tree.paths).paths == tree.paths, "every path stands behind its beginning"
    assert search_tree(table, size + 3).paths[: len(tree.paths)] == tree.paths


@pytest.mark.parametrize(
    ("content", "words"),
    [("[[0], [0]]", "twice"), ("[[1, 0]]", "without its beginning"), ("[[]]", "list of paths"), ("[[-1]]", "ranks"),
     ("{", "cannot be read"), ("3", "cannot be read"), ("[]", "list of paths")],
)  # fmt: skip
def test_bad_trees_are_refused_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "tree.json").write_text(content)
    with pytest.raises(BadTree, match=words) as caught:
        read_trees(tmp_path / "tree.json")
    assert "\n" not in str(caught.value)


def test_published_trees_ship() -> None:
    shipped = importlib.resources.files("configs") / "trees" / "medusa.json"
    assert len(json.loads(shipped.read_text())) == 9


# ---- drafts ----------------------------------------------------------------------------------------------------------

METHODS = ["medusa", "medusa+ngram"]
SIZES: list[dict[str, Any]] = [{}, {"nodes": 1}, {"nodes": 40}, {"tree": "mc_sim_7b_63"}]


def heads_for(family: str, folder: Path) -> Path:
    """Zero blocks on the model's own projection: a head that repeats the model's last choice, right now and then."""
    hidden = output_projection(tiny_checkpoint(family).model).shape[1]
    tensors: Tensors = {}
    for head in range(HEADS):
        tensors[f"{head}.0.linear.weight"] = 0.2 * torch.randn(hidden, hidden)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(hidden)
    return write(folder / family, "medusa_lm_head.safetensors", tensors)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_greedy_equals_vanilla(family: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(family).model
    with tiny_engine(family, methods=METHODS, adapters={"medusa": heads_for(family, tmp_path)}) as engine:
        plain = answers(engine, requests(temperature=0, method="vanilla"))
        for method in METHODS:
            for sizes in SIZES:
                mine = requests(temperature=0, method=method, draft=sizes)
                texts = [request["prompt"] for request in mine]
                assert_same(engine, model, texts[:1], answers(engine, mine[:1]), plain)
                assert_same(engine, model, texts, answers(engine, mine), plain)
        assert engine.counters.accepted > 0
        assert engine.status().free_pages == engine.status().total_pages


@pytest.mark.parametrize("method", METHODS)
def test_sampled_equals_vanilla_by_seed(method: str, tmp_path: Path) -> None:
    assert_sampled_equals_vanilla(method, adapters={"medusa": heads_for("llama", tmp_path)})


def test_answers_may_fill_the_context(tmp_path: Path) -> None:
    with tiny_engine("gpt2", methods=METHODS, adapters={"medusa": heads_for("gpt2", tmp_path)}) as engine:
        assert_answers_fill_the_context(engine, METHODS)


def test_inside_generate(tmp_path: Path) -> None:
    model, heads = tiny_checkpoint().model, heads_for("llama", tmp_path)
    inputs = {
        "input_ids": torch.tensor([[65, 66, 67] * 4]),
        "max_new_tokens": 30,
        "do_sample": False,
        "pad_token_id": 0,
    }
    ours = model.generate(**inputs, custom_generate=custom_generate("medusa", adapter=heads, nodes=20))
    assert torch.equal(ours, model.generate(**inputs))
    with pytest.raises(BadAdapter, match="give adapter=PATH"):
        custom_generate("medusa")


def test_preempted_requests_go_on_with_the_same_answer(tmp_path: Path) -> None:
    assert_preemption_changes_nothing("medusa", adapters={"medusa": heads_for("llama", tmp_path)})
