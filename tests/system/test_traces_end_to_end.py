"""``get_trace`` over real processes: both formats, sums that agree, and a worker that dies in the middle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.processes import ENVIRONMENT, Program, free_port
from tests.support.serving import wait_until

LIMIT = 10
BENCHMARKS = ["vicuna_bench", "mt_bench"]


def command(controller: Program, model: str, folder: Path, *options: str) -> list[str]:
    arguments = ["--controller", controller.url, "--model", model, "--dataset", *BENCHMARKS, "--limit", str(LIMIT)]
    # One at a time: equal batches give equal bits, so that the answers of two runs can be compared without a tie rule.
    sizes = ["--max-length", "4000", "--max-tokens", "60", "--concurrency", "1"]
    return [sys.executable, "-m", "traces.get_trace", *arguments, *sizes, "--save-path", str(folder), *options]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def records(folder: Path, benchmark: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{benchmark}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(fleet: tuple[Program, Program], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    ended = run(command(fleet[0], checkpoint.name, folder, "--legacy"))
    assert ended.returncode == 0, ended.stderr
    assert "tokens/step" in ended.stdout
    return folder


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_both_formats_agree(undisturbed: Path, benchmark: str) -> None:
    native = records(undisturbed, benchmark)
    legacy = json.loads((undisturbed / f"{benchmark}.json").read_text())
    assert [entry["question_id"] for entry in native] == [entry["question_id"] for entry in legacy]
    assert len(native) == LIMIT
    for entry, old in zip(native, legacy, strict=True):
        assert len(entry["traces"]) == len(old["traces"]) == len(entry["turns"]) == len(entry["answers"])
        for answer, trace, arrays in zip(entry["answers"], entry["traces"], old["traces"], strict=True):
            tokens = [token for step in trace["steps"] for thread in step["threads"] for token in thread["token_ids"]]
            assert len(tokens) == trace["summary"]["tokens"]
            assert "".join(thread["text"] for step in trace["steps"] for thread in step["threads"]) == answer
            prompt = trace["header"]["prompt_token_ids"]
            final = arrays["ret_input_ids"][-1][0]
            assert final == (prompt + tokens)[: len(final)] and len(final) >= len(prompt + tokens) - 1
            assert set(map(len, arrays.values())) == {len(arrays["elapse"])}


def test_a_worker_that_dies_in_the_middle_costs_nothing(undisturbed: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Killed and started again on the same port; ``--resume`` finishes what the retries did not."""
    port, folder = free_port(), tmp_path / "traces"
    with processes.controller(state=tmp_path / "state.json") as controller:
        with processes.worker(checkpoint, controller.url, port=port):
            collecting = subprocess.Popen(command(controller, checkpoint.name, folder), env=ENVIRONMENT)
            wait_until(lambda: done(folder) >= 3, 120)
        assert done(folder) < 2 * LIMIT, "the worker was killed too late to matter"
        with processes.worker(checkpoint, controller.url, port=port):
            collecting.wait(300)
            resumed = run(command(controller, checkpoint.name, folder, "--resume"))
            assert resumed.returncode == 0, resumed.stderr
    for benchmark in BENCHMARKS:
        expected = [(entry["question_id"], entry["answers"]) for entry in records(undisturbed, benchmark)]
        assert [(entry["question_id"], entry["answers"]) for entry in records(folder, benchmark)] == expected


def done(folder: Path) -> int:
    files = [folder / f"{benchmark}.jsonl" for benchmark in BENCHMARKS]
    return sum(file.read_text().count("\n") for file in files if file.exists())
