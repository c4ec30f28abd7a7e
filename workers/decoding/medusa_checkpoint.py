"""Medusa heads from every layout in which they were published, told apart by their keys: configs are often wrong.

| layout | keys |
|---|---|
| Medusa 0.1, APAR's | ``{head}.{layer}.linear.{weight,bias}``, ``{head}.{layers}.weight``: a projection for each head |
| "version 2", TGI's, ours | the same without projections: the base model's is shared |
| Medusa-1 and -2, merged | the same behind ``medusa_head.``, among the model's own weights |
| vLLM's | ``blocks.{head}.layers.{layer}.{weight,bias}``, ``lm_heads.{head}.weight`` or ``lm_head.weight`` |

``token_map`` int64[V'] holds the tokens of a projection that covers a part of the vocabulary; ours may have it too, and
``token.weight`` float[h, h] where they read the chosen token.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from workers.decoding.heads import MedusaHeads
from workers.decoding.interface import BadAdapter
from workers.decoding.tensor_file import open_tensors
from workers.model.quantization import input_embeddings, output_projection

NAMES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", "pytorch_model.bin")
TOKEN_MAP = "token_map"
TOKEN_WEIGHT = "token.weight"
OWN_PREFIX = re.compile(r"^(medusa_heads?\.)")
BLOCK = re.compile(r"^(?:(\d+)\.(\d+)\.linear|blocks\.(\d+)\.layers\.(\d+))\.(weight|bias)$")
PROJECTION = re.compile(r"^(?:(\d+)\.(\d+)\.weight|lm_heads\.(\d+)\.weight|lm_head\.weight)$")

Tensors = dict[str, torch.Tensor]


def load_heads(path: Path, model: PreTrainedModel) -> MedusaHeads:
    """Heads for ``model``, in its type and on its device.

    Args:
        path: a folder, or a file of weights.

    Raises:
        BadAdapter: nothing there, or heads that are incomplete or made for another model; one line.
    """
    try:
        return _assemble(_read(path), output_projection(model), input_embeddings(model))
    except BadAdapter as error:
        raise BadAdapter(f"{path}: {error}") from None


def _read(path: Path) -> Tensors:
    """The tensors that belong to heads, without the prefix of merged models."""
    if path.is_file():
        files = [path]
    else:
        files = [path / name for name in NAMES if (path / name).is_file()][:1]
        files = files or sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise BadAdapter(f"no Medusa heads here; looked for {', '.join(NAMES)} and shards of a merged model")
    tensors: Tensors = {}
    merged = False
    for file in files:
        for name, load in open_tensors(file).items():
            own = OWN_PREFIX.sub("", name)
            if own != name or BLOCK.match(name) or PROJECTION.match(name) or name in (TOKEN_MAP, TOKEN_WEIGHT):
                merged |= own != name
                tensors[name] = load()
    if merged:  # then the model's own lm_head.weight is no head's
        tensors = {OWN_PREFIX.sub("", name): tensor for name, tensor in tensors.items() if OWN_PREFIX.match(name)}
    if not any(BLOCK.match(name) for name in tensors):
        raise BadAdapter(
            f"no Medusa heads in {files[0].name}: no key like 0.0.linear.weight or blocks.0.layers.0.weight"
        )
    return tensors


def _assemble(tensors: Tensors, output: torch.Tensor, embeddings: torch.Tensor) -> MedusaHeads:
    blocks: dict[tuple[int, int, str], torch.Tensor] = {}
    projections: dict[int | None, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if found := BLOCK.match(name):
            head, layer = (int(part) for part in found.groups()[:4] if part is not None)
            blocks[head, layer, found[5]] = tensor
        elif found := PROJECTION.match(name):
            own = found[1] or found[3]
            projections[None if own is None else int(own)] = tensor
    count = 1 + max(head for head, _, _ in blocks)
    layers = 1 + max(layer for _, layer, _ in blocks)
    vocabulary, hidden = output.shape
    weight, bias = output.new_zeros(layers, count, hidden, hidden), output.new_zeros(layers, count, hidden)
    for head in range(count):
        for layer in range(layers):
            if (head, layer, "weight") not in blocks:
                raise BadAdapter(f"head {head} lacks the weight of its block {layer}")
            weight[layer, head] = _fitting(
                blocks[head, layer, "weight"], (hidden, hidden), f"block {layer} of head {head}"
            )
            if (head, layer, "bias") in blocks:  # vLLM's have none
                bias[layer, head] = _fitting(blocks[head, layer, "bias"], (hidden,), f"bias {layer} of head {head}")
    token_ids = tensors.get(TOKEN_MAP)
    if token_ids is not None and (
        token_ids.ndim != 1 or not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary
    ):
        raise BadAdapter(f"{TOKEN_MAP} must be token ids below {vocabulary}")
    token_weight = tensors.get(TOKEN_WEIGHT)
    if token_weight is not None:
        token_weight = _fitting(token_weight, (hidden, hidden), TOKEN_WEIGHT).to(output)
    projection = _projection(projections, count, token_ids, output)
    return MedusaHeads(weight, bias, projection, _moved(token_ids, output), token_weight, embeddings)


def _projection(
    own: dict[int | None, torch.Tensor], count: int, token_ids: torch.Tensor | None, output: torch.Tensor
) -> torch.Tensor:
    """What all heads share (the model's own, or one that came with them), or one for each."""
    if not own:
        return output if token_ids is None else output[token_ids.to(output.device)]
    if None in own:
        return _rows(own[None], token_ids, output, "the heads' common projection")
    if missing := [head for head in range(count) if head not in own]:
        raise BadAdapter(f"head {missing[0]} lacks its projection, though others have one")
    if extra := [head for head in own if head is not None and head >= count]:
        raise BadAdapter(f"head {extra[0]} has a projection but no block")
    return torch.stack([_rows(own[head], token_ids, output, f"head {head}") for head in range(count)])


def _rows(projection: torch.Tensor, token_ids: torch.Tensor | None, output: torch.Tensor, whose: str) -> torch.Tensor:
    vocabulary, hidden = output.shape
    if token_ids is not None and len(projection) > len(token_ids):
        projection = projection[token_ids]
    most = vocabulary if token_ids is None else len(token_ids)
    if projection.ndim != 2 or projection.shape[1] != hidden or len(projection) > most:
        shape = "x".join(map(str, projection.shape))
        raise BadAdapter(f"{whose} projects {shape}, but the model has {vocabulary} tokens of hidden size {hidden}")
    return projection.to(output)


def _fitting(tensor: torch.Tensor, shape: tuple[int, ...], what: str) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        found, wanted = ("x".join(map(str, each)) for each in (tensor.shape, shape))
        raise BadAdapter(f"{what} is {found}, but this model needs {wanted}")
    return tensor


def _moved(token_ids: torch.Tensor | None, output: torch.Tensor) -> torch.Tensor | None:
    return None if token_ids is None else token_ids.to(output.device, torch.int64)


def save_heads(heads: MedusaHeads, folder: Path, base: str) -> None:
    """Heads in bfloat16 in the layout of "version 2", with ``token.weight`` where they read the chosen token."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {} if heads.token_weight is None else {TOKEN_WEIGHT: heads.token_weight.detach().to(torch.bfloat16)}
    tensors |= {
        f"{head}.{layer}.linear.{name}": getattr(heads, name)[layer, head].detach().to(torch.bfloat16).contiguous()
        for layer in range(len(heads.weight))
        for head in range(len(heads))
        for name in ("weight", "bias")
    }
    if heads.token_ids is not None:
        tensors[TOKEN_MAP] = heads.token_ids.to(torch.int32)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config: dict[str, Any] = {"version": "2", "base_model_name_or_path": base}
    config |= {"medusa_num_heads": len(heads), "medusa_num_layers": len(heads.weight)}
    config |= {} if heads.token_weight is None else {"reads_chosen_token": True}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
