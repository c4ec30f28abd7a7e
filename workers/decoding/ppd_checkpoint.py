"""Prompt tokens in the published format: a folder as PEFT writes it for prompt tuning, with a few fields of PPD's.

``adapter_config.json`` says how many special and virtual tokens there are; it is only read, with ``peft_type`` and
without. ``adapter_model.safetensors`` (or ``.bin``) holds ``prompt_embeddings`` float[S·v, h], special token by special
token. ``trees.json``, which is ours, holds dynamic trees by name.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from workers.decoding.dynamic_tree import read_dynamic_trees
from workers.decoding.interface import BadAdapter
from workers.decoding.prompt_tokens import ATTENTIONS, PromptTokens
from workers.decoding.sparse_tree import BadTree
from workers.decoding.tensor_file import open_tensors
from workers.model.quantization import input_embeddings

CONFIG, WEIGHTS, TREES = "adapter_config.json", "adapter_model.safetensors", "trees.json"
KEY = "prompt_embeddings"
# Ablations of the paper's, and the only value of each that is served.
ABLATIONS = {"aggregation_type": "mean", "num_exits": 1, "use_custom_lm_head": False, "use_prefix_tuning": False}


def load_prompt_tokens(path: Path, model: PreTrainedModel) -> PromptTokens:
    """Prompt tokens for ``model``, in its type and on its device.

    Raises:
        BadAdapter: nothing there, an option that is not served, or tokens made for another model; one line.
    """
    try:
        config = _config(path)
        embeddings = _embeddings(path)
        special = config.get("num_special_tokens", len(embeddings))
        virtual = config.get("virtual_tokens_per_special_token", 1)
        attention = config.get("vt_attention_type", "ensemble")
        if attention not in ATTENTIONS:
            raise BadAdapter(f"vt_attention_type {attention!r} is unknown; known: {', '.join(ATTENTIONS)}")
        hidden = input_embeddings(model).shape[1]
        if tuple(embeddings.shape) != (special * virtual, hidden):
            shape = "x".join(map(str, embeddings.shape))
            raise BadAdapter(
                f"{KEY} is {shape}, but {special} special tokens of {virtual} for this model need "
                f"{special * virtual}x{hidden}"
            )
        trees = read_dynamic_trees(path / TREES) if (path / TREES).is_file() else {}
        placed = embeddings.to(model.device, model.dtype)
        return PromptTokens(placed.reshape(special, virtual, hidden), attention, trees)
    except (BadAdapter, BadTree) as error:
        raise BadAdapter(f"{path}: {error}") from None


def _config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text("utf-8"))
    except OSError:
        raise BadAdapter(f"no prompt tokens here; looked for {CONFIG}") from None
    except ValueError as error:
        raise BadAdapter(f"{CONFIG} cannot be read: {error}") from None
    for name, served in ABLATIONS.items():
        if config.get(name, served) != served:
            raise BadAdapter(f"{name} is {config[name]!r}, of which only {served!r} is served")
    return config


def _embeddings(path: Path) -> torch.Tensor:
    file = next((path / name for name in (WEIGHTS, "adapter_model.bin") if (path / name).is_file()), None)
    if file is None:
        raise BadAdapter(f"no weights here; looked for {WEIGHTS} and adapter_model.bin")
    entries = open_tensors(file)
    if KEY not in entries:
        raise BadAdapter(f"{file.name} has no {KEY}")
    return entries[KEY]()


def save_prompt_tokens(tokens: PromptTokens, folder: Path, base: str) -> None:
    """Write the published format, in float32, which stock PEFT reads as well but for PPD's own fields."""
    folder.mkdir(parents=True, exist_ok=True)
    special, virtual, hidden = tokens.embeddings.shape
    save_file({KEY: tokens.embeddings.detach().float().cpu().flatten(0, 1).contiguous()}, folder / WEIGHTS)
    config = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": special * virtual,
        "token_dim": hidden,
        "num_special_tokens": special,
        "virtual_tokens_per_special_token": virtual,
        "vt_attention_type": tokens.attention,
        **ABLATIONS,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
