"""Answers whose parts can be said side by side: what forks from what (APAR, Liu et al. 2024).

In an ordered list the item's titles are the first thread's, and what stands behind each title is a child's; in an
answer of paragraphs a child says all but the first sentence of each. The rules follow the published ones, but no
character of the answer is lost (joined in reading order the pieces are the answer), items begin their lines and are
numbered in order, and where no blank lines stand between items a line break ends the last one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise, zip_longest

FEWEST = 3  # children
LEAST_DETAIL, LEAST_PIECE = 10, 20  # characters of an item's detail, and of a paragraph's pieces

_ITEM = re.compile(r"^[ \t]*(\d+)\.[ \t]+[^\n:：]+[:：](?:\*\*)?", re.MULTILINE)
_INNER_ITEM = re.compile(r"\n\s*\d+\.\s+")
_SENTENCE_END = re.compile(r"\. |。")
_TITLE = re.compile(r"\b(mr|mrs|dr)\.", re.IGNORECASE)
_NOT_LATIN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_STAY = re.compile(r"```|\$\$|[><=]|---|http")  # answers with these are no structured ones
_UNSTRUCTURED = re.compile(r"```|<.*?>|\$|=|---|\d\d+ *[+x*×÷] *\d\d+")


@dataclass(frozen=True)
class Structured:
    """An answer of which parts fork.

    Attributes:
        pieces: n + 1 texts of the first thread; it forks behind each but the last.
        details: n texts, one of each child.
        cut: whether the answer was cut: what is said last has no end.
        loop: pieces that a model said behind these, each once more; it should have ended behind each of them.
    """

    pieces: tuple[str, ...]
    details: tuple[str, ...]
    cut: bool = False
    loop: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """In reading order."""
        return "".join(chain.from_iterable(zip_longest(self.pieces, self.details, fillvalue="")))


def structure(answer: str, *, cut: bool = False) -> Structured | None:
    """What of an answer forks; None if it has no structure that the rules know."""
    if _NOT_LATIN.search(answer) or _STAY.search(answer):
        return None
    found = _ordered_list(answer) or _paragraphs(answer)
    return replace(found, cut=cut) if found else None


def is_unstructured(answer: str) -> bool:
    """Whether an answer is one from which not to fork is learned: code, formulas, tables, calculations."""
    return bool(_UNSTRUCTURED.search(answer))


def _ordered_list(answer: str) -> Structured | None:
    items = list(_ITEM.finditer(answer))
    numbers = [int(item[1]) for item in items]
    if len(items) < FEWEST or numbers != list(range(numbers[0], numbers[0] + len(items))):
        return None
    gap = "\n\n" if all("\n\n" in answer[item.end() : after.start()] for item, after in pairwise(items)) else "\n"
    last = answer.find(gap, items[-1].end())
    ends = [*(after.start() for after in items[1:]), len(answer) if last < 0 else last]
    details = [answer[item.end() : end].rstrip("\n") for item, end in zip(items, ends, strict=True)]
    if any(len(detail) < LEAST_DETAIL or _INNER_ITEM.search(detail) for detail in details):
        return None
    return _cut(answer, [(item.end(), len(detail)) for item, detail in zip(items, details, strict=True)])


def _paragraphs(answer: str) -> Structured | None:
    if _TITLE.search(answer):
        return None
    spans: list[tuple[int, int]] = []
    paragraphs = list(_parts(answer))
    for start, paragraph in paragraphs:
        first = _SENTENCE_END.search(paragraph)
        border = first.start() + 1 if first else len(paragraph)
        if border < LEAST_PIECE or 0 < len(paragraph) - border < LEAST_PIECE:
            return None
        if border < len(paragraph):
            spans.append((start + border, len(paragraph) - border))
    return _cut(answer, spans) if len(paragraphs) > 2 and len(spans) >= FEWEST else None


def _parts(answer: str) -> Iterator[tuple[int, str]]:
    """Paragraphs and where they start."""
    start = 0
    for part in answer.rstrip().split("\n\n"):
        yield start, part
        start += len(part) + 2


def _cut(answer: str, spans: list[tuple[int, int]]) -> Structured:
    """An answer of which spans (start, length) are the details."""
    borders = [(0, 0), *spans, (len(answer), 0)]
    pieces = tuple(answer[start + length : after] for (start, length), (after, _) in pairwise(borders))
    return Structured(pieces, tuple(answer[start : start + length] for start, length in spans))
