"""Text of threads in reading order: it grows at its end alone, and its line breaks are those of APAR's own code."""

import re
from dataclasses import dataclass
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from protocol.reading_order import ReadingOrder, Whitespace


@dataclass
class Node:
    """APAR's tree: what a thread says, what its child says in detail, what follows."""

    thread: int
    own: str = ""
    detail: "Node | None" = None
    next: "Node | None" = None


def flattened(node: Node) -> str:
    """As APAR's code does it, from the whole tree."""
    if not node.detail or not node.next:
        return node.own
    detail, following = flattened(node.detail), flattened(node.next)
    if not detail.startswith("\n"):
        detail = ("\n" if re.search(r"\d+\. ", node.own) else "") + detail.lstrip("\n")
    if not following.startswith("\n\n"):
        following = "\n\n" + following.lstrip("\n")
    return node.own + detail + following


def plain(node: Node) -> str:
    return node.own + "".join(plain(part) for part in (node.detail, node.next) if part)


words = st.sampled_from(["1. a", "b:", "\n", "\n\n", "\n\n\nc", " d", "2. e "])


@given(
    st.lists(words, min_size=1, max_size=40), st.randoms(use_true_random=False), st.sampled_from(["plain", "published"])
)
def test_text_grows_at_its_end_to_what_the_tree_says(texts: list[str], draws: Random, whitespace: Whitespace) -> None:
    order, root, shown = ReadingOrder(whitespace), Node(0), ""
    growing = {0: root}
    for text in texts:
        thread = draws.choice(sorted(growing))
        node = growing[thread]
        order.push(thread, text)
        node.own += text
        if draws.random() < 0.4:
            child = max(growing) + 1
            order.fork(thread, child)
            node.detail, node.next = Node(child), Node(thread)
            growing[thread], growing[child] = node.next, node.detail
            for number in (thread, child):  # neither forks before it has said something
                growing[number].own = draws.choice(["x", "\n"])
                order.push(number, growing[number].own)
        shown += text_of(order)
    for thread in growing:
        order.finish(thread)
    expected = plain(root) if whitespace == "plain" else flattened(root)
    assert order.snapshot() == expected
    assert shown + text_of(order) == expected


def text_of(order: ReadingOrder) -> str:
    return "".join(text for text, _ in order.take())


def test_a_cut_ends_what_follows_it() -> None:
    order = ReadingOrder()
    order.push(0, "a")
    order.fork(0, 1)
    order.push(0, "c")
    order.push(1, "b")
    order.fork(0, 2)
    order.push(2, "d")
    assert order.cut(1) == {0, 2}
    order.finish(1)
    assert text_of(order) == "ab"


def test_what_came_with_a_text_comes_when_it_is_read() -> None:
    order = ReadingOrder()
    order.push(0, "a", [1])
    order.fork(0, 1)
    order.push(0, "c", [3])
    assert order.take() == [("a", [1]), ("", [])]
    order.push(1, "b", [2])
    order.finish(1)
    order.finish(0)
    assert order.take() == [("b", [2]), ("c", [3])]
