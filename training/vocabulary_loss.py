"""Cross entropy over a large vocabulary, a few rows at a time.

The logits of a batch (1,024 places × 8,192 tokens × heads) would be the largest tensor of the training by far, written
and read several times. A piece of them stays in the cache while its loss and its gradient are computed at once.
"""

from typing import Any

import torch
from torch.nn.functional import linear

PIECE = 256  # rows


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, projection: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        rows, weights = features.detach().to(dtype), projection.to(dtype)
        gradient = torch.empty_like(features)
        counted = targets >= 0
        total = features.new_zeros(())
        for start in range(0, len(rows), PIECE):
            piece = slice(start, start + PIECE)
            logits = linear(rows[piece], weights).float()
            wanted = targets[piece].clamp(min=0)[:, None]
            log_total = logits.logsumexp(-1, keepdim=True)
            losses = log_total - logits.gather(-1, wanted)
            total += losses[counted[piece]].sum()
            chances = logits.sub_(log_total).exp_()
            chances.scatter_add_(-1, wanted, torch.full_like(losses, -1.0))
            chances.mul_(counted[piece][:, None])
            gradient[piece] = (chances.to(dtype) @ weights).to(features.dtype)
        number = counted.sum().clamp(min=1)
        ctx.save_for_backward(gradient / number)
        return total / number

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return above[0] * gradient, None, None, None


def vocabulary_loss(
    features: torch.Tensor, projection: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Mean cross entropy of ``features`` float[N, h] times ``projection`` float[V, h], which gets no gradient.

    Args:
        targets: int64[N], rows of the projection; negative ones do not count. Without any, the loss is 0.
        dtype: of the products; ``projection`` is best in it already.
    """
    loss: torch.Tensor = _VocabularyLoss.apply(features, projection, targets, dtype)
    return loss
