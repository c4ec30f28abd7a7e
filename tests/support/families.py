"""Tiny random models of many families, all with a vocabulary of 300 and a sliding window (if any) of 8."""

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCABULARY = 300
WINDOW = 8

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 4,
    "num_key_value_heads": 4,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}

FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_BASE)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_BASE, sliding_window=WINDOW)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_BASE)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_BASE, head_dim=16)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_BASE, **_MIXED)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_BASE, **_MIXED, attn_logit_softcapping=2.0)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_BASE, **_MIXED, **_MOE)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**{**_BASE, **_MLA})),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose random weights are large enough that its attention matters."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "sink" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model
