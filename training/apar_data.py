"""APAR's data sets in the published formats, from any chats; and the reader of such files.

``apar.json`` holds every path of every tree (``<id>_main`` and ``<id>_<child>``), ``apar_flatten.json`` the same
answers as they read, ``unstructured.json`` conversations from which not to fork is learned.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.cut_conversations import messages_of, read_entries
from training.structure import Structured, is_unstructured, structure

FORK, CHILD = "[SplitMask]", "[SplitSop]"  # in files, whatever a model calls them
_NUMBERED = re.compile(r"\s*\d+\.\s+[^\n:]+:")
GRAM = 6  # words
MOST_REPEATED = 0.15  # of an answer's word sequences


@dataclass(frozen=True)
class Chat:
    """The first turn of a conversation.

    Attributes:
        cut: whether the answer has no end.
        own: whether it is an answer of the model that is to learn.
    """

    index: str
    prompt: str
    answer: str
    cut: bool = False
    own: bool = False


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer; without details the answer does not fork."""

    index: str
    prompt: str
    answer: Structured


def sorted_out(chats: Iterable[Chat]) -> tuple[list[Sample], list[Sample]]:
    """Answers that fork, and those from which not to fork is learned; others are left out.

    The latter are code, formulas and the like, as published, and whatever of the model's own answers has no structure:
    it is to go on answering as it did. An answer that says the same again and again counts up to there.
    """
    structured: list[Sample] = []
    unstructured: list[Sample] = []
    for chat in chats:
        fresh = before_repetition(chat.answer)
        cut = chat.cut or fresh != chat.answer
        found = structure(fresh, cut=cut)
        if found and not is_repetitive(found):
            structured.append(Sample(chat.index, chat.prompt, found))
        elif not found and fresh.strip() and (is_unstructured(fresh) or chat.own):
            unstructured.append(Sample(chat.index, chat.prompt, Structured((fresh,), (), cut)))
    return structured, unstructured


def told_apart(chats: Iterable[Chat]) -> Iterator[Chat]:
    """Chats with an index each has alone: files may repeat theirs."""
    seen: set[str] = set()
    for number, chat in enumerate(chats):
        yield replace(chat, index=f"{chat.index}x{number}") if chat.index in seen else chat
        seen.add(chat.index)


def before_repetition(text: str) -> str:
    """A text that repeats itself, up to the sentence in which it begins to; any other text as it is."""
    if repetition(text) <= MOST_REPEATED:
        return text
    words = list(re.finditer(r"\S+", text.lower()))
    seen: set[tuple[str, ...]] = set()
    for place in range(len(words) - GRAM + 1):
        gram = tuple(word.group() for word in words[place : place + GRAM])
        if gram in seen:
            return whole_sentences(text[: words[place].start()])
        seen.add(gram)
    return text


def whole_sentences(text: str) -> str:
    """A text without the sentence or line in which it was cut."""
    return text[: max(text.rfind(". ") + 1, text.rfind("\n"), 0)].rstrip()


def is_repetitive(answer: Structured) -> bool:
    """Whether a heading occurs twice, or the answer says the same again and again."""
    headings = [heading_of(piece) for piece in answer.pieces[:-1]]
    return len(set(headings)) < len(headings) or repetition(answer.text) > MOST_REPEATED


def repeated_headings(text: str) -> int:
    """How many titles of numbered items stand in ``text`` for the second time or more."""
    titles = [heading_of(line.partition(":")[0]) for line in text.splitlines() if _NUMBERED.match(line)]
    return len(titles) - len(set(titles))


def heading_of(piece: str) -> str:
    """The title of an item, without its number."""
    return " ".join(re.findall(r"[^\W\d]+", piece.rstrip().rpartition("\n")[2].lower()))


def repetition(text: str) -> float:
    """The share of sequences of GRAM words that have occurred before."""
    words = text.lower().split()
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def write_data(structured: Sequence[Sample], unstructured: Sequence[Sample], folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    flattened = [{"index": one.index, "input": one.prompt, "target": one.answer.text} for one in structured]
    chats = [
        {
            "id": one.index,
            "conversations": [{"from": "human", "value": one.prompt}, {"from": "gpt", "value": one.answer.text}],
            **_cut(one),
        }
        for one in unstructured
    ]
    rows = [row for one in structured for row in rows_of(one)]
    for name, content in (("apar", rows), ("apar_flatten", flattened), ("unstructured", chats)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


def _cut(sample: Sample) -> dict[str, bool]:
    """A key of our own, which others do not read, like a tree's loop."""
    return {"cut": True} if sample.answer.cut else {}


def rows_of(sample: Sample) -> Iterator[dict[str, Any]]:
    """The published rows of a tree: its paths."""
    pieces, details = sample.answer.pieces, sample.answer.details
    main = {"index": f"{sample.index}_main", "input": sample.prompt, "target": FORK.join(pieces), **_cut(sample)}
    yield main | ({"loop": FORK.join(sample.answer.loop)} if sample.answer.loop else {})
    for child, detail in enumerate(details):
        target = FORK.join(pieces[: child + 1]) + FORK + CHILD + detail
        yield {"index": f"{sample.index}_{child}", "input": sample.prompt, "target": target}


def read_trees(path: Path) -> list[Sample]:
    """Trees of a file like ``apar.json``.

    Raises:
        ValueError: it is none, or a tree lacks paths.
    """
    mains: dict[str, Mapping[str, Any]] = {}
    details: dict[str, dict[int, str]] = {}
    try:
        for row in json.loads(path.read_text("utf-8")):
            tree, _, part = row["index"].rpartition("_")
            if part == "main":
                mains[tree] = row
            else:
                details.setdefault(tree, {})[int(part)] = row["target"].rpartition(CHILD)[2]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not rows of index, input and target: {error!r}") from None
    return [_tree(path, tree, row, details.get(tree, {})) for tree, row in mains.items()]


def _tree(path: Path, index: str, row: Mapping[str, Any], details: Mapping[int, str]) -> Sample:
    pieces = tuple(row["target"].split(FORK))
    if sorted(details) != list(range(len(pieces) - 1)):
        raise ValueError(f"{path}: {index} forks {len(pieces) - 1} times and has the paths {sorted(details)}")
    told = tuple(details[child] for child in sorted(details))
    loop = tuple(row["loop"].split(FORK)) if "loop" in row else ()
    return Sample(index, row["input"], Structured(pieces, told, row.get("cut", False), loop))


def read_plain(path: Path) -> list[Sample]:
    """First turns of a file of conversations, as answers that do not fork. Raises ValueError."""
    return [Sample(chat.index, chat.prompt, Structured((chat.answer,), (), chat.cut)) for chat in read_chats(path)]


def read_chats(path: Path) -> Iterator[Chat]:
    """The first turn of each chat: conversations as published, or prompt and answer.

    Raises:
        ValueError: an entry is neither.
    """
    for number, entry in enumerate(read_entries(path)):
        index = str(entry.get("id", f"{path.stem}{number}")) if isinstance(entry, dict) else ""
        if isinstance(entry, dict) and {"prompt", "answer"} <= entry.keys():
            yield Chat(index, entry["prompt"], entry["answer"])
            continue
        turns = [turn for turn in messages_of(entry, path) if turn.role != "system"]
        if [turn.role for turn in turns[:2]] == ["user", "assistant"]:
            yield Chat(index, turns[0].content, turns[1].content, cut=entry.get("cut", False))
