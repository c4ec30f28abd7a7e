"""The CPU kernels against torch, and their promise: only few rows or more, and not which, changes a row's last bits."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import FAMILIES
from tests.support.tiny import tiny_checkpoint
from workers.model.batch import Run
from workers.model.kernels import NARROW_ROWS, build
from workers.model.plan import CHUNK, plan_attention
from workers.model.runner import ModelRunner
from workers.model.tree import Needs, TokenTree

pytestmark = pytest.mark.skipif(build.load_kernels() is None, reason="no C++ compiler")

sizes = st.integers(1, 70) | st.sampled_from([64, 96, 128, 192])  # the latter in tiles, where the machine has them
MORE = 5  # rows from which on products may take another way than for fewer


def company(row: int, rows: int) -> list[int]:
    """``row`` and the fewest others with which its products go the way of ``rows`` rows."""
    return [(row + other) % rows for other in range(MORE if rows >= MORE else 1)]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, NARROW_ROWS), inputs=sizes, outputs=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_products(rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    offset = torch.randn(outputs) if bias else None
    ours = torch.ops.polydecode.linear(x, weight, offset)
    assert torch.allclose(ours, torch.nn.functional.linear(x, weight, offset), atol=1e-4)
    row = seed % rows
    assert torch.equal(torch.ops.polydecode.linear(x[company(row, rows)], weight, offset)[0], ours[row])


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, NARROW_ROWS), inputs=sizes, outputs=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_int8_products(rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, scale = torch.randn(rows, inputs), torch.rand(outputs) + 0.1
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    offset = torch.randn(outputs) if bias else None
    ours = torch.ops.polydecode.linear_int8(x, weight, scale, offset)
    exact = torch.nn.functional.linear(x, weight * scale[:, None], offset)
    assert (ours - exact).abs().max() <= 1e-3 * exact.abs().max() + 1e-3
    row = seed % rows
    assert torch.equal(torch.ops.polydecode.linear_int8(x[company(row, rows)], weight, scale, offset)[0], ours[row])


def logits_one_by_one(runner: ModelRunner, prefix: list[int], ids: list[int], *, beside: int = 0) -> torch.Tensor:
    """Ordinary decoding: the prefix in one wide step, then a token a step, beside other rows."""
    table, other = runner.new_table(), runner.new_table()
    table.reserve(len(prefix) + len(ids))
    other.reserve(beside)
    company = [Run(list(range(beside)), other, last_needs=Needs.NOTHING)] if beside else []
    rows = []
    for chunk in (prefix, *([token] for token in ids)):
        rows.append(runner.forward(runner.prepare([Run(chunk, table), *company])).logits)
        table.advance(len(chunk))
    table.release()
    other.release()
    return torch.cat(rows[1:])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2", "gpt_oss", "deepseek_v3"}))
@pytest.mark.parametrize("length", [70, CHUNK - 2, 2 * CHUNK + 13])
def test_a_branch_has_the_bits_of_ordinary_decoding(family: str, length: int) -> None:
    """Every row of a run and of a tree, beside another request's, has exactly the logits of one token a step.

    One token alone has them up to rounding. Not so with Conv1D (GPT-2) and experts.
    """
    runner = ModelRunner(tiny_checkpoint(family).model, kv_tokens=1024)
    prefix = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    ids = [5, 6, 7, 8, 9, 10, 11]
    expected = logits_one_by_one(runner, prefix, ids, beside=MORE - 1)
    assert torch.allclose(logits_one_by_one(runner, prefix, ids), expected, atol=1e-5)
    table, other = runner.new_table(), runner.new_table()
    for each, tokens in ((table, prefix), (other, prefix[:66])):
        each.reserve(len(tokens) + 3)
        runner.forward(runner.prepare([Run(tokens, each)]))
        each.advance(len(tokens))
    # ids 5, 6 as a run, then 7 … 11 as one branch of a tree with others around it.
    tree = TokenTree.of([99, 7, 98, 8, 9, 97, 10, 11], [-1, -1, 1, 1, 3, 4, 4, 6], needs=[Needs.LOGITS] * 8)
    runs = [Run([50, 51, 52], other), Run(ids[:2], table, tree, needs=Needs.LOGITS)]
    logits = runner.forward(runner.prepare(runs)).logits[1:]
    assert torch.equal(logits[[0, 1, 3, 5, 6, 8, 9]], expected)


def test_threads_that_share_pages_read_them_once() -> None:
    runner = ModelRunner(tiny_checkpoint().model, kv_tokens=1024)
    table = runner.new_table()
    prefix = [3 + row % 200 for row in range(2 * CHUNK + 20)]
    table.reserve(len(prefix))
    runner.forward(runner.prepare([Run(prefix, table)]))
    table.advance(len(prefix))
    tables = [table, runner.fork(table), runner.fork(table)]
    plan = plan_attention(runner.prepare([Run([5], each) for each in tables]))
    rows_of = [plan.item_rows[start:stop].tolist() for start, stop in plan.item_offsets.unfold(0, 2, 1).tolist()]
    assert rows_of == [[0, 1, 2], [0, 1, 2], [0], [1], [2]]


def test_without_a_compiler_the_model_runs_on_stock_operations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.load_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            runner = ModelRunner(tiny_checkpoint().model, kv_tokens=512)
        assert runner.kernels is None
        assert "no C++ compiler" in caplog.text
        assert logits_one_by_one(runner, [5, 6, 7], [8, 9]).shape == (2, 300)
    finally:
        build.load_kernels.cache_clear()
