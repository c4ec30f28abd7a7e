"""Counts that depend on no machine: rows, copies, compilations, synchronisations."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny import tiny_checkpoint, tiny_engine
from workers.engine import Engine
from workers.model.batch import Run
from workers.model.compiled import artifact, compile_decoder, install
from workers.model.kernels.build import load_kernels
from workers.model.runner import ModelRunner
from workers.model.tree import Needs, TokenTree


class WrittenBytes(TorchDispatchMode):
    """Adds up what is written through an index or a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket)
        if name in ("aten.index_put_", "aten.copy_", "aten.index_copy_"):
            self.total += args[{"aten.index_put_": 2, "aten.copy_": 1, "aten.index_copy_": 3}[name]].nbytes
        return function(*args, **(kwargs or {}))


def stored(runner: ModelRunner, tokens: int, room: int) -> Any:
    table = runner.new_table()
    table.reserve(tokens + room)
    runner.forward(runner.prepare([Run([3 + row % 200 for row in range(tokens)], table)]))
    table.advance(tokens)
    return table


def test_no_row_is_computed_that_nobody_needs() -> None:
    """A prompt's rows once, then one row a token; and what the decoder sees is what was counted."""
    with tiny_engine() as engine:
        seen: list[int] = []

        def watch(runner: ModelRunner) -> Any:
            layer = runner.model.get_input_embeddings()
            return layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))

        hook = engine.between_steps(watch).result()
        last = list(engine.generate("hello there", temperature=0, max_new_tokens=20))[-1]
        hook.remove()
        needed = last.prompt_tokens + last.completion_tokens - 1
        assert engine.counters.rows == needed
        assert sum(seen) == needed


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_a_commit_copies_the_accepted_rows_and_nothing_else(accepted: int) -> None:
    runner = ModelRunner(tiny_checkpoint().model, kv_tokens=512)
    table = stored(runner, 20, 8)
    tree = TokenTree.of([5, 6, 7, 8], [-1, 0, 1, 1], needs=[Needs.LOGITS] * 4)
    runner.forward(runner.prepare([Run([9], table, tree)]))
    table.advance(1 + accepted)
    with WrittenBytes() as written:
        runner.commit(list(range(1, 1 + accepted)), table.slots(table.length - accepted, table.length))
    row_bytes = runner.kv_bytes // (runner.kv_tokens + runner.step_rows)
    assert written.total == accepted * row_bytes


@pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
def test_growing_contexts_and_changing_widths_compile_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYDECODE_CACHE", str(tmp_path))

    def compile_now(runner: ModelRunner) -> None:
        compile_decoder(runner, artifact(runner))
        install(runner, artifact(runner))

    with tiny_engine() as engine:
        engine.between_steps(compile_now).result()
        before = {name: dict(values) for name, values in counters.items()}
        answer(engine, 300)
        engine.between_steps(widths).result()
        assert {name: dict(values) for name, values in counters.items()} == before
        assert len(list((tmp_path / "compiled").glob("*.pt2"))) == 1


def answer(engine: Engine, tokens: int) -> None:
    assert list(engine.generate("hello", temperature=0, max_new_tokens=tokens))


def widths(runner: ModelRunner) -> None:
    for rows in (1, 2, 3, 8, 31, 64):
        table = stored(runner, 40, rows)
        tree = TokenTree.of(list(range(3, 2 + rows)), [-1] * (rows - 1))
        runner.forward(runner.prepare([Run([9], table, tree)]))
        table.release()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_forward_pass_never_waits_for_the_gpu() -> None:
    runner = ModelRunner(tiny_checkpoint().model.to("cuda"), kv_tokens=512)
    table = stored(runner, 20, 8)
    batch = runner.prepare([Run([9], table, TokenTree.of([5, 6], [-1, 0]))])
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
