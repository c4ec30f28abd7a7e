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
class ReadText:
    """A text of P tokens as the model has read it.

    Attributes:
        states: float[P, h], its last hidden states.
        keys_values: its keys and values in every layer.
    """

    states: torch.Tensor
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def read_text(model: PreTrainedModel, token_ids: Sequence[int]) -> ReadText:
    """One pass over a text."""
    cache = DynamicCache()  # not the model's: a layer with a sliding window would forget what early chains see
    ids = torch.tensor([list(token_ids)], device=model.device)
    states = model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0]
    layers: list[Any] = cache.layers
    return ReadText(states, [(layer.keys, layer.values) for layer in layers])


def prompt_states(model: PreTrainedModel, tokens: PromptTokens, text: ReadText, places: torch.Tensor) -> torch.Tensor:
    """float[K, S, h]: the last hidden states of prompt rows, the mean of each special token's.

    Args:
        places: int64[K], numbers of the text's tokens behind each of which a whole chain hangs.
    """
    special, virtual, hidden = tokens.embeddings.shape
    rows, count = special * virtual, len(places)
    device = places.device
    past = torch.arange(len(text.states), device=device)
    depths = torch.arange(1, special + 1, device=device).repeat_interleave(virtual)
    positions = (places[:, None] + depths).flatten()
    own = torch.block_diag(*[torch.tensor(tokens.visible, device=device)] * count)
    visible = torch.cat([(past <= places[:, None]).repeat_interleave(rows, 0), own], 1)
    states = model.get_decoder()(
        inputs_embeds=tokens.embeddings.reshape(1, rows, hidden).repeat(1, count, 1).to(model.dtype),
        attention_mask=_masks(model, visible, positions[:, None] - torch.cat([past, positions])),
        position_ids=positions[None],
        past_key_values=_cache(text),
        use_cache=True,
    ).last_hidden_state[0]
    return states.reshape(count, special, virtual, hidden).mean(2)


def _masks(
    model: PreTrainedModel, visible: torch.Tensor, distances: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """bool[Q, K] and int64[Q, K] as the model's attention takes them: one mask, or one for each kind of layer."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    near = visible & (distances < window) if window else visible
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {kind: _mask(model, near if kind.startswith("sliding") else visible) for kind in kinds}
    return _mask(model, visible if kinds == {"full_attention"} else near)


def _mask(model: PreTrainedModel, visible: torch.Tensor) -> torch.Tensor:
    mask = visible[None, None]
    if "eager" not in model.config._attn_implementation:
        return mask
    return torch.where(mask, 0.0, torch.finfo(model.dtype).min)  # eager attention adds its mask


def _cache(text: ReadText) -> DynamicCache:
    """A cache of its own: the pass over the prompt rows adds to it."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(text.keys_values):
        cache.update(keys, values, index)
    return cache
