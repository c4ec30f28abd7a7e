"""Medusa heads: from one last hidden state, guesses for the tokens behind the next one (Cai et al. 2024).

Head k is residual blocks x + SiLU(W x + b), then a projection to the vocabulary. It may be the base model's own, and a
part of the vocabulary: a head guesses from the tokens that the model uses most, at a fraction of the product's cost.

The state alone says which tokens may come next, not which one was chosen. Heads with a ``token_weight`` read that token
too, as the first of Hydra's heads does (Ankner et al. 2024): x + SiLU(W x + E e + b) in the first block, where e is its
embedding.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

Guesses = list[list[int]]
Chances = list[list[float]]


class MedusaHeads(nn.Module):
    """H heads of L residual blocks on hidden states of size h, over V' tokens.

    Attributes:
        weight: float[L, H, h, h]; bias: float[L, H, h].
        projection: float[V', h] for all heads, or float[H, V', h], one each.
        token_ids: int64[V'], the tokens of the projection's rows; None if they are the whole vocabulary in order.
        token_weight: float[h, h], the same for all heads; None for heads that read the state alone.
        embeddings: float[V, h], the model's own; None where there is no ``token_weight``.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    projection: torch.Tensor
    token_ids: torch.Tensor | None
    token_weight: nn.Parameter | None
    embeddings: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        projection: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.token_weight = None if token_weight is None else nn.Parameter(token_weight)
        self.register_buffer("embeddings", None if token_weight is None else embeddings, persistent=False)
        self.register_buffer("projection", projection, persistent=False)
        self.register_buffer("token_ids", token_ids, persistent=False)

    @classmethod
    def blank(
        cls,
        heads: int,
        layers: int,
        projection: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> "MedusaHeads":
        """Heads whose blocks change nothing yet; with ``embeddings`` they will read the chosen token."""
        hidden = projection.shape[-1]
        weight = projection.new_zeros(layers, heads, hidden, hidden)
        token_weight = None if embeddings is None else weight.new_zeros(hidden, hidden)
        return cls(weight, weight.new_zeros(layers, heads, hidden), projection, token_ids, token_weight, embeddings)

    def __len__(self) -> int:
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory beside the model's; a projection of their own counts, the model's own does not."""
        own = self.projection.nbytes if self.token_ids is not None or self.projection.ndim == 3 else 0
        return own + sum(parameter.nbytes for parameter in self.parameters())

    def features(self, hidden: torch.Tensor, tokens: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """What the projection is applied to, for the first ``heads``: float[heads, T, h].

        Args:
            hidden: float[T, h], the states that chose ``tokens`` int64[T].
        """
        x = hidden.expand(len(self) if heads is None else heads, *hidden.shape)
        chosen = self._chosen(tokens)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            x = x + silu(torch.baddbmm(bias[: len(x), None], x, weight[: len(x)].transpose(1, 2)) + chosen)
            chosen = 0
        return x

    def _chosen(self, tokens: torch.Tensor) -> torch.Tensor | int:
        if self.token_weight is None or self.embeddings is None:
            return 0
        embedded = self.embeddings[tokens].to(self.token_weight.dtype)
        return linear(rms_norm(embedded, embedded.shape[-1:]), self.token_weight)

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """float[T, h] and int64[T] → float[heads, T, V']."""
        x = self.features(hidden, tokens, heads)
        if self.projection.ndim == 2:
            return linear(x, self.projection)
        return torch.bmm(x, self.projection[: len(x)].transpose(1, 2))

    @torch.inference_mode()
    def guesses(
        self, hidden: torch.Tensor, tokens: Sequence[int], heads: int, width: int
    ) -> tuple[list[Guesses], list[Chances]]:
        """The ``width`` best guesses of the first ``heads`` for every row of float[T, h] and the token that it chose.

        Returns:
            Token ids and their probabilities by the heads, both [T][heads][width], most probable first.
        """
        chosen = torch.tensor(tokens, device=hidden.device)
        return best_guesses(self.logits(hidden.to(self.weight.dtype), chosen, heads).float(), self.token_ids, width)


def best_guesses(
    logits: torch.Tensor, token_ids: torch.Tensor | None, width: int
) -> tuple[list[Guesses], list[Chances]]:
    """The ``width`` best tokens of logits float[heads, T, V'] and their probabilities, both [T][heads][width]."""
    best = logits.topk(min(width, logits.shape[-1]), dim=-1)
    largest = best.values[..., :1]
    chances = (best.values - largest).exp_() / (logits - largest).exp_().sum(-1, keepdim=True)
    guesses = best.indices if token_ids is None else token_ids[best.indices]
    return guesses.transpose(0, 1).tolist(), chances.transpose(0, 1).tolist()
