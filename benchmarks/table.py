"""Tokens per step by data set and category, in Markdown."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.answers import Turn


def table(turns: Sequence[Turn], steps: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """A line a category and one for each data set: ratios of sums.

    Args:
        turns: n answered turns.
        steps: column → the steps that each of the n answers took.
    """
    yield "| data set | category | turns | tokens | " + " | ".join(steps) + " |"
    yield "|---|---|---:|---:|" + "---:|" * len(steps)
    for dataset in dict.fromkeys(turn.dataset for turn in turns):
        categories = dict.fromkeys(turn.category for turn in turns if turn.dataset == dataset)
        for category in [*sorted(categories), None] if len(categories) > 1 else [None]:
            mine = [
                place
                for place, turn in enumerate(turns)
                if turn.dataset == dataset and category in (None, turn.category)
            ]
            tokens = sum(len(turns[place].answer.answer) for place in mine)
            shown = " | ".join(f"{tokens / sum(taken[place] for place in mine):.2f}" for taken in steps.values())
            yield f"| {dataset} | {category or '**all**'} | {len(mine)} | {tokens} | {shown} |"
