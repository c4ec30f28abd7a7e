"""When a thread may fork (APAR, Liu et al. 2024), and what a fork changes in how its tokens are chosen.

A model that was trained for it emits [Fork] where what follows does not depend on what is left out here; a child thread
begins with [Child] and says what was left out, its parent goes on at once. No rule looks at other requests or at the
clock, so that the text does not depend on them: a child for whom there is no room waits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from workers.model.sampling import Sampling

NAMES = (("[Fork]", "[Child]"), ("[SplitMask]", "[SplitSop]"))  # of the paper, and of the published checkpoints
PUBLISHED = NAMES[1]
MAX_DEPTH = 2  # of a thread, the first one's being 1: the published data has no deeper ones
MAX_CHILDREN = 64


@dataclass(frozen=True)
class ControlTokens:
    """Ids of [Fork] and [Child], and whether they have the names of the published checkpoints."""

    fork: int
    child: int
    published: bool = False


def find_control_tokens(tokenizer: Any, vocabulary: int) -> ControlTokens | None:
    """The control tokens of a tokenizer, if it has both and the model has rows for them."""
    known: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    for fork, child in NAMES:
        if fork in known and child in known and max(known[fork], known[child]) < vocabulary:
            return ControlTokens(known[fork], known[child], published=(fork, child) == PUBLISHED)
    return None


@dataclass(frozen=True)
class Forking:
    """How the threads of a request may fork.

    Attributes:
        max_depth: of a thread, the first one's being 1; 1 forbids to fork.
        max_children: of each thread.
        max_live: APAR's own rule, for its traces: no fork while so many threads live. It depends on timing.
    """

    tokens: ControlTokens
    max_depth: int = MAX_DEPTH
    max_children: int = MAX_CHILDREN
    max_live: int | None = None

    def allows(self, depth: int, children: int, live: Callable[[], int]) -> bool:
        """Whether a thread may fork now."""
        crowded = self.max_live is not None and live() >= self.max_live
        return depth < self.max_depth and children < self.max_children and not crowded

    def samplings(self, sampling: Sampling) -> tuple[Sampling, Sampling]:
        """How tokens are chosen where a thread may fork, and where it may not."""
        fork, child = self.tokens.fork, self.tokens.child
        forbidden = {token: (*sampling.banned_after.get(token, ()), fork) for token in (fork, child)}
        free = replace(sampling, banned=(*sampling.banned, child), banned_after={**sampling.banned_after, **forbidden})
        return free, replace(sampling, banned=(*sampling.banned, fork, child))
