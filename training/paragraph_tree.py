"""Paragraph trees in tokens, packed into one sequence: every token is read once, by a model that sees its path alone.

The published training data unrolls a tree into its paths, each an ordinary sample (APAR, Liu et al. 2024). Packed, a
child's tokens follow those of the first thread, see them up to their fork, and have the positions that follow it. Both
give the same losses, but a prefix that n paths share is computed once instead of n times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from training.structure import Structured
from workers.forking import ControlTokens

BREAK = "\n"
NOTHING = -100  # label of a row from which nothing is learned


@dataclass(frozen=True)
class ParagraphTree:
    """An answer's threads behind a prompt.

    Attributes:
        prompt: token ids.
        root: the first thread's own tokens, [Fork] and EOS included.
        children: for each [Fork] of the root, in order, the child's tokens: [Child], its text, EOS.
        loop: what a model said behind the root, instead of its EOS; behind each [Fork] of it ``end`` is to be learned,
            and no more.
        end: EOS.
    """

    prompt: Sequence[int]
    root: Sequence[int]
    children: Sequence[Sequence[int]]
    control: ControlTokens | None
    loop: Sequence[int] = ()
    end: int | None = None

    def __len__(self) -> int:
        return len(self.said) + sum(map(len, self.children))

    @property
    def said(self) -> list[int]:
        """The prompt and what the first thread said behind it, the loop instead of the end."""
        ended = self.loop and self.root[-1] == self.end
        return [*self.prompt, *(self.root[:-1] if ended else self.root), *self.loop]

    @property
    def tokens(self) -> list[int]:
        """All threads' own tokens, the loop's last."""
        return [*self.root, *chain.from_iterable(self.children), *self.loop]

    @property
    def forks(self) -> list[int]:
        """Where the root forks: numbers of rows."""
        fork = self.control.fork if self.control else None
        return [len(self.prompt) + place for place, token in enumerate(self.root) if token == fork]

    @property
    def paths(self) -> list[tuple[list[int], int]]:
        """The samples of the published data: token ids, and how many of them are no labels."""
        first = [*self.prompt, *self.root]
        paths = [(first, len(self.prompt))]
        for fork, child in zip(self.forks, self.children, strict=True):
            paths.append(([*first[: fork + 1], *child], fork + 2))
        return paths


def tree_of(prompt: Sequence[int], answer: Structured, tokenizer: Any, control: ControlTokens) -> ParagraphTree:
    """The tree of an answer; every piece of it is encoded alone, as it is generated. What was cut does not end.

    Some tokenizers put a space before whatever they encode, which belongs before the first piece alone: the others are
    encoded behind a line break.
    """
    line_break = tokenizer.encode(BREAK, add_special_tokens=False)

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(BREAK + text, add_special_tokens=False)
        apart = ids[: len(line_break)] == line_break  # else the break became part of a longer token
        return ids[len(line_break) :] if apart else list(tokenizer.encode(text, add_special_tokens=False))

    end = [tokenizer.eos_token_id]
    root = list(tokenizer.encode(answer.pieces[0], add_special_tokens=False))
    for piece in answer.pieces[1:]:
        root += [control.fork, *encoded(piece)]
    children = [[control.child, *encoded(detail), *end] for detail in answer.details]
    if not answer.cut:
        root += end
    elif children and not answer.loop and not answer.pieces[-1].strip():  # it was cut in the last child's words
        children[-1].pop()
    loop = [token for piece in answer.loop for token in (*encoded(piece), control.fork)]
    return ParagraphTree(prompt, root, children, control, loop, *end)


@dataclass(frozen=True)
class Packed:
    """Trees in one sequence of T rows.

    Attributes:
        ids, positions: int64[1, T].
        mask: bool[1, 1, T, T], true where a row sees another one.
        labels: int64[T], the token that each row predicts, or NOTHING.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def packed(trees: Sequence[ParagraphTree]) -> Packed:
    """Pack some trees; none sees another."""
    parts = [_packed(tree) for tree in trees]
    ids, positions, labels, masks = (list(part) for part in zip(*parts, strict=True))
    mask = torch.block_diag(*masks).bool()
    return Packed(torch.cat(ids)[None], torch.cat(positions)[None], mask[None, None], torch.cat(labels))


def _packed(tree: ParagraphTree) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    first = tree.said
    ids, positions = list(first), list(range(len(first)))
    fork = tree.control.fork if tree.control else None
    labels = [*[NOTHING] * (len(tree.prompt) - 1), *tree.root]
    labels += [NOTHING] * (len(first) - len(tree.loop) - len(labels))  # where the root has no end
    labels += [tree.end if token == fork and tree.end is not None else NOTHING for token in tree.loop]
    mask = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    mask[: len(first), : len(first)] = torch.ones(len(first), len(first)).tril()
    for fork, child in zip(tree.forks, tree.children, strict=True):
        start, end = len(ids), len(ids) + len(child)
        ids += child
        positions += range(fork + 1, fork + 1 + len(child))
        labels += [*child[1:], NOTHING]  # [Child] is forced: nobody predicts it
        mask[start:end, : fork + 1] = True
        mask[start:end, start:end] = torch.ones(len(child), len(child)).tril()
    return torch.tensor(ids), torch.tensor(positions), torch.tensor(labels), mask
