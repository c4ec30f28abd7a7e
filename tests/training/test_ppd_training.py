"""Prompt tokens are trained from a model's own answers, like heads, and draft what they learned."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.answers import Turn
from benchmarks.recorded import records_of
from benchmarks.replay import replayed
from benchmarks.settings import Setting, decode
from protocol.generation import ChatMessage
from tests.support.tiny import tiny_checkpoint, tiny_engine
from tests.training.conftest import PROMPTS
from training.answers import Answer
from training.cut_conversations import cut_conversations
from training.loop import Schedule
from training.ppd import blank_tokens, train_prompt_tokens
from training.prompt_accuracy import measured_accuracies, write_prompt_measures
from training.prompt_rows import prompt_states, read_texts
from training.prompts import Benchmarks
from workers.decoding.ppd_checkpoint import save_prompt_tokens
from workers.decoding.prompt_tokens import ATTENTIONS, Attention, PromptTokens
from workers.model.batch import Run
from workers.model.runner import ModelRunner
from workers.model.tree import Needs, TokenTree
from workers.prompts import PromptRenderer


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


@pytest.mark.parametrize("own", [True, False])
def test_published_data_is_one_cut_a_conversation(own: bool, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    renderer = PromptRenderer(checkpoint.tokenizer, checkpoint.name)
    said = [("human", "hello"), ("gpt", "a long enough answer"), ("human", "bye"), ("gpt", "no")]
    chats: list[dict[str, object]] = [{"conversations": [{"from": role, "value": text} for role, text in said]}]
    chats.append(
        {"messages": [{"role": "user", "content": "What is new?"}, {"role": "assistant", "content": "all of it"}]}
    )
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    path, cache = tmp_path / "chats.json", tmp_path / "cut.jsonl"
    found = cut_conversations(path, checkpoint, Benchmarks([]), special=3, own=own, seed=0, cache=cache)
    first = renderer.render([ChatMessage(role="user", content="hello")]).token_ids
    whole = first + renderer.encode("a long enough answer").token_ids
    assert len(found) == 2, "the answer 'no' is too short: the one before it is cut"
    cut = found[0]
    assert whole[: len(cut.prompt)] == cut.prompt and len(first) <= len(cut.prompt) and len(cut.answer) == 4
    if own:
        ids = torch.tensor([cut.prompt])
        assert cut.answer == greedy(checkpoint.model, ids, 4)
        again = cut_conversations(path, checkpoint, Benchmarks([]), special=3, own=own, seed=0, cache=cache)
        assert again == found and len(cache.read_text().splitlines()) == 2
    else:
        assert whole[len(cut.prompt) : len(cut.prompt) + 4] == cut.answer
    left = cut_conversations(path, checkpoint, Benchmarks(["What is new?"]), special=3, own=own, seed=0, cache=cache)
    assert left == found[:1]
    for wrong in ('[{"text": "a"}]', "[3]", '[{"messages": [{"role": "judge", "content": "a"}]}]'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="no conversation: "):
            cut_conversations(path, checkpoint, Benchmarks([]), special=3, own=own, seed=0, cache=cache)


def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int) -> list[int]:
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()
