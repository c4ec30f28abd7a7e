"""Heads are trained from a model's own answers, go on where a killed training stopped, and draft what they learned."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.answers import Turn
from benchmarks.recorded import records_of
from benchmarks.replay import replayed
from benchmarks.settings import Setting, decode
from tests.support.tiny import tiny_checkpoint, tiny_engine
from tests.training.conftest import PROMPTS
from training.answers import Answer
from training.examples import examples_of, held_out, most_used
from training.head_accuracy import accuracies, write_measures
from training.hidden import HiddenStates, hidden_states
from training.loop import Schedule
from training.medusa import heads_to_train, train_heads
from training.prompts import Benchmarks, load_prompts, read_questions
from workers.decoding.heads import MedusaHeads
from workers.decoding.medusa_checkpoint import load_heads, save_heads
from workers.model.quantization import output_projection


@pytest.fixture(scope="module")
def states(learned: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> HiddenStates:
    return hidden_states(tiny_checkpoint().model, learned, 3, tmp_path_factory.mktemp("hidden"))


def untrained(learned: list[Answer], *, start: Path | None = None, plain: bool = False) -> MedusaHeads:
    model = tiny_checkpoint().model
    token_ids = most_used(learned, 64, len(output_projection(model)))
    return heads_to_train(model, token_ids, start, heads=3, layers=1, plain=plain)


def trained(
    states: HiddenStates, learned: list[Answer], checkpoint: Path, *, plain: bool = False, **options: object
) -> MedusaHeads:
    return train_heads(
        states,
        untrained(learned, plain=plain),
        schedule=Schedule(60, 1e-2),
        batch=64,
        seed=1,
        checkpoint=checkpoint,
        **{"resume": False, "stop_at": None, **options},  # type: ignore[arg-type]
    )[0]


def test_states_are_those_from_which_the_tokens_were_chosen(states: HiddenStates, learned: list[Answer]) -> None:
    model = tiny_checkpoint().model
    logits = torch.from_numpy(np.array(states.states, dtype=np.float32)) @ output_projection(model).T
    chosen = [token for answer in learned for token in answer.answer]
    assert np.mean(logits.argmax(-1).numpy() == chosen) > 0.98  # float16 may swap nearly equal ones
    assert states.following[0].tolist() == learned[0].answer[1:4]
    assert states.following[len(learned[0].answer) - 1].tolist() == [-1, -1, -1]


def test_a_killed_training_ends_with_the_same_heads(
    states: HiddenStates, learned: list[Answer], tmp_path: Path
) -> None:
    whole = trained(states, learned, tmp_path / "whole.pt")
    trained(states, learned, tmp_path / "killed.pt", stop_at=23)
    resumed = trained(states, learned, tmp_path / "killed.pt", resume=True)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="is of another training"):
        train_heads(
            states,
            untrained(learned),
            schedule=Schedule(61, 1e-2),
            batch=64,
            seed=1,
            checkpoint=tmp_path / "killed.pt",
            resume=True,
        )


def test_trained_heads_are_saved_loaded_and_accepted(
    states: HiddenStates, learned: list[Answer], tmp_path: Path
) -> None:
    heads = trained(states, learned, tmp_path / "state.pt")
    token_ids = heads.token_ids
    blank = untrained(learned)
    examples = examples_of(states, token_ids, kept=np.ones(len(states.states), dtype=bool))
    measured = accuracies(heads, examples)
    plain = trained(states, learned, tmp_path / "plain.pt", plain=True)
    assert measured[0][0] > accuracies(plain, examples)[0][0] > accuracies(blank, examples)[0][0]
    assert 0 < len(held_out(states, token_ids).states) < len(states.states) / 4
    assert all(0 <= sum(ranks) <= 1 for ranks in measured)
    save_heads(heads, tmp_path / "heads", "tiny")
    write_measures(measured, tmp_path / "heads")
    assert (tmp_path / "heads" / "accuracies.png").stat().st_size > 1000
    loaded = load_heads(tmp_path / "heads", tiny_checkpoint().model)
    assert torch.allclose(loaded.weight, heads.weight, atol=1e-2)
    assert torch.equal(loaded.token_ids, token_ids)  # type: ignore[arg-type]
    begun = untrained(learned, start=tmp_path / "heads")
    assert accuracies(begun, examples)[0][0] == pytest.approx(measured[0][0], abs=0.02)  # saved in bfloat16
    assert len(json.loads((tmp_path / "heads" / "tree.json").read_text())) <= 64
    with tiny_engine(methods=["medusa"], adapters={"medusa": tmp_path / "heads"}, tune=False) as engine:
        setting, records = Setting.parse("medusa:nodes=12"), records_of(engine, learned, tmp_path)
        for prompt, known in zip(PROMPTS[:6], learned, strict=False):
            turn = Turn("set", "", 0, 0, [{"role": "user", "content": prompt}], known)
            decoded = decode(engine, setting, turn)
            assert [token for tokens in decoded for token in tokens] == known.answer
            assert list(map(len, decoded)) == replayed(engine, setting, known, records)
        assert engine.counters.accepted > 0


def test_benchmark_questions_are_left_out(tmp_path: Path) -> None:
    question = "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences"
    (tmp_path / "bench.jsonl").write_text(
        json.dumps({"question_id": 1, "turns": [question, "Shorter."]}) + "\n" + json.dumps({"prompt": "def f(): pass"})
    )
    near = "Please: compose an engaging travel blog post about a recent trip to Hawaii, highlighting food and beaches"
    prompts = [question.upper(), near, "shorter", "DEF f() pass", "What is new?", "What is new?", "x" * 99]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    benchmarks = Benchmarks(read_questions([tmp_path / "bench.jsonl"]))
    assert load_prompts(tmp_path / "prompts.jsonl", benchmarks, count=None, seed=0, longest=90) == ["What is new?"]
    (tmp_path / "prompts.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="every line must be an object with a prompt"):
        load_prompts(tmp_path / "prompts.jsonl", benchmarks, count=None, seed=0, longest=90)
