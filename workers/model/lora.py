"""Adapters that change weights: LoRA in PEFT's format, merged at load; new tokens come with rows of their own."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADDED_TOKENS = "added_tokens.json"  # token → id, as transformers' tokenizers write it


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> dict[str, int]:
    """Give a model new tokens; their rows begin as the mean of all others. Returns their ids."""
    tokenizer.add_tokens(tokens)
    ids = [tokenizer.get_added_vocab()[token] for token in tokens]
    sized: Any = model
    old = sized.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old:
        sized.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (sized.get_input_embeddings().weight, sized.get_output_embeddings().weight):
            table[ids] = table[:old].mean(0)
    return dict(zip(tokens, ids, strict=True))


def merge_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """``model`` with the adapter in ``folder`` merged into its weights; the tokenizer learns the adapter's tokens.

    Raises:
        ValueError: no adapter there, or one for another model; one line.
    """
    from peft import PeftModel

    try:
        added = json.loads((folder / ADDED_TOKENS).read_text()) if (folder / ADDED_TOKENS).is_file() else {}
        known = add_tokens(model, tokenizer, sorted(added, key=added.__getitem__)) if added else {}
        if known != added:
            raise ValueError(f"its tokens are {added}, here they are {known}")
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # peft raises whatever its parts raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot merge the adapter {folder}: {line}") from error
    result: PreTrainedModel = merged
    return result
