"""Steps in tensors of fixed shape, as a GPU's graphs read them, with the Triton kernel interpreted on the CPU."""

import pytest
import torch

from tests.support.families import FAMILIES
from tests.support.tiny import tiny_checkpoint
from workers.model.batch import Run
from workers.model.pages import PageTable
from workers.model.runner import ModelRunner, StepOutput
from workers.model.tree import Needs, TokenTree

pytest.importorskip("triton")  # conftest.py has it interpret
from workers.model.graphs import BUCKETS, StepGraphs, bucket_of


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    return ModelRunner(tiny_checkpoint(request.param).model, kv_tokens=1024)


def stored(runner: ModelRunner, tokens: int) -> PageTable:
    table = runner.new_table()
    table.reserve(tokens + 8)
    runner.forward(runner.prepare([Run([3 + row % 200 for row in range(tokens)], table)]))
    table.advance(tokens)
    return table


def both_ways(runner: ModelRunner, runs: list[Run]) -> tuple[StepOutput, StepOutput]:
    """A step as it is run on this CPU, and on static tensors."""
    plain = runner.forward(runner.prepare(runs))
    runner.graphs = StepGraphs(runner.model, runner._store, runner.context_length)
    try:
        runner.forward(runner.prepare(runs[-1:]))  # what an earlier step leaves behind must not show
        return plain, runner.forward(runner.prepare(runs))
    finally:
        assert not runner.graphs.failed
        runner.graphs = None


def test_rows_have_the_logits_of_the_ragged_step(runner: ModelRunner) -> None:
    """Two threads of different lengths, one with a tree, padded from 10 rows to 16."""
    first, second = stored(runner, 70), stored(runner, 131)
    tree = TokenTree.of([9, 7, 98, 8, 9, 97], [-1, -1, 1, 1, 3, 4], needs=[Needs.LOGITS | Needs.HIDDEN] * 6)
    runs = [Run([5, 6], first, needs=Needs.LOGITS), Run([50, 51], second, tree, needs=Needs.LOGITS)]
    plain, static = both_ways(runner, runs)
    assert torch.allclose(static.logits, plain.logits, atol=2e-4)
    assert plain.hidden is not None and static.hidden is not None
    assert torch.allclose(static.hidden, plain.hidden, atol=2e-4)
    for table in (first, second):
        table.release()


def test_embedded_rows(runner: ModelRunner) -> None:
    table = stored(runner, 20)
    weight = runner.model.get_input_embeddings().weight.detach()
    tree = TokenTree.of(
        [7, -1, -1],
        [-1, 0, 1],
        candidate=[True, False, False],
        needs=[Needs.LOGITS] * 3,
        embeddings=torch.randn(2, weight.shape[1]) * weight.std(),
    )
    plain, static = both_ways(runner, [Run([5], table, tree)])
    assert torch.allclose(static.logits, plain.logits, atol=2e-4)
    table.release()


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 4), (16, 16), (33, 64), (64, BUCKETS[-1])])
def test_buckets(rows: int, bucket: int) -> None:
    assert bucket_of(rows) == bucket


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_graphs_on_a_gpu() -> None:
    runner = ModelRunner(tiny_checkpoint().model.to("cuda"), kv_tokens=1024)
    graphs = runner.graphs
    assert graphs is not None
    table = stored(runner, 40)
    tree = TokenTree.of([5, 6, 7], [-1, 0, 0], needs=[Needs.LOGITS] * 3)
    captured = runner.forward(runner.prepare([Run([9], table, tree)])).logits
    runner.graphs = None
    assert torch.allclose(runner.forward(runner.prepare([Run([9], table, tree)])).logits, captured, atol=1e-3)
    assert not graphs.failed
