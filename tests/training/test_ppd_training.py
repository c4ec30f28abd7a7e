"""Prompt tokens are trained from a model's own answers, like heads, and draft what they learned."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.answers import Turn
from benchmarks.recorded import records_of
from benchmarks.replay import replayed
from benchmarks.settings import Setting, decode
from tests.support.tiny import tiny_checkpoint, tiny_engine
from training.answers import Answer, AnswerFile, answers
from training.loop import Schedule
from training.ppd import blank_tokens, train_prompt_tokens
from training.prompt_accuracy import measured_accuracies, write_prompt_measures
from training.prompt_rows import prompt_states, read_texts
from workers.decoding.ppd_checkpoint import save_prompt_tokens
from workers.decoding.prompt_tokens import ATTENTIONS, Attention, PromptTokens
from workers.model.batch import Run
from workers.model.runner import ModelRunner
from workers.model.tree import Needs, TokenTree

PROMPTS = [f"count {number} and {number + 1}" for number in range(12)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    file = AnswerFile(tmp_path_factory.mktemp("answers") / "answers.jsonl")
    with tiny_engine() as engine:
        return list(answers(engine, PROMPTS, 24, file))


def trained(learned: list[Answer], checkpoint: Path, **options: bool | int | None) -> PromptTokens:
    model = tiny_checkpoint().model
    return train_prompt_tokens(
        model,
        learned,
        blank_tokens(model, 3, 2, "ensemble", 0),
        texts=2,
        places=16,
        schedule=Schedule(40, 3e-2),
        seed=1,
        checkpoint=checkpoint,
        **{"resume": False, "stop_at": None, **options},  # type: ignore[arg-type]
    )[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_rows_of_many_chains_are_those_of_single_ones(family: str, attention: Attention) -> None:
    """One pass over chains at several places says what a decoding step says at each of them, in any attention."""
    model = tiny_checkpoint(family).model
    tokens = blank_tokens(model, 3, 2, attention, 0)
    ids = list(range(40, 60))
    places = torch.tensor([3, 12, 19])
    with torch.inference_mode():
        texts = read_texts(model, [ids, ids[:5]])
        together = prompt_states(model, tokens, texts, torch.stack([places, places.clamp(max=4)]))[0]
    runner = ModelRunner(model, kv_tokens=512)
    for number, place in enumerate(places.tolist()):
        table = runner.new_table()
        table.reserve(place + 1)
        tree = TokenTree.of(
            [-1] * 6,
            tokens.parents,
            candidate=[False] * 6,
            needs=[Needs.HIDDEN] * 6,
            depths=[1, 1, 2, 2, 3, 3],
            embeddings=tokens.embeddings.flatten(0, 1),
            visible=tokens.visible,
        )
        hidden = runner.forward(runner.prepare([Run(ids[: place + 1], table, tree)])).hidden
        assert hidden is not None
        assert torch.allclose(hidden.unflatten(0, (3, 2)).mean(1), together[number], atol=1e-4)
        table.release()


def test_a_killed_training_ends_with_the_same_tokens(learned: list[Answer], tmp_path: Path) -> None:
    whole = trained(learned, tmp_path / "whole.pt")
    trained(learned, tmp_path / "killed.pt", stop_at=17)
    assert torch.equal(trained(learned, tmp_path / "killed.pt", resume=True).embeddings, whole.embeddings)


def test_trained_tokens_are_saved_and_accepted(learned: list[Answer], tmp_path: Path) -> None:
    model = tiny_checkpoint().model
    tokens = trained(learned, tmp_path / "state.pt")
    measured = measured_accuracies(model, tokens, learned)
    blank = measured_accuracies(model, blank_tokens(model, 3, 2, "ensemble", 0), learned)
    assert sum(measured[0]) > sum(blank[0])
    folder = tmp_path / "tokens"
    save_prompt_tokens(tokens, folder, "tiny")
    write_prompt_measures(measured, folder)
    assert len(json.loads((folder / "accuracies.json").read_text())) == 3
    with tiny_engine(methods=["ppd"], adapters={"ppd": folder}, tune=False) as engine:
        records = records_of(engine, learned, tmp_path)
        for name in ("ppd:nodes=20", "ppd:tree=rows_32"):
            setting = Setting.parse(name)
            for prompt, known in zip(PROMPTS[:4], learned, strict=False):
                turn = Turn("set", "", 0, 0, [{"role": "user", "content": prompt}], known)
                decoded = decode(engine, setting, turn)
                assert [token for emitted in decoded for token in emitted] == known.answer
                assert list(map(len, decoded)) == replayed(engine, setting, known, records)
        assert engine.counters.accepted > 0
