"""The text of an answer whose threads were decoded side by side, in reading order (APAR, Liu et al. 2024).

A thread's tokens between two forks are a *span*. In reading order a span is followed by all that its child thread says,
then by the parent's next span. Text is given out as soon as nothing can be inserted before it, so it only ever grows
at its end.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Whitespace = Literal["plain", "published"]

_NUMBERED = re.compile(r"\d+\. ")


@dataclass
class _Span:
    """What a thread says between two forks.

    Attributes:
        text: all of it so far. taken: how much of it was given out.
        items: what came with the text and was not given out.
        closed: nothing is added any more. forked: because the thread forked here.
        border: what it is to the span before it.
    """

    thread: int
    border: Literal["start", "detail", "next"]
    text: str = ""
    taken: int = 0
    items: list[Any] = field(default_factory=list)
    closed: bool = False
    forked: bool = False


class ReadingOrder:
    """The spans of one answer. It begins with thread 0."""

    def __init__(self, whitespace: Whitespace = "plain") -> None:
        """``published``: line breaks at forks are set as APAR's own code does, whose checkpoints never learned them."""
        self._whitespace = whitespace
        self._spans = [_Span(0, "start")]
        self._front = 0  # the first span that may still grow, or the last one
        self._joiner = _Joiner(whitespace)

    def push(self, thread: int, text: str, items: Iterable[Any] = ()) -> None:
        """A thread says more."""
        span = self._spans[self._open(thread)]
        span.text += text
        span.items += items

    def fork(self, parent: int, child: int) -> None:
        """``child``'s text stands behind what ``parent`` has said, and what ``parent`` says next behind that."""
        place = self._open(parent)
        self._spans[place].closed = self._spans[place].forked = True
        self._spans[place + 1 : place + 1] = [_Span(child, "detail"), _Span(parent, "next")]

    def finish(self, thread: int) -> None:
        """A thread has said all."""
        self._spans[self._open(thread)].closed = True

    def cut(self, thread: int) -> set[int]:
        """The answer ends behind what ``thread`` has said: drop all that follows.

        Returns:
            The threads that were saying what follows.
        """
        place = self._open(thread)
        dropped = {span.thread for span in self._spans[place + 1 :] if not span.closed}
        del self._spans[place + 1 :]
        return dropped

    def take(self) -> list[tuple[str, list[Any]]]:
        """The text that became final since the last call and what came with it, span by span."""
        taken = []
        while True:
            span = self._spans[self._front]
            text = self._joiner.text(span.text[span.taken :])
            span.taken = len(span.text)
            if span.closed and not span.forked:
                text += self._joiner.end()
            taken.append((text, span.items))
            span.items = []
            if not span.closed or self._front + 1 == len(self._spans):
                return taken
            self._front += 1
            self._joiner.enter(self._spans[self._front].border, span.text)

    def snapshot(self) -> str:
        """All that was said so far by all threads, in reading order."""
        joiner = _Joiner(self._whitespace)
        text = before = ""
        for span in self._spans:
            joiner.enter(span.border, before)
            text += joiner.text(span.text) + ("" if span.forked else joiner.end())
            before = span.text
        return text

    def _open(self, thread: int) -> int:
        """The place of a thread's growing span."""
        return next(place for place, span in enumerate(self._spans) if span.thread == thread and not span.closed)


class _Joiner:
    """Sets what stands between spans.

    In APAR's text a detail begins on a line of its own if its title is numbered, and what follows a detail stands
    behind a blank line; line breaks that are there already count.
    """

    def __init__(self, whitespace: Whitespace) -> None:
        self._published = whitespace == "published"
        self._wanted = ""  # line breaks that the next text must begin with
        self._least = 0  # how many of them decide; fewer are replaced
        self._held = ""

    def enter(self, border: str, before: str) -> None:
        """A span begins; ``before`` is the text of the span in front of it."""
        if not self._published or (border == "detail" and self._least):
            return
        if border == "detail" and _NUMBERED.search(before):
            self._wanted, self._least = "\n", 1
        elif border == "next":
            self._wanted, self._least = "\n\n", 2

    def text(self, text: str) -> str:
        """More of the span; what is not decided yet is held back."""
        if not self._least:
            return text
        self._held += text
        breaks = len(self._held) - len(self._held.lstrip("\n"))
        if breaks < self._least and breaks == len(self._held):
            return ""
        return self.end() if breaks < self._least else self._release("")

    def end(self) -> str:
        """A thread ended: what was held back is decided."""
        if not self._least:
            return ""
        self._held = self._held.lstrip("\n")
        return self._release(self._wanted)

    def _release(self, breaks: str) -> str:
        released, self._held, self._least = breaks + self._held, "", 0
        return released
