"""Prompt tokens (PPD, Chen et al. 2024): trained embeddings behind a token that guess what follows the next one.

Special token i (from 1) stands i positions behind the token on which it hangs, and its row of logits guesses the token
at the position after its own. It may be several virtual tokens at the same position, whose logits are averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch

from workers.decoding.dynamic_tree import DynamicTree
from workers.model.tree import ancestor_closure
from workers.model.verification import ROOT

Attention = Literal["ensemble", "decoder", "encoder"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)


@dataclass(frozen=True)
class PromptTokens:
    """S special tokens of v virtual ones each. A chain's rows are numbered special token by special token.

    Attributes:
        embeddings: float[S, v, h], of the model's input.
        attention: which rows of a chain see each other. ``ensemble``: the j-th virtual token those before it that are
            j-th too; ``decoder``: all before it; ``encoder``: all of its own special token, and no other.
        trees: dynamic trees that came with them, by name.
    """

    embeddings: torch.Tensor
    attention: Attention = "ensemble"
    trees: Mapping[str, DynamicTree] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def virtual(self) -> int:
        """v."""
        return self.embeddings.shape[1]

    @property
    def nbytes(self) -> int:
        """All the memory that they take beside the model."""
        return self.embeddings.nbytes

    @property
    def has_siblings(self) -> bool:
        """Whether rows see each other both ways, which no tree expresses."""
        return self.attention == "encoder" and self.virtual > 1

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The parent of each row of a chain among them; ROOT for those that hang on the chain's node."""
        step = {"ensemble": self.virtual, "decoder": 1, "encoder": len(self) * self.virtual}[self.attention]
        return tuple(max(row - step, ROOT) for row in range(len(self) * self.virtual))

    @cached_property
    def visible(self) -> np.ndarray:
        """bool[S·v, S·v]: which rows of a whole chain each of them sees."""
        visible: np.ndarray = ancestor_closure(self.parents)
        if not self.has_siblings:
            return visible
        special = np.arange(len(visible)) // self.virtual
        return visible | (special[:, None] == special)
