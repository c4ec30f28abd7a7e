"""``python -m traces.get_trace``: the step traces of a model over benchmark questions."""

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from protocol.client import ControllerClient
from protocol.errors import RequestError
from traces.collect import Collector, Job
from traces.datasets import BUNDLED, DatasetError, load_datasets
from traces.legacy import legacy_path, write_legacy
from traces.metrics import figures_of
from traces.results import Record, ResultError, ResultFile, is_finished
from traces.settings import RunSettings
from traces.table import Rows, summary_table

STREAMS_PER_WORKER = 4  # a worker batches its requests: a few at a time keep it busy without long queues


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; argparse, because one ``--dataset`` may be followed by several names, as APAR's did."""
    parser = argparse.ArgumentParser(
        prog="python -m traces.get_trace", description="Collect the step traces of a model over benchmark questions."
    )
    known = ", ".join(BUNDLED)
    parser.add_argument("--controller", required=True, metavar="URL", help="address of the controller")
    parser.add_argument("--model", required=True, help="model name as /v1/models lists it")
    parser.add_argument("--method", help="decoding method (default: the model name's own)")
    parser.add_argument(
        "--dataset", required=True, nargs="+", action="extend", help=f"{known}, or paths of JSONL files of that form"
    )
    parser.add_argument("--save-path", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--max-length", type=_positive, default=2048, help="tokens of prompt and answer (%(default)s)")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="tokens of one answer (as many as fit)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N questions of each data set")
    parser.add_argument("--concurrency", type=_positive, metavar="N", help="questions at a time (4 for each worker)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the draws where the temperature is above 0")
    parser.add_argument("--resume", action="store_true", help="ask only the questions that are missing or failed")
    parser.add_argument("--legacy", action="store_true", help="also write APAR's <dataset>.json")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


class GetTrace:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self._arguments = arguments
        self._console = console
        self._settings = RunSettings(
            model=arguments.model,
            max_length=arguments.max_length,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            method=arguments.method,
            prompt_ids=arguments.legacy,
        )
        self._datasets = load_datasets(arguments.dataset)
        self._results = {dataset.name: ResultFile(arguments.save_path, dataset) for dataset in self._datasets}

    async def run(self) -> int:
        """Do it; the exit code.

        Raises:
            ResultError, RequestError: nothing could be started.
        """
        jobs = self._jobs()
        started = time.monotonic()
        failed = await self._collect(jobs) if jobs else 0
        self._finish_files()
        self._console.print(summary_table(self._rows()))
        if jobs:
            seconds = time.monotonic() - started
            self._say(f"{len(jobs) - failed} questions in {seconds:.1f} s → {self._arguments.save_path}")
        if failed:
            self._say(f"{failed} of {len(jobs)} questions failed: run again with --resume to ask them again")
        return 1 if failed else 0

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def _jobs(self) -> list[Job]:
        """What is still to be asked."""
        if not self._arguments.resume:
            self._refuse_existing()
        jobs = []
        for dataset in self._datasets:
            results = self._results[dataset.name]
            done = results.restore(self._settings)
            chosen = dataset.questions[: self._arguments.limit]
            jobs += [Job(question, results) for question in chosen if question.question_id not in done]
        return jobs

    def _refuse_existing(self) -> None:
        for results in self._results.values():
            for path in (results.path, legacy_path(results)):
                if path.exists():
                    raise ResultError(f"{path} exists: add --resume to continue it, or choose another --save-path")

    async def _collect(self, jobs: list[Job]) -> int:
        """Ask the questions behind a progress bar; how many failed."""
        failed = 0
        async with ControllerClient(self._arguments.controller) as client:
            workers = await self._workers(client)
            concurrency = self._arguments.concurrency or STREAMS_PER_WORKER * workers
            with _progress(self._console) as progress:
                bars = {
                    path: progress.add_task(path.stem, total=sum(job.results.path == path for job in jobs))
                    for path in dict.fromkeys(job.results.path for job in jobs)
                }

                def finished(job: Job, record: Record) -> None:
                    nonlocal failed
                    progress.advance(bars[job.results.path])
                    failed += "error" in record
                    if said := record.get("error") or record.get("left_out"):
                        name = f"{job.results.path.stem} question {record['question_id']}"
                        style = "red" if "error" in record else "yellow"
                        progress.console.print(f"{name}: {said}", style=style, markup=False, soft_wrap=True)

                await Collector(client, self._settings).run(jobs, concurrency, finished)
        return failed

    async def _workers(self, client: ControllerClient) -> int:
        """How many workers serve the model; ResultError if none does."""
        count = await client.worker_count(self._settings.model)
        if count == 0:
            names = ", ".join(card.id for card in await client.models()) or "none"
            raise ResultError(f"no worker serves {self._settings.model!r}; models with a worker: {names}")
        return count

    def _finish_files(self) -> None:
        for results in self._results.values():
            results.sort()
            if self._arguments.legacy:
                write_legacy(results)

    def _rows(self) -> Rows:
        return {
            name: [(record.get("category", ""), figures_of(record)) for record in results if is_finished(record)]
            for name, results in self._results.items()
        }


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def main(argv: list[str] | None = None) -> NoReturn:
    """The command: 0 all answered, 1 some failed or nothing could be asked, 130 interrupted."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(asyncio.run(GetTrace(arguments, Console()).run()))
    except (DatasetError, ResultError, RequestError, OSError) as error:
        sys.exit(f"get_trace: {error}")
    except KeyboardInterrupt:
        print("get_trace: interrupted; run again with --resume to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
