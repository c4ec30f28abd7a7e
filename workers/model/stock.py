"""What calling a stock model takes: a mask that makes it build none, and a way to its last hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


def placeholder_mask(device: torch.device | None = None) -> torch.Tensor:
    """Masks of four dimensions are taken as they are: none is built, and in a step ours is not looked at."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects float[T, hidden], the states before the output projection, of every pass inside the block."""
    found: list[torch.Tensor] = []
    decoder: Any = model.get_decoder()
    hook = decoder.register_forward_hook(lambda module, args, out: found.append(out.last_hidden_state[0]))
    try:
        yield found
    finally:
        hook.remove()
