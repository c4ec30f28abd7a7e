"""``python -m benchmarks.verify``: the full sets behind the tests' samples, one JSON result, resumable.

Each check is a question answered twice, once by us and once by the reference; finished questions are kept in the result
file and not asked again.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging as transformers_logging

from protocol.generation import ChatMessage, GenerateParams
from traces.datasets import load_datasets
from workers.engine import Engine
from workers.model.attention import OVER_SDPA
from workers.model.runner import ModelRunner
from workers.request import Event
from workers.warm_up import WarmUp

TIE = 5e-4  # logits this close may swap when the batch's shape changes
MOST_TIES = 0.02  # share of answers that may differ by one
TOGETHER = 8
PATIENCE_S = 600  # for one step


@dataclass(frozen=True)
class Case:
    """One question of one check."""

    check: str
    key: str
    question: str


class Results:
    """The JSON file: check → question → result; written after every question."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def has(self, case: Case) -> bool:
        return case.key in self.found.get(case.check, {})

    def add(self, case: Case, result: dict[str, Any]) -> None:
        self.found.setdefault(case.check, {})[case.key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.found, indent=1))
        scratch.replace(self._path)


def main(
    out: Annotated[Path, typer.Option(help="the result file")] = Path("runs/verify.json"),
    model_path: str = "smollm2-135m",
    questions: Annotated[int, typer.Option(min=1, max=80)] = 20,
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
) -> None:
    """Run what is missing; exit 1 if an answer is wrong or more than 2 % differ by ties."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    results = Results(out)
    asked = load_datasets(["vicuna_bench"])[0].questions[:questions]
    with Engine.load(model_path, kv_tokens=16384) as engine:
        WarmUp(engine, model_path, measure=False).wait()
        for check, size in (("greedy, alone", 1), ("greedy, 8 together", TOGETHER)):
            cases = [Case(check, f"vicuna_bench/{q.question_id}/{new_tokens}", q.turns[0]) for q in asked]
            for group in batches([case for case in cases if not results.has(case)], size):
                for case, ours in zip(group, answers(engine, group, new_tokens), strict=True):
                    result = engine.between_steps(partial(compare, engine, case, ours)).result()
                    results.add(case, result)
                    print(f"{case.check}: {case.key}: {result['verdict']}", flush=True)
    sys.exit(0 if passed(results) else 1)


def batches(cases: list[Case], size: int) -> Iterator[list[Case]]:
    """Groups of ``size`` cases that run together."""
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def answers(engine: Engine, cases: list[Case], new_tokens: int) -> list[list[int]]:
    """Our token ids, all cases at once."""
    queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in cases]
    for case, queue in zip(cases, queues, strict=True):
        messages = [ChatMessage(role="user", content=case.question)]
        params = GenerateParams(messages=messages, temperature=0, max_new_tokens=new_tokens, echo=False)
        engine.submit(params, queue.put)
    return [tokens_of(queue) for queue in queues]


def tokens_of(queue: "SimpleQueue[Event]") -> list[int]:
    """Collect one answer; raises the request's error."""
    tokens: list[int] = []
    while True:
        event = queue.get(timeout=PATIENCE_S)
        if event.error:
            raise event.error
        tokens += [token for thread in (event.step.threads if event.step else []) for token in thread.token_ids]
        if event.last:
            return tokens


@contextmanager
def stock_attention(runner: ModelRunner) -> Iterator[Any]:
    """The model with transformers' own attention."""
    model: Any = runner.model  # transformers types `generate` as a tensor
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation(OVER_SDPA)


def compare(engine: Engine, case: Case, ours: list[int], runner: ModelRunner) -> dict[str, Any]:
    """Ours against ``generate``: equal, a tie (at the first difference both logits lie within TIE), or different."""
    prompt = engine.renderer.render([ChatMessage(role="user", content=case.question)]).token_ids
    ids = torch.tensor([prompt])
    with stock_attention(runner) as model, torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(ours), do_sample=False)
    theirs = out[0, len(prompt) :].tolist()
    if ours == theirs:
        return {"verdict": "equal", "tokens": len(ours)}
    pairs = zip(ours, theirs, strict=False)
    first = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    if first == min(len(ours), len(theirs)):
        return {"verdict": "different", "at": first, "ours": ours, "theirs": theirs}
    gap = logit_gap(prompt + theirs[:first], ours[first], theirs[first], runner)
    verdict = "tie" if gap <= TIE else "different"
    return {"verdict": verdict, "at": first, "gap": gap, "ours": ours, "theirs": theirs}


def logit_gap(path: list[int], one: int, other: int, runner: ModelRunner) -> float:
    """How far apart the logits of two tokens behind a path are by the model's stock forward pass."""
    with stock_attention(runner) as model, torch.inference_mode():
        logits = model(torch.tensor([path], device=runner.device), use_cache=False).logits[0, -1]
    return abs(float(logits[one] - logits[other]))


def passed(results: Results) -> bool:
    """Print a line a check."""
    good = True
    for check, cases in results.found.items():
        verdicts = [case["verdict"] for case in cases.values()]
        counts = {verdict: verdicts.count(verdict) for verdict in ("equal", "tie", "different")}
        print(f"{check}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
        good &= not counts["different"] and counts["tie"] <= MOST_TIES * len(verdicts)
    return good


if __name__ == "__main__":
    typer.run(main)
