"""``python -m benchmarks.forward``: what one forward pass costs by its rows, beside what memory allows.

All contestants alternate in one process, one pass at a time: stock transformers, our pages and trees on torch's own
operations (eager), on our kernels, with the compiled decoder, and with int8 weights. The bound is the time to read the
weights once at the bandwidth of a large copy. At the end: how much of a step is spent outside the forward pass.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from benchmarks.side_by_side import STREAMS, ours
from traces.datasets import load_datasets
from workers.engine import Engine
from workers.model.attention import OVER_SDPA
from workers.model.checkpoint import load_checkpoint
from workers.model.compiled import artifact, compile_decoder, install
from workers.model.curve import stored_thread, timed_pass
from workers.model.devices import Stopwatch, device_name
from workers.model.kernels import NARROW_ROWS
from workers.model.runner import ModelRunner

COPIED_BYTES = 1 << 28

Pass = Callable[[int], float]  # rows → milliseconds


def main(
    model_path: str = "smollm2-135m",
    rows: Annotated[str, typer.Option(help="widths, separated by commas")] = "1,2,4,8,16,32,64",
    context: Annotated[int, typer.Option(min=1, help="rows of KV")] = 300,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    device: str | None = None,
) -> None:
    """Print milliseconds by width for every contestant."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    widths = [int(width) for width in rows.split(",")]
    with Engine.load(model_path, kv_tokens=8192, device=device) as engine:
        engine.between_steps(lambda runner: compare(runner, model_path, widths, context, rounds)).result()
        for streams in (1, STREAMS):
            outside(engine, streams)


def compare(runner: ModelRunner, model_path: str, widths: list[int], context: int, rounds: int) -> None:
    """Run all contestants in turn and print their medians."""
    quantized = load_checkpoint(model_path, dtype=runner.model.dtype, device=runner.device, quantization="int8")
    int8 = ModelRunner(quantized.model, kv_tokens=8192)
    contestants: dict[str, Pass] = {
        "stock transformers": stock(runner, context),
        "ours, eager": our_own(runner, context, kernels=False),
    }
    for name, own in (("", runner), (", int8", int8)):
        if own.kernels:
            contestants[f"ours, kernels{name}"] = our_own(own, context)
            compile_decoder(own, artifact(own))
            install(own, artifact(own))
            contestants[f"ours, compiled{name}"] = our_own(own, context, compiled=True)
        elif own is int8:
            contestants[f"ours{name}"] = our_own(own, context)
    print(f"{device_name(runner.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{quantized.quantization}")
    taken = alternate(contestants, widths, rounds)
    print(f"{'ms by rows':28}" + "".join(f"{width:>8}" for width in widths))
    for name in contestants:
        print(f"{name:28}" + "".join(f"{taken[name, width]:8.1f}" for width in widths))
    bandwidth = copy_bandwidth(runner.device)
    for name, own in (("bound", runner), ("bound, int8", int8)):
        size = read_bytes(own)
        print(f"{name:28}{1000 * size / bandwidth:8.1f}  ({size / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s)")


def alternate(contestants: dict[str, Pass], widths: list[int], rounds: int) -> dict[tuple[str, int], float]:
    """Medians by contestant and width; the first round warms up."""
    taken: dict[tuple[str, int], list[float]] = {(name, width): [] for name in contestants for width in widths}
    for _ in range(rounds + 1):
        for width in widths:
            for name, one_pass in contestants.items():
                taken[name, width].append(one_pass(width))
    return {key: statistics.median(times[1:]) for key, times in taken.items()}


@torch.inference_mode()
def stock(runner: ModelRunner, context: int) -> Pass:
    """The model as transformers runs it, behind a cache of ``context`` tokens."""
    model: Any = runner.model
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    model(input_ids=torch.ones(1, context, dtype=torch.int64, device=runner.device), past_key_values=cache)
    model.set_attn_implementation(OVER_SDPA)

    @torch.inference_mode()
    def one_pass(rows: int) -> float:
        model.set_attn_implementation("sdpa")
        ids = torch.ones(1, rows, dtype=torch.int64, device=runner.device)
        watch = Stopwatch(runner.device)
        model(input_ids=ids, past_key_values=cache)
        watch.stop()
        cache.crop(-rows)
        model.set_attn_implementation(OVER_SDPA)
        return watch.ms()

    return one_pass


def our_own(runner: ModelRunner, context: int, *, kernels: bool = True, compiled: bool = False) -> Pass:
    """A tree behind ``context`` rows of KV on what the runner has: torch's operations, kernels, compiled decoder."""
    thread = stored_thread(runner, context)

    def one_pass(rows: int) -> float:
        before = runner.narrow_rows, runner.compiled
        runner.narrow_rows = NARROW_ROWS if kernels and runner.kernels else 0
        runner.compiled = compiled
        taken = timed_pass(thread, rows, runner)
        runner.narrow_rows, runner.compiled = before
        return taken

    return one_pass


def read_bytes(runner: ModelRunner) -> int:
    """Bytes of the weights that a pass reads: all but embeddings that no product uses."""
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in (*runner.model.parameters(), *runner.model.buffers())}
    model: Any = runner.model
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if embeddings.data_ptr() == output.data_ptr() else embeddings.nbytes
    return sum(weights.values()) - unread


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(9):
        watch = Stopwatch(device)
        target.copy_(source)
        watch.stop()
        times.append(watch.ms())
    return 2 * COPIED_BYTES / (statistics.median(times) / 1000)


def outside(engine: Engine, streams: int) -> None:
    """Print what a step costs beside its forward pass: layout, sampling, verification, commit, text and events."""
    questions = [question.turns[0] for question in load_datasets(["vicuna_bench"])[0].questions[:streams]]
    ours(engine, questions, 8)
    before = replace(engine.counters)
    ours(engine, questions, 64)
    after = engine.counters
    steps = after.steps - before.steps
    step_s, forward_s = after.step_s - before.step_s, after.forward_s - before.forward_s
    share = 1 - forward_s / step_s
    print(f"{streams} streams: {1000 * (step_s - forward_s) / steps:.2f} ms a step outside the forward ({share:.1%})")


if __name__ == "__main__":
    typer.run(main)
