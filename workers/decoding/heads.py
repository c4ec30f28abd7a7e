"""Medusa heads: from one last hidden state, guesses for the tokens behind the next one (Cai et al. 2024).

Head k is residual blocks x + SiLU(W x + b), then a projection to the vocabulary. It may be the base model's own, and a
part of the vocabulary: a head guesses from the tokens that the model uses most, at a fraction of the product's cost.
"""

import torch
from torch import nn
from torch.nn.functional import silu

Guesses = list[list[int]]
Chances = list[list[float]]


class MedusaHeads(nn.Module):
    """H heads of L residual blocks on hidden states of size h, over V' tokens.

    Attributes:
        weight: float[L, H, h, h]; bias: float[L, H, h].
        projection: float[V', h] for all heads, or float[H, V', h], one each.
        token_ids: int64[V'], the tokens of the projection's rows; None if they are the whole vocabulary in order.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    projection: torch.Tensor
    token_ids: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        projection: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.register_buffer("projection", projection, persistent=False)
        self.register_buffer("token_ids", token_ids, persistent=False)

    @classmethod
    def blank(
        cls, heads: int, layers: int, projection: torch.Tensor, token_ids: torch.Tensor | None = None
    ) -> "MedusaHeads":
        """Heads whose blocks change nothing yet."""
        hidden = projection.shape[-1]
        weight = projection.new_zeros(layers, heads, hidden, hidden)
        return cls(weight, weight.new_zeros(layers, heads, hidden), projection, token_ids)

    def __len__(self) -> int:
        return self.weight.shape[1]

    def features(self, hidden: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """float[T, h] → float[heads, T, h], what the projection is applied to, for the first ``heads``."""
        x = hidden.expand(len(self) if heads is None else heads, *hidden.shape)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            x = x + silu(torch.baddbmm(bias[: len(x), None], x, weight[: len(x)].transpose(1, 2)))
        return x

    def logits(self, hidden: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """float[T, h] → float[heads, T, V']."""
        x = self.features(hidden, heads)
        if self.projection.ndim == 2:
            return torch.nn.functional.linear(x, self.projection)
        return torch.bmm(x, self.projection[: len(x)].transpose(1, 2))

    @torch.inference_mode()
    def guesses(self, hidden: torch.Tensor, heads: int, width: int) -> tuple[list[Guesses], list[Chances]]:
        """The ``width`` best guesses of the first ``heads`` for every row of float[T, h].

        Returns:
            Token ids and their probabilities by the heads, both [T][heads][width], most probable first.
        """
        logits = self.logits(hidden.to(self.weight.dtype), heads).float()
        best = logits.topk(min(width, logits.shape[-1]), dim=-1)
        chances = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
        tokens = best.indices if self.token_ids is None else self.token_ids[best.indices]
        return tokens.transpose(0, 1).tolist(), chances.transpose(0, 1).tolist()
