"""What prompt tokens say behind known texts: chains of prompt rows at many places of a text, in one forward pass.

The base model is frozen and a text's own tokens never see prompt rows, so the text is read once, without gradients;
only the prompt rows, which look back on its keys and values, are computed with them. Reading it also gives the
teacher's states: what the model itself says at the places that the prompt tokens foresee.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from workers.decoding.prompt_tokens import PromptTokens


@dataclass(frozen=True)
class ReadTexts:
    """B texts of at most P tokens as the model has read them.

    Attributes:
        states: float[B, P, h], their last hidden states; what is behind a text's end means nothing.
        keys_values: their keys and values in every layer.
    """

    states: torch.Tensor
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def read_texts(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> ReadTexts:
    """One pass over some texts."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64, device=model.device)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    cache = DynamicCache()  # not the model's: a layer with a sliding window would forget what early chains see
    states = model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    layers: list[Any] = cache.layers
    return ReadTexts(states, [(layer.keys, layer.values) for layer in layers])


def prompt_states(model: PreTrainedModel, tokens: PromptTokens, texts: ReadTexts, places: torch.Tensor) -> torch.Tensor:
    """float[B, K, S, h]: the last hidden states of prompt rows, the mean of each special token's.

    Args:
        places: int64[B, K], numbers of each text's tokens behind which a whole chain hangs.
    """
    special, virtual, hidden = tokens.embeddings.shape
    rows, (batch, count) = special * virtual, places.shape
    device = places.device
    past = torch.arange(texts.states.shape[1], device=device).expand(batch, -1)
    depths = torch.arange(1, special + 1, device=device).repeat_interleave(virtual)
    positions = (places[..., None] + depths).flatten(1)
    own = torch.block_diag(*[torch.tensor(tokens.visible, device=device)] * count).expand(batch, -1, -1)
    before = past[:, None] <= places[..., None]
    visible = torch.cat([before.repeat_interleave(rows, 1), own], 2)
    states = model.get_decoder()(
        inputs_embeds=tokens.embeddings.reshape(1, rows, hidden).repeat(batch, count, 1).to(model.dtype),
        attention_mask=_masks(model, visible, positions[..., None] - torch.cat([past, positions], 1)[:, None]),
        position_ids=positions,
        past_key_values=_cache(texts),
        use_cache=True,
    ).last_hidden_state
    return states.reshape(batch, count, special, virtual, hidden).mean(3)


def _masks(
    model: PreTrainedModel, visible: torch.Tensor, distances: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """bool[B, Q, K] and int64[B, Q, K] as the model's attention takes them: one mask, or one for each kind of layer."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    near = visible & (distances < window) if window else visible
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {kind: _mask(model, near if kind.startswith("sliding") else visible) for kind in kinds}
    return _mask(model, visible if kinds == {"full_attention"} else near)


def _mask(model: PreTrainedModel, visible: torch.Tensor) -> torch.Tensor:
    mask = visible[:, None]
    if "eager" not in model.config._attn_implementation:
        return mask
    return torch.where(mask, 0.0, torch.finfo(model.dtype).min)  # eager attention adds its mask


def _cache(texts: ReadTexts) -> DynamicCache:
    """A cache of its own: the pass over the prompt rows adds to it."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(texts.keys_values):
        cache.update(keys, values, index)
    return cache
