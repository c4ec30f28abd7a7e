"""Pictures beside trained weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

MOST_POINTS = 400


@contextmanager
def _axes(path: Path, across: str, up: str) -> Iterator[Any]:
    """Axes to draw on; saved as a PNG behind the block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    yield axes
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def loss_curve(losses: Sequence[float], path: Path) -> None:
    """The loss by step, each point the mean of a stretch of steps."""
    stretch = max(1, len(losses) // MOST_POINTS)
    means = [fmean(losses[start : start + stretch]) for start in range(0, len(losses), stretch)]
    with _axes(path, "step", "loss") as axes:
        axes.plot([start * stretch for start in range(len(means))], means, linewidth=1)


def accuracy_picture(measured: Sequence[Sequence[float]], path: Path, whose: str) -> None:
    """How often a head's guess is right, by rank: the share that is right among its first guesses."""
    with _axes(path, "guesses", "right among them") as axes:
        for head, ranks in enumerate(measured):
            shares = [sum(ranks[:count]) for count in range(1, len(ranks) + 1)]
            axes.plot(range(1, len(ranks) + 1), shares, marker=".", label=f"{whose} {head}")
        axes.set_ylim(0, 1)
        axes.legend()


def bar_picture(places: Sequence[int], counts: Sequence[int], name: str, path: Path) -> None:
    """How often each number occurs."""
    with _axes(path, name, "count") as axes:
        axes.bar(places, counts)


def lines_picture(across: Sequence[int], lines: Mapping[str, Sequence[float]], name: str, path: Path) -> None:
    """Named lines over common places, each beside 1."""
    with _axes(path, name, "beside one row") as axes:
        for label, values in lines.items():
            axes.plot(across, values, marker=".", label=label)
        axes.set_ylim(bottom=0)
        axes.legend()
