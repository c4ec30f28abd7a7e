"""Adapters that change weights are merged at load, and a model with control tokens is served."""

import json
from pathlib import Path

import pytest
import torch

from protocol.generation import ChatMessage
from tests.decoding.test_medusa import random_heads, write
from tests.support.families import tiny_model
from tests.support.tiny import save_tiny
from tests.support.tokenizers import byte_tokenizer
from training.apar import save_adapter, with_lora
from workers.engine import Engine
from workers.forking import ControlTokens
from workers.model.checkpoint import ModelLoadError, load_checkpoint
from workers.model.lora import ADDED_TOKENS, add_tokens
from workers.service import served_names

CPU = torch.device("cpu")
NAMES = ["[Fork]", "[Child]"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A random adapter with two new tokens for the tiny Llama, and what that model says with it."""
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    added = add_tokens(model, tokenizer, NAMES)
    trained = with_lora(model, list(added.values()), rank=2)
    torch.manual_seed(0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = torch.normal(0, 0.2, parameter.shape).half().float()  # it is kept in 16 bits
    with torch.inference_mode():
        torch.save(trained(torch.arange(7, 30)[None]).logits, tmp_path / "logits.pt")
    save_adapter(trained, tmp_path / "apar", "tiny")
    (tmp_path / "apar" / ADDED_TOKENS).write_text(json.dumps(added))
    return tmp_path / "apar"


def test_a_merged_adapter_says_what_it_said_in_training(adapter: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    checkpoint = load_checkpoint(str(folder), dtype=torch.float32, device=CPU, adapter=adapter)
    assert checkpoint.name == "tiny-apar"
    with torch.inference_mode():
        logits = checkpoint.model(torch.arange(7, 30)[None]).logits
    torch.testing.assert_close(logits, torch.load(tmp_path / "logits.pt"), atol=1e-3, rtol=1e-3)


def test_it_is_served_with_threads(adapter: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    with Engine.load(str(folder), method=["apar", "apar+ngram"], adapters={"apar": adapter}, kv_tokens=512) as engine:
        assert engine.methods == ("apar", "apar+ngram", "vanilla")
        options = {"max_new_tokens": 8, "temperature": 0, "logit_bias": {engine.control.fork: 100.0}}
        events = list(engine.generate("Hello", **options))
        assert len({thread.thread for event in events if event.step for thread in event.step.threads}) > 1
        banned = list(engine.generate("Hello", method="vanilla", **options))
        assert len({thread.thread for event in banned if event.step for thread in event.step.threads}) == 1


def test_a_model_without_control_tokens_does_not_fork(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    with pytest.raises(ModelLoadError, match=r"^method 'apar' needs a model that was trained to fork: .*no \[Fork\]$"):
        Engine.load(str(folder), method="apar")


def test_an_adapter_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    with pytest.raises(ModelLoadError, match=r"^cannot merge the adapter .*nothing: "):
        Engine.load(str(folder), method="apar", adapters={"apar": tmp_path / "nothing"})


def test_the_published_layout_is_served(tmp_path: Path) -> None:
    """As THUDM/apar-7b: control tokens in added_tokens.json, no chat template, heads in a folder without base path."""
    folder = tmp_path / "apar-7b"
    tiny_model("llama").save_pretrained(folder)
    tokenizer = byte_tokenizer(None, added=["[SplitMask]", "[SplitSop]"])
    tokenizer.save_pretrained(folder)
    (folder / ADDED_TOKENS).write_text(json.dumps({"[SplitMask]": 263, "[SplitSop]": 264}))
    write(folder / "medusa", "medusa_lm_head.pt", random_heads(2))
    methods = ["apar", "apar+medusa"]
    with Engine.load(str(folder), method=methods, kv_tokens=2048) as engine:
        assert engine.control == ControlTokens(263, 264, published=True)
        assert served_names(engine.name, methods, []) == {"apar-7b-apar": "apar", "apar-7b-apar+medusa": "apar+medusa"}
        assert engine.renderer.render([ChatMessage(role="user", content="Hi")]).text.endswith("USER: Hi ASSISTANT:")
        options = {"max_new_tokens": 12, "temperature": 0, "logit_bias": {263: 6.0}}
        texts = ["".join(event.text for event in engine.generate("Hello", method=one, **options)) for one in methods]
        assert texts[0] == texts[1]
        assert "\n\n" in texts[0]
