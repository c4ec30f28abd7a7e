"""Tokens per step by data set and category, in Markdown."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.answers import Turn


def table(turns: Sequence[Turn], columns: Mapping[str, Sequence[Sequence[int]]]) -> Iterator[str]:
    """A line a category and one for each data set: ratios of sums.

    Args:
        turns: n answered turns.
        columns: name → for each of the n answers, the tokens of every step.
    """
    yield "| data set | category | turns | tokens | " + " | ".join(columns) + " |"
    yield "|---|---|---:|---:|" + "---:|" * len(columns)
    for dataset in dict.fromkeys(turn.dataset for turn in turns):
        categories = dict.fromkeys(turn.category for turn in turns if turn.dataset == dataset)
        for category in [*sorted(categories), None] if len(categories) > 1 else [None]:
            mine = [
                place
                for place, turn in enumerate(turns)
                if turn.dataset == dataset and category in (None, turn.category)
            ]
            tokens = sum(len(turns[place].answer.answer) for place in mine)
            shown = " | ".join(f"{_ratio([column[place] for place in mine]):.2f}" for column in columns.values())
            yield f"| {dataset} | {category or '**all**'} | {len(mine)} | {tokens} | {shown} |"


def _ratio(answers: Sequence[Sequence[int]]) -> float:
    """Tokens per step; in another number type an answer may have another length than the turn's own."""
    return sum(map(sum, answers)) / sum(map(len, answers))
