"""Every branch of every tree, several requests in one batch, has the logits of that branch run alone."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.families import FAMILIES, VOCABULARY
from tests.support.tiny import tiny_checkpoint
from workers.model.batch import Run
from workers.model.pages import PageTable
from workers.model.runner import ModelRunner
from workers.model.tree import Needs, TokenTree
from workers.model.verification import path_tokens

TOLERANCE = 1e-4


@dataclass
class Drawn:
    """One request: ``stored`` tokens in pages, then a run, then a tree."""

    stored: list[int]
    run: list[int]
    tree: list[int]
    parents: list[int]


tokens = st.integers(3, VOCABULARY - 1)


@st.composite
def requests(draw: st.DrawFn) -> Drawn:
    size = draw(st.integers(0, 10))
    return Drawn(
        stored=draw(st.lists(tokens, max_size=40)),
        run=draw(st.lists(tokens, min_size=1, max_size=6)),
        tree=draw(st.lists(tokens, min_size=size, max_size=size)),
        parents=[draw(st.integers(-1, row - 1)) for row in range(size)],
    )


_runners: dict[str, ModelRunner] = {}


def runner_of(family: str) -> ModelRunner:
    if family not in _runners:
        _runners[family] = ModelRunner(tiny_checkpoint(family).model, kv_tokens=1024)
    return _runners[family]


def store(runner: ModelRunner, drawn: Drawn) -> Run:
    """Commit the stored tokens, in two chunks where they allow it, and make the run behind them."""
    table = runner.new_table()
    half = len(drawn.stored) // 2
    for chunk in (drawn.stored[:half], drawn.stored[half:]):
        if chunk:
            table.reserve(len(chunk))
            runner.forward(runner.prepare([Run(chunk, table)]))
            table.advance(len(chunk))
    table.reserve(len(drawn.run))
    tree = TokenTree.of(drawn.tree, drawn.parents, needs=[Needs.LOGITS | Needs.HIDDEN] * len(drawn.tree))
    return Run(drawn.run, table, tree, needs=Needs.LOGITS)


def table_for(runner: ModelRunner, rows: int) -> PageTable:
    """An empty table with room for a run; released when it is swept up, with its runner."""
    table = runner.new_table()
    table.reserve(rows)
    return table


def alone(runner: ModelRunner, drawn: Drawn) -> torch.Tensor:
    """Stock logits of every run row and every tree row, branch by branch."""
    prefix = drawn.stored + drawn.run
    tree = TokenTree.of(drawn.tree, drawn.parents)
    rows = [stock(runner, prefix)[len(drawn.stored) :]]
    rows += [stock(runner, prefix + path_tokens(tree, row))[-1:] for row in range(len(tree))]
    return torch.cat(rows)


def stock(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return runner.model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(requests(), min_size=1, max_size=4))
def test_branches_equal_themselves_alone(family: str, batch: list[Drawn]) -> None:
    runner = runner_of(family)
    runs = [store(runner, drawn) for drawn in batch]
    output = runner.forward(runner.prepare(runs))
    expected = torch.cat([alone(runner, drawn) for drawn in batch])
    assert (output.logits - expected).abs().max() < TOLERANCE
    for run in runs:
        run.table.release()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_embedded_rows_equal_token_rows(family: str) -> None:
    runner = runner_of(family)
    embed = runner.model.get_input_embeddings()
    by_token = TokenTree.of([5, 6, 7], [-1, 0, 0], needs=[Needs.LOGITS] * 3)
    by_embedding = TokenTree.of(
        [5, -1, -1],
        [-1, 0, 0],
        candidate=[True, False, False],
        needs=[Needs.LOGITS] * 3,
        embeddings=embed(torch.tensor([6, 7])).detach(),
    )
    outputs = [
        runner.forward(runner.prepare([Run([8, 9], table_for(runner, 2), tree)])).logits
        for tree in (by_token, by_embedding)
    ]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_hidden_rows_lead_to_the_logits() -> None:
    runner = runner_of("llama")
    tree = TokenTree.of([5, 6], [-1, -1], needs=[Needs.LOGITS, Needs.LOGITS | Needs.HIDDEN])
    run = Run([8, 9], table_for(runner, 2), tree, last_needs=Needs.LOGITS | Needs.HIDDEN)
    output = runner.forward(runner.prepare([run]))
    assert output.hidden is not None
    assert output.hidden.shape == (2, 64)
    projected = runner.model.get_output_embeddings()(output.hidden.clone())
    assert torch.allclose(projected, output.logits[[0, 2]], atol=1e-5)


def test_explicit_visibility_replaces_the_ancestors() -> None:
    """Two siblings of which the second sees the first behave like a chain whose positions are equal."""
    runner = runner_of("llama")
    visible = TokenTree.of([5, 6], [-1, 0]).visibility()
    siblings = TokenTree.of([5, 6], [-1, -1], depths=[1, 2], visible=visible, needs=[Needs.LOGITS] * 2)
    chain = TokenTree.of([5, 6], [-1, 0], needs=[Needs.LOGITS] * 2)
    first, second = (
        runner.forward(runner.prepare([Run([8, 9], table_for(runner, 2), tree)])).logits for tree in (siblings, chain)
    )
    assert torch.equal(first, second)


def test_accepted_rows_become_pages() -> None:
    """After committing one branch, decoding continues as if it had been read token by token."""
    runner = runner_of("gemma3")
    table = runner.new_table()
    tree = TokenTree.of([5, 6, 7, 8], [-1, -1, 1, 1])
    table.reserve(20)
    runner.forward(runner.prepare([Run([11, 12, 13], table, tree)]))
    runner.commit([3 + 1, 3 + 3], table.slots(3, 5))
    table.advance(5)
    logits = runner.forward(runner.prepare([Run([9], table)])).logits
    assert torch.allclose(logits, stock(runner, [11, 12, 13, 6, 8, 9])[-1:], atol=TOLERANCE)
    table.release()


def test_a_fork_shares_pages_and_diverges() -> None:
    runner = runner_of("llama")
    table = runner.new_table()
    prefix = list(range(10, 10 + 37))  # two full pages and a part of a third
    table.reserve(len(prefix))
    runner.forward(runner.prepare([Run(prefix, table)]))
    table.advance(len(prefix))
    before = runner.pool.free
    twin = runner.fork(table)
    assert before - runner.pool.free == 1
    logits = runner.forward(runner.prepare([Run([5], table), Run([6], twin)])).logits
    expected = torch.cat([stock(runner, [*prefix, 5])[-1:], stock(runner, [*prefix, 6])[-1:]])
    assert torch.allclose(logits, expected, atol=TOLERANCE)
    for grown in (table, twin):
        grown.advance(1)
        grown.reserve(1)
    logits = runner.forward(runner.prepare([Run([7], table), Run([7], twin)])).logits
    expected = torch.cat([stock(runner, [*prefix, 5, 7])[-1:], stock(runner, [*prefix, 6, 7])[-1:]])
    assert torch.allclose(logits, expected, atol=TOLERANCE)
    table.release()
    twin.release()
    assert runner.pool.free == before + 3


def test_the_model_still_works_for_its_owner() -> None:
    for family in ("llama", "gemma2", "gpt_oss"):
        model = runner_of(family).model
        before = stock(runner_of(family), [5, 6, 7])
        model.set_attn_implementation("eager")
        after = stock(runner_of(family), [5, 6, 7])
        model.set_attn_implementation("polydecode" if family == "llama" else "polydecode_eager")
        assert torch.allclose(before, after, atol=1e-4)
        assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)
