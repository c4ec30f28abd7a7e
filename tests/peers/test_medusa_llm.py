"""medusa-llm 0.1 with the same base and the same heads writes the same greedy text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.tokenizers import byte_tokenizer
from workers.engine import Engine

HEADS, LAYERS = 2, 1
STEPS = 20
PROMPTS = ["abcabcabc", "hello hello world", "z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with one key head a query head (all that medusa-llm can do), and random heads as it saves them."""
    folder = tmp_path_factory.mktemp("medusa")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    heads = {}
    for head in range(HEADS):
        heads[f"{head}.0.linear.weight"] = 0.05 * torch.randn(64, 64)
        heads[f"{head}.0.linear.bias"] = 0.05 * torch.randn(64)
        heads[f"{head}.{LAYERS}.weight"] = model.lm_head.weight.detach() + 0.05 * torch.randn(300, 64)
    (folder / "heads").mkdir()
    torch.save(heads, folder / "heads" / "medusa_lm_head.pt")
    (folder / "heads" / "config.json").write_text(json.dumps({"base_model_name_or_path": str(folder / "base")}))
    return folder


def test_the_same_greedy_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = original(folder, monkeypatch)
    adapters = {"medusa": folder / "heads"}
    accepted = 0
    with Engine.load(str(folder / "base"), method="medusa", kv_tokens=2048, adapters=adapters, tune=False) as engine:
        for prompt in PROMPTS:
            expected = answer(theirs, prompt).replace("\ufffd", "")  # random bytes: ours drops what is no character
            events = list(engine.generate(prompt, temperature=0, max_new_tokens=64))
            ours = "".join(event.text for event in events)
            assert len(expected) > STEPS / 4
            assert ours.startswith(expected) or expected.startswith(ours)
            accepted += sum(event.step.threads[0].accepted for event in events if event.step)
    assert accepted > 0


def original(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their model. ``from_pretrained`` of a current transformers would leave its rotary tables uninitialised."""
    medusa_model = pytest.importorskip("medusa.model.medusa_model")
    llama = pytest.importorskip("medusa.model.modeling_llama_kv")

    def init_rope(self: Any) -> None:
        positions = self.max_position_embeddings
        self.rotary_emb = llama.LlamaRotaryEmbedding(self.head_dim, max_position_embeddings=positions)

    monkeypatch.setattr(llama.LlamaAttention, "_init_rope", init_rope)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    base = medusa_model.KVLlamaForCausalLM(stock.config).eval()
    base.load_state_dict(stock.state_dict(), strict=False)
    model = medusa_model.MedusaModel(base, HEADS, LAYERS, str(folder / "base"))
    heads = torch.load(folder / "heads" / "medusa_lm_head.pt", weights_only=True)
    model.medusa_head.load_state_dict(heads)
    return model


def answer(model: Any, prompt: str) -> str:
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    with torch.inference_mode():
        return [chunk["text"] for chunk in model.medusa_generate(ids, max_steps=STEPS)][-1]
