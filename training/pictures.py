"""Pictures beside trained weights."""

from collections.abc import Sequence
from pathlib import Path

MOST_POINTS = 400


def loss_curve(losses: Sequence[float], path: Path) -> None:
    """A PNG of the loss by step, each point the mean of a stretch of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stretch = max(1, len(losses) // MOST_POINTS)
    means = [
        sum(losses[start : start + stretch]) / len(losses[start : start + stretch])
        for start in range(0, len(losses), stretch)
    ]
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    axes.plot([start * stretch for start in range(len(means))], means, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
