"""``python -m benchmarks.side_by_side``: vanilla against transformers' ``generate``, and 8 streams against one.

Everything alternates in one process on one set of weights, so that the machine's moods hit all alike; the figures to
trust are the ratios. Memory is read from a worker process of its own.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import httpx
import psutil
import torch
import typer
from transformers.utils import logging as transformers_logging

from benchmarks.verify import stock_attention
from protocol.generation import GenerateParams
from traces.datasets import load_datasets
from workers.engine import Engine
from workers.model.runner import ModelRunner
from workers.request import Event
from workers.warm_up import WarmUp

STREAMS = 8


@dataclass(frozen=True)
class Timed:
    """Tokens that were produced, and the seconds that it took."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main(
    model_path: str = "smollm2-135m",
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    memory: Annotated[bool, typer.Option(help="also start a worker and read its peak memory")] = True,
) -> None:
    """Print tokens per second and their ratios."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    questions = [question.turns[0] for question in load_datasets(["vicuna_bench"])[0].questions]
    with Engine.load(model_path, kv_tokens=8192) as engine:
        WarmUp(engine, model_path, measure=False).wait()
        results = [one_round(engine, questions, index, new_tokens) for index in range(rounds)]
    report(results)
    if memory:
        print(json.dumps(worker_memory(model_path, questions, new_tokens)))


def one_round(engine: Engine, questions: list[str], index: int, new_tokens: int) -> dict[str, Timed]:
    """The three contestants on the same question (the streams on eight)."""
    own = questions[index % len(questions)]
    several = [questions[(index * STREAMS + offset) % len(questions)] for offset in range(STREAMS)]
    contestants = {
        "ours, one stream": lambda: ours(engine, [own], new_tokens),
        "generate, one stream": lambda: theirs(engine, own, new_tokens),
        "ours, 8 streams": lambda: ours(engine, several, new_tokens),
    }
    order = list(contestants) if index % 2 == 0 else list(reversed(contestants))
    timed = {name: contestants[name]() for name in order}
    print(f"round {index}: " + ", ".join(f"{name} {timed[name].rate:.1f} tok/s" for name in contestants), flush=True)
    return timed


def ours(engine: Engine, questions: list[str], new_tokens: int) -> Timed:
    """Answer all questions at once."""
    ends: SimpleQueue[Event] = SimpleQueue()

    def sink(event: Event) -> None:  # like generate, hand over the whole answer
        if event.last:
            ends.put(event)

    started = time.perf_counter()
    for question in questions:
        engine.submit(_params(question, new_tokens), sink)
    tokens = sum(ends.get().completion_tokens for _ in questions)
    return Timed(tokens, time.perf_counter() - started)


def theirs(engine: Engine, question: str, new_tokens: int) -> Timed:
    """The same question by ``generate`` on the same weights with stock attention."""
    params = _params(question, new_tokens)

    def work(runner: ModelRunner) -> Timed:
        assert params.messages is not None
        with stock_attention(runner) as model, torch.inference_mode():
            started = time.perf_counter()
            ids = torch.tensor([engine.renderer.render(params.messages).token_ids])
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
            seconds = time.perf_counter() - started
        return Timed(out.shape[1] - ids.shape[1], seconds)

    return engine.between_steps(work).result()


def _params(question: str, new_tokens: int) -> GenerateParams:
    messages = [{"role": "user", "content": question}]
    return GenerateParams.model_validate(
        {"messages": messages, "temperature": 0, "max_new_tokens": new_tokens, "echo": False}
    )


def report(results: list[dict[str, Timed]]) -> None:
    """Ratios of sums over all rounds, and the spread of the rounds."""
    rates = {name: sum(r[name].tokens for r in results) / sum(r[name].seconds for r in results) for name in results[0]}
    pairs = {
        "ours / generate, one stream": ("ours, one stream", "generate, one stream"),
        "ours, 8 streams / one stream": ("ours, 8 streams", "ours, one stream"),
    }
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, rate in rates.items():
        print(f"{name:32} {rate:8.1f} tok/s")
    for name, (first, second) in pairs.items():
        ratios = sorted(r[first].rate / r[second].rate for r in results)
        spread = f"rounds {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
        print(f"{name:32} {rates[first] / rates[second]:8.2f} x   ({spread})")


def worker_memory(model_path: str, questions: list[str], new_tokens: int) -> dict[str, float]:
    """Peak resident MB of a worker that has answered 8 questions at once, beside what it was told to use."""
    command = [sys.executable, "-m", "workers", "--model-path", model_path, "--no-register", "--port", "0"]
    with subprocess.Popen([*command, "--kv-tokens", "8192"], stderr=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stderr is not None
            url = next(line.split()[-1] for line in worker.stderr if "serving at" in line)
            bodies = [_params(question, new_tokens).model_dump() for question in questions[:STREAMS]]
            with (
                httpx.Client(base_url=url, timeout=600, trust_env=False) as client,
                ThreadPoolExecutor(STREAMS) as pool,
            ):
                answers = list(pool.map(lambda body: client.post("/worker_generate", json=body).json(), bodies))
                assert not any(answer["error_code"] for answer in answers)
                budget = client.post("/model_details").json()["memory"]
            peak = int(Path(f"/proc/{worker.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        finally:
            worker.terminate()
    total = psutil.virtual_memory().total
    return {
        "peak_mb": round(peak / 1e6),
        **{f"{name}_mb": round(size / 1e6) for name, size in budget.items()},
        "rest_mb": round((peak - sum(budget.values())) / 1e6),
        "machine_mb": round(total / 1e6),
    }


if __name__ == "__main__":
    typer.run(main)
