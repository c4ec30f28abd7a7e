"""Attention over pages and token trees, plugged into stock models through transformers' attention interface.

Inside :func:`step_attention` the registered function stores the step's keys and values, and lets every row attend to
its thread's pages and its visible rows of the step. Outside it, it behaves like the implementation the model had
before, so that the same model object still works for its owner.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from workers.model.batch import KeyPlan, Segment
from workers.model.kv import KVStore, LayerShape
from workers.model.pages import Slots
from workers.model.plan import AttentionPlan

if TYPE_CHECKING:
    from workers.model.kernels.gpu import StepTables

OVER_SDPA = "polydecode"
OVER_EAGER = "polydecode_eager"  # for models whose stock attention sdpa cannot compute (softcap, sinks)

# Keywords that models pass along but that change nothing in a step: positions are already in the queries and keys.
_NEUTRAL = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "dropout"}
_NEUTRAL |= {"output_router_logits", "return_dict", "is_causal", "position_embeddings", "attention_mask"}


class UnsupportedAttention(Exception):
    """The model's attention does something that token trees do not support; the message is one line."""


@dataclass
class StepContext:
    """What attention needs in one step; a narrow step has a plan for the kernels of its device."""

    store: KVStore
    slots: Slots
    segments: list[Segment]
    plan: "AttentionPlan | StepTables | None"


@dataclass
class ShapeProbe:
    """Collects every layer's key and value shape during one stock forward pass."""

    shapes: dict[int, LayerShape]


class _Current(local):
    context: StepContext | ShapeProbe | None = None


_current = _Current()


@contextmanager
def step_attention(context: StepContext | ShapeProbe) -> Iterator[None]:
    """Forward passes of this OS thread inside the block are engine steps."""
    _current.context = context
    try:
        if isinstance(context, StepContext) and isinstance(context.plan, AttentionPlan):
            store = context.store
            torch.ops.polydecode.begin_step(store.addresses, store.step_base, *context.plan.tensors)
        yield
    finally:
        if in_narrow_step():
            torch.ops.polydecode.end_step(store.addresses)
        _current.context = None


def in_narrow_step() -> bool:
    """Whether this OS thread runs a step on the CPU kernels."""
    return isinstance(_current.context, StepContext) and isinstance(_current.context.plan, AttentionPlan)


def install(model: PreTrainedModel) -> None:
    """Route the model's attention through this module.

    Raises:
        UnsupportedAttention: the model does not use transformers' attention interface.
    """
    before = model.config._attn_implementation
    if before in (OVER_SDPA, OVER_EAGER):
        return
    try:
        model.set_attn_implementation(OVER_SDPA if before == "sdpa" else OVER_EAGER)
    except ValueError as error:
        raise UnsupportedAttention(f"{type(model).__name__} takes no custom attention: {error}") from error


def _over_sdpa(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> Any:
    if _current.context is not None:
        return _attend_step(module, query, key, value, **keywords)
    return sdpa_attention_forward(module, query, key, value, mask, **keywords)


def _over_eager(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> Any:
    if _current.context is not None:
        return _attend_step(module, query, key, value, **keywords)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **keywords)


AttentionInterface.register(OVER_SDPA, _over_sdpa)
AttentionInterface.register(OVER_EAGER, _over_eager)
AttentionMaskInterface.register(OVER_SDPA, sdpa_mask)
AttentionMaskInterface.register(OVER_EAGER, eager_mask)


def _attend_step(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """query float[1, H, T, d], key and value float[1, K, T, d'] → float[1, T, H, value width]."""
    _refuse_unknown(module, keywords)
    layer = cast(int, module.layer_idx)
    context = _current.context
    if isinstance(context, ShapeProbe):
        context.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    assert context is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, cap = sliding_window or 0, softcap or 0.0
    if isinstance(context.plan, AttentionPlan):
        return torch.ops.polydecode.attend(query, key, value, layer, scale, window, cap, s_aux), None
    context.store.write(layer, context.slots, key[0], value[0])
    if context.plan is not None:
        from workers.model.kernels import gpu  # needs Triton, which is where GPUs are

        stored = context.store.layer(layer)
        return gpu.attend(query, *stored, context.plan, context.store.step_base, scale, window, cap, s_aux), None
    outputs = []
    for segment in context.segments:
        plan = segment.key_plan(sliding_window, context.store.step_base, query.device)
        rows = query[0, :, segment.start : segment.stop]
        outputs.append(_attend(rows, *context.store.read(layer, plan.slots), plan, scale, softcap, s_aux))
    return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None], None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: KeyPlan,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query float[H, t, d], keys float[K, n, d], values float[K, n, v] → float[t, H, v].

    The H / K query heads of a key head become rows of one product, so that keys are read once and never repeated.
    """
    heads, rows, width = query.shape
    key_heads = keys.shape[0]
    groups = heads // key_heads
    stacked = query.reshape(1, key_heads, groups * rows, width)
    bias = plan.additive(groups, query.dtype)
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(stacked, keys[None], values[None], attn_mask=bias, scale=scale)
    else:
        out = _attend_explicitly(stacked[0], keys, values, bias, scale, softcap, sinks)
    if rows == 1:
        return out.reshape(1, heads, -1)
    return out.view(key_heads, groups, rows, -1).permute(2, 0, 1, 3).reshape(rows, heads, -1)


def _attend_explicitly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention with score capping (Gemma 2) and one learned sink logit a head (gpt-oss)."""
    scores = query @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if sinks is None:
        return scores.float().softmax(-1).to(values.dtype) @ values
    key_heads, stacked = scores.shape[:2]
    groups = sinks.numel() // key_heads
    column = sinks.view(key_heads, groups, 1).expand(-1, -1, stacked // groups).reshape(key_heads, stacked, 1)
    weights = torch.cat([scores, column.to(scores.dtype)], dim=-1).float().softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values


def _refuse_unknown(module: torch.nn.Module, keywords: dict[str, Any]) -> None:
    if keywords.keys() <= _NEUTRAL and keywords.get("is_causal") is not False:
        return
    for name, value in keywords.items():
        if name not in _NEUTRAL and value is not None and value is not False:
            raise UnsupportedAttention(f"{type(module).__name__} passes {name!r} to attention, which is not supported")
    if keywords.get("is_causal") is False:
        raise UnsupportedAttention(f"{type(module).__name__} asks for attention that is not causal")
