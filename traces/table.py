"""The table at the end of a run."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from traces.metrics import Figures, by_category

Rows = dict[str, list[tuple[str, Figures]]]  # per data set: (category, figures) of each answered question


def summary_table(rows: Rows) -> Table:
    """Per data set its total, then its categories."""
    caption = "tokens/step is a ratio of sums; tokens/s is the speed of one stream"
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in ("answered", "tokens", "steps", "tokens/step", "tokens/s", "acceptance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for dataset, pairs in rows.items():
        total = sum((figures for _, figures in pairs), Figures())
        table.add_row(dataset, *_cells(total), style="bold")
        for category, figures in by_category(pairs).items():
            table.add_row(f"  {category}", *_cells(figures))
        table.add_section()
    return table


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        str(figures.questions),
        str(figures.tokens),
        str(figures.steps),
        f"{figures.tokens_per_step:.2f}",
        f"{figures.tokens_per_s:.1f}",
        f"{figures.mean_acceptance_length:.2f}",
    )
