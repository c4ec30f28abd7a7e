"""What a decoding method is: it drafts a token tree for each of its threads, and learns from what became of it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from protocol.generation import DraftSettings
from workers.model.sampling import Sampling
from workers.model.tree import Needs, TokenTree


class Budget:
    """What drafts may cost in a step. This one knows no prices; the tuner's does.

    Attributes:
        rows: most rows of one thread's tree.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def worth(self, thread: "DraftThread", chances: Sequence[float], *, beside: int = 0) -> int:
        """How many of some candidates are worth their rows, ``beside`` that many rows that the tree has anyway.

        Args:
            thread: whose tree it is.
            chances: probabilities of acceptance as the method estimates them, in falling order.
            beside: further rows of the tree.
        """
        return len(chances)

    def asks(self, thread: "DraftThread") -> bool:
        """Whether to draft for a thread in this step at all, where making a draft takes time; ask once a step."""
        return True

    def best(
        self, options: Sequence[tuple[int, float]], default: int, thread: "DraftThread | None" = None
    ) -> int | None:
        """Which of some options is worth most: each is rows, and the tokens a step that they bring in the long run.

        Args:
            thread: whose acceptance so far tells how far these tokens are to be trusted; None if they are measured.

        Returns:
            Its index, None if none is worth its rows, ``default`` where there are no prices.
        """
        return default


class DraftThread(Protocol):
    """What a method sees of a generation thread.

    Attributes:
        token_ids: the whole path, prompt and answer.
        prompt_length: how many of them are the prompt.
        remaining: tokens that the thread may still emit.
        state: the method's own memory of this thread; it dies with the thread.
        draft: sizes that the request or the server asked for.
        path: number of the thread among its parent's children, after the parent's path; () for the first.
    """

    token_ids: list[int]
    state: dict[str, Any]

    @property
    def prompt_length(self) -> int: ...

    @property
    def path(self) -> tuple[int, ...]: ...

    @property
    def draft(self) -> DraftSettings: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def remaining(self) -> int: ...


@dataclass(frozen=True)
class Outcome:
    """What became of one thread's draft in a step.

    Attributes:
        tree: the draft.
        rows: accepted rows, in path order.
        token_ids: what was committed to the thread: the accepted tokens and the one that follows, after all cuts.
        step_logits, step_hidden: the whole step's; ``logit_rows`` and ``hidden_rows`` pick this thread's.
    """

    tree: TokenTree
    rows: list[int]
    token_ids: list[int]
    step_logits: torch.Tensor
    step_hidden: torch.Tensor | None
    logit_rows: range
    hidden_rows: range

    @property
    def logits(self) -> torch.Tensor:
        """float[n, vocabulary] (a view) of the rows that asked for them: the root first, then tree rows in order."""
        return self.step_logits[self.logit_rows.start : self.logit_rows.stop]

    @property
    def hidden(self) -> torch.Tensor:
        """float[m, hidden] (a view) likewise. Raises ValueError if no row of the step asked."""
        if self.step_hidden is None:
            raise ValueError("no row asked for its hidden state")
        return self.step_hidden[self.hidden_rows.start : self.hidden_rows.stop]


class BadAdapter(Exception):
    """Trained weights that cannot be used; the message is one line."""


class Method(ABC):
    """One decoding method. Between steps it keeps ``thread.state``, and what requests asked it to share.

    Attributes:
        root_needs: what it wants back of a thread's last row.
        row_needs: what it wants back of every candidate row beside the logits, also of those merged into its tree.
        trees: names that ``draft.tree`` may have.
    """

    name: str
    root_needs: Needs = Needs.LOGITS
    row_needs: Needs = Needs.NOTHING
    trees: Collection[str] = ()

    @abstractmethod
    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        """One tree of at most ``budget.rows`` rows a thread, from the step of the thread's last prompt chunk on."""

    def complete(self, tree: TokenTree, thread: DraftThread, budget: Budget) -> TokenTree:
        """Rows of its own behind candidates that others merged into its tree; most methods need none."""
        return tree

    def observe(  # noqa: B027 - most methods learn nothing
        self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]
    ) -> None:
        """Learn from a step; called with the threads of the preceding ``draft`` that are still alive."""
