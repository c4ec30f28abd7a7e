"""The compiled decoder: made by a child process, swapped into a serving engine, the same answers."""

from pathlib import Path

import pytest
import torch

from tests.support.families import tiny_model
from tests.support.oracle import assert_same_answer, greedy
from tests.support.tiny import save_tiny
from workers.engine import Engine
from workers.model.batch import Run
from workers.model.kernels.build import load_kernels
from workers.model.runner import ModelRunner
from workers.model.tree import Needs, TokenTree
from workers.warm_up import WarmUp

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled_engine(tmp_path_factory: pytest.TempPathFactory):
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYDECODE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with Engine.load(str(folder), kv_tokens=1024) as engine:
            warm_up = WarmUp(engine, str(folder), measure=False)
            warm_up.wait()
            assert engine.between_steps(lambda runner: runner.compiled).result()
            yield engine, folder


def logits_of(runner: ModelRunner, runs: int) -> torch.Tensor:
    """Logits of a run and a tree behind 20 stored tokens, beside ``runs`` - 1 others."""
    tables = [runner.new_table() for _ in range(runs)]
    for table in tables:
        table.reserve(25)
        runner.forward(runner.prepare([Run(list(range(5, 25)), table)]))
        table.advance(20)
    tree = TokenTree.of([5, 6, 7], [-1, 0, 0], needs=[Needs.LOGITS] * 3)
    output = runner.forward(runner.prepare([Run([9, 8], table, tree, needs=Needs.LOGITS) for table in tables]))
    for table in tables:
        table.release()
    return output.logits


def test_compiled_steps_equal_uncompiled_ones_in_any_company(compiled_engine: tuple[Engine, Path]) -> None:
    engine, _ = compiled_engine

    def work(runner: ModelRunner) -> list[torch.Tensor]:
        alone, together = logits_of(runner, 1), logits_of(runner, 5)
        runner.compiled = False
        uncompiled = logits_of(runner, 1)
        runner.compiled = True
        return [alone, together, uncompiled]

    alone, together, uncompiled = engine.between_steps(work).result()
    assert torch.equal(together, alone.repeat(5, 1))
    assert torch.allclose(alone, uncompiled, atol=1e-4)


def test_greedy_equals_generate(compiled_engine: tuple[Engine, Path]) -> None:
    engine, _ = compiled_engine
    model = tiny_model("llama")
    for text in ("hello", "a longer prompt than that"):
        ids = engine.renderer.encode(text).token_ids
        events = engine.generate(text, temperature=0, max_new_tokens=32)
        ours = [token for event in events if event.step for token in event.step.threads[0].token_ids]
        assert_same_answer(model, ids, ours, greedy(model, ids, 32, [2]))


def test_the_next_engine_finds_it_in_the_cache(compiled_engine: tuple[Engine, Path]) -> None:
    _, folder = compiled_engine
    with Engine.load(str(folder), kv_tokens=1024) as engine:
        WarmUp(engine, str(folder), measure=False).wait()
        assert engine.between_steps(lambda runner: runner.compiled).result()
