"""int8 weights: each output's weights share one scale; activations stay in the model's type.

Only products are quantised, embeddings are not. On the CPU kernels an activation row is rounded to 16 bits on the way,
far finer than the weights; everywhere else the weights are widened for each product.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.model.attention import in_narrow_step

SAMPLE = Path(__file__).with_name("quantization_sample.txt")
SAMPLE_TOKENS = 512
LARGEST = 127


@dataclass(frozen=True)
class Quantization:
    """What quantising did to a model, on a short English text with a recipe and some code in it.

    Attributes:
        kind: the scheme's name.
        perplexity, reference_perplexity: of the text, with and without quantisation.
        agreement: the share of positions at which both would choose the same next token.
        tokens: the text's length.
    """

    kind: str
    perplexity: float
    reference_perplexity: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.kind} weights: perplexity {self.perplexity:.2f} (unquantised {self.reference_perplexity:.2f}), "
            f"same next token at {self.agreement:.1%} of {self.tokens} positions"
        )


class Int8Linear(nn.Module):
    """A linear layer with ``weight`` int8[out, in], ``scale`` float[out] and the original's ``bias`` float[out]."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        scale = (weight.float().abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float[..., in] → float[..., out]."""
        if not in_narrow_step():
            widened = (self.weight * self.scale[:, None]).to(x.dtype)
            return nn.functional.linear(x, widened, self.bias)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The same on the CPU kernels, which must be there."""
        out = torch.ops.polydecode.linear_int8(x.reshape(-1, x.shape[-1]), self.weight, self.scale, self.bias)
        return out.view(*x.shape[:-1], len(self.scale))


def output_projection(model: PreTrainedModel) -> torch.Tensor:
    """float[V, hidden]: the weights behind the model's logits, widened (a copy) where they are quantised."""
    output: Any = model.get_output_embeddings()
    if isinstance(output, Int8Linear):
        return (output.weight * output.scale[:, None]).to(model.dtype)
    weight: torch.Tensor = output.weight
    return weight.detach()


def input_embeddings(model: PreTrainedModel) -> torch.Tensor:
    """float[V, hidden]: what the model's tokens are embedded with."""
    embed: Any = model.get_input_embeddings()
    weight: torch.Tensor = embed.weight
    return weight.detach()


def quantize_int8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Quantization:
    """Replace the model's plain linear layers, in place, and measure what that changes."""
    ids = torch.tensor([tokenizer.encode(SAMPLE.read_text())[:SAMPLE_TOKENS]], device=model.device)
    before = _log_probabilities(model, ids)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Int8Linear(module.weight, module.bias))
    after = _log_probabilities(model, ids)
    targets = ids[0, 1:, None]
    return Quantization(
        kind="int8",
        perplexity=torch.exp(-after[:-1].gather(1, targets).mean()).item(),
        reference_perplexity=torch.exp(-before[:-1].gather(1, targets).mean()).item(),
        agreement=(before.argmax(-1) == after.argmax(-1)).float().mean().item(),
        tokens=ids.shape[1],
    )


@torch.inference_mode()
def _log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
