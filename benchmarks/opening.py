"""How the benchmarks of methods begin: a quiet engine with its decoder compiled, and the questions' vanilla answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks.answers import Turn, vanilla_answers
from benchmarks.settings import Setting
from traces.datasets import load_datasets
from training.answers import TOGETHER
from workers.engine import Engine
from workers.warm_up import WarmUp

KV_TOKENS = 65536


@contextmanager
def answered(
    settings: Sequence[Setting],
    datasets: str,
    per_category: int | None,
    model_path: str,
    new_tokens: int,
    answers: Path,
    *,
    tune: bool = False,
    dtype: str | None = None,
) -> Iterator[tuple[Engine, list[Turn]]]:
    """An engine that serves the settings' methods, and every turn with its answer.

    Args:
        datasets: names or files, separated by commas; ``per_category`` questions of each category, None for all.
        answers: the file in which answers of ``new_tokens`` are kept.
        tune: measure the latency curve and let the tuner choose what the settings leave open.
        dtype: of the engine; the answers are those of the model in its usual type.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    asked = [dataset.sample(per_category) for dataset in load_datasets(datasets.split(","))]
    methods = [setting.method for setting in settings]
    if dtype:
        with answered(settings, datasets, per_category, model_path, new_tokens, answers):
            pass
    with Engine.load(
        model_path, method=methods, kv_tokens=KV_TOKENS, max_requests=TOGETHER, tune=tune, dtype=dtype
    ) as engine:
        WarmUp(engine, model_path, measure=tune).wait()
        yield engine, vanilla_answers(engine, asked, new_tokens, answers)
