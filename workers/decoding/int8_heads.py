"""Heads with 8-bit weights on the CPU kernels: a guess need not be exact, and reading the weights is what it costs."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from workers.decoding.heads import Chances, Guesses, MedusaHeads, best_guesses
from workers.decoding.medusa_checkpoint import load_heads
from workers.model.kernels.build import load_kernels
from workers.model.quantization import Int8Linear


class Int8Heads:
    """The same heads to draft with; see :class:`MedusaHeads`."""

    def __init__(self, heads: MedusaHeads) -> None:
        self._blocks = [
            [Int8Linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            for weights, biases in zip(heads.weight, heads.bias, strict=True)
        ]
        own = heads.projection if heads.projection.ndim == 3 else heads.projection[None]
        self._projections = [Int8Linear(projection) for projection in own]
        self._token = None if heads.token_weight is None else Int8Linear(heads.token_weight)
        self._embeddings = heads.embeddings
        self._token_ids = heads.token_ids

    def __len__(self) -> int:
        return len(self._blocks[0])

    @property
    def nbytes(self) -> int:
        """Memory beside the model's."""
        layers = [*chain.from_iterable(self._blocks), *self._projections, *([self._token] if self._token else [])]
        return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())

    @torch.inference_mode()
    def guesses(
        self, hidden: torch.Tensor, tokens: Sequence[int], heads: int, width: int
    ) -> tuple[list[Guesses], list[Chances]]:
        """See :meth:`MedusaHeads.guesses`."""
        return best_guesses(self._logits(hidden, tokens, heads), self._token_ids, width)

    def _logits(self, hidden: torch.Tensor, tokens: Sequence[int], heads: int) -> torch.Tensor:
        x = [hidden] * heads
        chosen = self._chosen(tokens)
        for blocks in self._blocks:
            x = [each + silu(block.product(each) + chosen) for each, block in zip(x, blocks, strict=False)]
            chosen = 0
        if len(self._projections) == 1:
            return self._projections[0].product(torch.stack(x))
        return torch.stack([one.product(each) for each, one in zip(x, self._projections, strict=False)])

    def _chosen(self, tokens: Sequence[int]) -> torch.Tensor | int:
        if self._token is None or self._embeddings is None:
            return 0
        embedded = self._embeddings[torch.tensor(tokens)]
        return self._token.product(rms_norm(embedded, embedded.shape[-1:]))


def load_drafting_heads(path: Path, model: PreTrainedModel) -> MedusaHeads | Int8Heads:
    """Heads to draft with, in int8 where the CPU kernels run. Raises BadAdapter."""
    heads = load_heads(path, model)
    on_kernels = (model.device.type, model.dtype) == ("cpu", torch.float32) and load_kernels()
    return Int8Heads(heads) if on_kernels else heads
