"""Cross entropy with a teacher's distribution over a large vocabulary, a few rows at a time.

The logits of a batch (1,024 places × 8,192 tokens × heads) would be the largest tensors of the training by far, written
and read several times. A piece of them stays in the cache while its loss and its gradient are computed at once.
"""

from typing import Any

import torch
from torch.nn.functional import linear

PIECE = 256  # rows


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        teacher: torch.Tensor,
        projection: torch.Tensor,
        counted: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        weights = projection.to(dtype)
        gradient = torch.empty_like(features)
        total = features.new_zeros(())
        for start in range(0, len(features), PIECE):
            piece = slice(start, start + PIECE)
            wanted = linear(teacher[piece].to(dtype), weights).float().softmax(-1)
            logits = linear(features.detach()[piece].to(dtype), weights).float()
            log_total = logits.logsumexp(-1)
            total += (log_total - torch.linalg.vecdot(logits, wanted))[counted[piece]].sum()
            chances = logits.sub_(log_total[:, None]).exp_()
            error = chances.sub_(wanted).mul_(counted[piece][:, None])
            gradient[piece] = (error.to(dtype) @ weights).to(features.dtype)
        number = counted.sum().clamp(min=1)
        ctx.save_for_backward(gradient / number)
        return total / number

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return above[0] * gradient, None, None, None, None


def vocabulary_loss(
    features: torch.Tensor,
    teacher: torch.Tensor,
    projection: torch.Tensor,
    counted: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Mean cross entropy between the distributions of ``teacher`` and ``features``; gradients reach the features alone.

    Args:
        features, teacher: float[N, h]; both become distributions by ``projection`` float[V, h].
        counted: bool[N], the rows that count. Without any, the loss is 0.
        dtype: of the products; ``projection`` is best in it already.
    """
    loss: torch.Tensor = _VocabularyLoss.apply(features, teacher, projection, counted, dtype)
    return loss
