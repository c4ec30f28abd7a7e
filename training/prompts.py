"""Training prompts, and that none of them is a benchmark's. ``python -m training.prompts`` checks a file.

A file of prompts is JSONL with a ``prompt`` a line. A prompt counts as a benchmark's if its words are equal to a
question's, or if both share 13 words in a row (the rule of GPT-3's and later decontaminations).
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated

import typer

GRAM = 13
LONGEST = 1200  # characters of a prompt to train on


class Benchmarks:
    """What must not be trained on."""

    def __init__(self, questions: Iterable[str]) -> None:
        texts = [words(question) for question in questions]
        self._whole = set(texts)
        self._grams = {gram for text in texts for gram in grams(text)}

    def holds(self, prompt: str) -> bool:
        """Whether ``prompt`` is a question, or shares 13 words in a row with one."""
        text = words(prompt)
        return text in self._whole or not self._grams.isdisjoint(grams(text))


def words(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


def grams(text: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All GRAM words in a row."""
    return (text[start : start + GRAM] for start in range(len(text) - GRAM + 1))


def load_prompts(
    path: Path, benchmarks: Benchmarks, *, count: int | None, seed: int, longest: int = LONGEST
) -> list[str]:
    """Distinct prompts of at most ``longest`` characters, in random order, none a benchmark's; at most ``count``.

    Raises:
        OSError, ValueError: the file cannot be read, or a line has no prompt.
    """
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    if any(not isinstance(line, dict) or not isinstance(line.get("prompt"), str) for line in lines):
        raise ValueError(f"{path}: every line must be an object with a prompt")
    prompts = list(dict.fromkeys(line["prompt"] for line in lines if len(line["prompt"]) <= longest))
    Random(seed).shuffle(prompts)
    kept = [prompt for prompt in prompts if not benchmarks.holds(prompt)]
    return kept[:count]


def read_questions(paths: Iterable[Path]) -> Iterator[str]:
    """Every text of benchmark files, whatever their lines call it: turns, prompt, instruction, question."""
    for path in paths:
        for line in path.read_text("utf-8").split("\n"):
            if line.strip():
                fields = json.loads(line)
                yield from fields.get("turns", [])
                yield from (fields[key] for key in ("prompt", "instruction", "question") if key in fields)


def benchmarks_of(paths: Iterable[Path] | None) -> Benchmarks:
    """What trainers leave out, by the files that they were told to avoid."""
    return Benchmarks(read_questions(paths or []))


def main(
    prompts: Annotated[Path, typer.Argument(help="JSONL with a prompt a line")],
    avoid: Annotated[list[Path], typer.Option(help="benchmark files")],
) -> None:
    """Count the prompts that are a benchmark's, or nearly; trainers leave them out."""
    benchmarks = benchmarks_of(avoid)
    everything = Benchmarks([])
    found = load_prompts(prompts, everything, count=None, seed=0, longest=1 << 30)
    held = [prompt for prompt in found if benchmarks.holds(prompt)]
    print(f"{len(found)} prompts, {len(held)} of them a benchmark's or sharing {GRAM} words in a row with one")
    for prompt in held[:10]:
        print(f"  {' '.join(prompt.split())[:100]}")


if __name__ == "__main__":
    typer.run(main)
