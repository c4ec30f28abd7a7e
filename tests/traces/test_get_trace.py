import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ErrorCode, RequestError
from protocol.trace import RequestTrace
from tests.support.serving import wait_until
from tests.support.stub_controller import PROMPT_IDS, Behaviour, StubController, last_question, no_worker
from traces import collect
from traces.get_trace import main, parse_arguments


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect.Collector.__init__, "__defaults__", ((0.01, 0.01),))


def _arguments(stub: StubController, questions: Path, *more: str) -> list[str]:
    folder = str(questions.parent / "out")
    return ["--controller", stub.url, "--model", "stub", "--dataset", str(questions), "--save-path", folder, *more]


def _run(stub: StubController, questions: Path, *more: str) -> int | str | None:
    with pytest.raises(SystemExit) as exit_:
        main(_arguments(stub, questions, *more))
    return exit_.value.code


def _records(questions: Path) -> list[dict[str, Any]]:
    path = questions.parent / "out" / "small.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_option_takes_several_data_sets_and_may_repeat() -> None:
    words = "--controller u --model m --save-path d --dataset vicuna_bench mt_bench --dataset own.jsonl"
    assert parse_arguments(words.split()).dataset == ["vicuna_bench", "mt_bench", "own.jsonl"]


def test_results_are_in_the_order_of_the_questions(stub: StubController, questions: Path) -> None:
    slow_first = {"q1": 40, "q2": 20}
    stub.behave = lambda body: Behaviour(tokens=["x "] * slow_first.get(last_question(body), 2))
    assert _run(stub, questions) == 0
    records = _records(questions)
    assert [record["question_id"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert list(records[0]) == [
        "question_id", "category", "turns", "note", "model", "parameters", "answers", "traces"
    ]  # fmt: skip
    for record in records:
        for answer, trace in zip(record["answers"], map(RequestTrace.model_validate, record["traces"]), strict=True):
            chosen = [thread for step in trace.steps for thread in step.threads]
            assert "".join(thread.text for thread in chosen) == answer
            assert sum(len(thread.token_ids) for thread in chosen) == trace.summary.tokens


def test_the_second_turn_knows_the_first(stub: StubController, questions: Path) -> None:
    _run(stub, questions)
    (request,) = [body for body in stub.requests if last_question(body) == "again 4"]
    assert [message["content"] for message in request["messages"]] == ["q4", "An answer of five tokens.", "again 4"]
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "user"]


def test_parameters_are_sent(stub: StubController, questions: Path) -> None:
    stub.models["stub"].append("ngram")
    _run(stub, questions, "--method", "ngram", "--seed", "7", "--temperature", "0.5", "--max-length", "99")
    expected = {"method": "ngram", "seed": 7, "temperature": 0.5, "max_length": 99, "trace": True}
    assert stub.requests[0].items() >= expected.items()
    assert _records(questions)[0]["method"] == "ngram"


def test_limit_takes_the_first_questions_of_each_set(stub: StubController, questions: Path) -> None:
    out = questions.parent / "out"
    arguments = _arguments(stub, questions, "--limit", "2", "--dataset", "vicuna_bench", "mt_bench")
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert {path.name: len(path.read_text().splitlines()) for path in out.iterdir()} == {
        "small.jsonl": 2,
        "vicuna_bench.jsonl": 2,
        "mt_bench.jsonl": 2,
    }


def test_legacy_export_is_aligned_with_the_native_one(stub: StubController, questions: Path) -> None:
    assert _run(stub, questions, "--legacy") == 0
    path = questions.parent / "out" / "small.json"
    legacy = json.loads(path.read_text())
    assert path.read_text() == json.dumps(legacy, ensure_ascii=False, indent=4)
    natives = _records(questions)
    assert [list(item) for item in legacy] == [["question_id", "category", "turns", "note", "model", "traces"]] * 6
    for item, native in zip(legacy, natives, strict=True):
        for old, new in zip(item["traces"], native["traces"], strict=True):
            ids = [id_ for step in new["steps"][:-1] for thread in step["threads"] for id_ in thread["token_ids"]]
            assert old["ret_input_ids"][-1][0] == PROMPT_IDS + ids  # the final EOS forward leaves no snapshot
            lengths = {len(old[key]) for key in old}
            assert lengths == {len(new["steps"]) - 1}


def test_a_failing_question_does_not_end_the_run(
    stub: StubController, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = Behaviour(refuse=RequestError(ErrorCode.PARAM_OUT_OF_RANGE, "too long"))
    stub.behave = lambda body: refusal if last_question(body) == "again 5" else Behaviour()
    assert _run(stub, questions) == 1
    printed = capsys.readouterr().out
    assert "small question 5: too long" in printed
    assert "1 of 6 questions failed: run again with --resume" in printed
    records = _records(questions)
    assert [record.get("error") for record in records] == [None] * 4 + ["too long", None]

    stub.behave, stub.requests = (lambda body: Behaviour()), []
    assert _run(stub, questions, "--resume") == 0
    assert [last_question(body) for body in stub.requests] == ["q5", "again 5"]
    assert [record["question_id"] for record in _records(questions)] == [1, 2, 3, 4, 5, 6]
    assert not any("error" in record for record in _records(questions))


def test_a_turn_that_does_not_fit_is_left_out(
    stub: StubController, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = Behaviour(refuse=RequestError(ErrorCode.CONTEXT_OVERFLOW, "no room"))
    stub.behave = lambda body: full if last_question(body) in ("again 5", "q2") else Behaviour()
    assert _run(stub, questions) == 1
    printed = capsys.readouterr().out
    assert "small question 5: no room" in printed
    assert "1 of 6 questions failed" in printed  # the one whose first turn does not fit
    assert [record.get("left_out") for record in _records(questions)] == [None] * 4 + ["no room", None]
    stub.requests = []
    _run(stub, questions, "--resume")
    assert [last_question(body) for body in stub.requests] == ["q2"]


def test_questions_wait_for_a_worker_that_comes_back(stub: StubController, questions: Path) -> None:
    asked: Counter[str] = Counter()

    def behave(body: dict[str, Any]) -> Behaviour:
        asked[last_question(body)] += 1
        first = {"q1": no_worker(), "q2": Behaviour(cut_after=1)}.get(last_question(body), Behaviour())
        return first if asked[last_question(body)] == 1 else Behaviour()

    stub.behave = behave
    assert _run(stub, questions) == 0
    assert (asked["q1"], asked["q2"], asked["q3"]) == (2, 2, 1)


def test_a_worker_that_stays_away_is_given_up(stub: StubController, questions: Path) -> None:
    stub.behave = lambda body: no_worker()
    assert _run(stub, questions) == 1
    assert len(stub.requests) == 3 * 6
    assert {record["error"] for record in _records(questions)} == {"no worker serves stub"}


def test_a_killed_run_resumes(stub: StubController, questions: Path) -> None:
    stub.behave = lambda body: Behaviour(endless=last_question(body) == "q3")
    command = [sys.executable, "-m", "traces.get_trace", *_arguments(stub, questions, "--concurrency", "2")]
    out = questions.parent / "out" / "small.jsonl"
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") == 5, deadline_s=60)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    with out.open("ab") as file:
        file.write(b'{"question_id": 3, "tur')  # as if it had been killed while writing

    stub.behave, stub.requests = (lambda body: Behaviour()), []
    assert _run(stub, questions, "--resume", "--legacy") == 0  # --legacy needs more than the first run asked for
    assert len(stub.requests) == 9
    assert [record["question_id"] for record in _records(questions)] == [1, 2, 3, 4, 5, 6]

    stub.requests = []
    assert _run(stub, questions, "--resume", "--legacy") == 0
    assert stub.requests == []


def test_a_smaller_limit_loses_no_results(stub: StubController, questions: Path) -> None:
    _run(stub, questions)
    assert _run(stub, questions, "--resume", "--limit", "1") == 0
    assert len(_records(questions)) == 6


def test_existing_results_are_not_overwritten(stub: StubController, questions: Path) -> None:
    _run(stub, questions)
    assert "exists: add --resume" in str(_run(stub, questions))


def test_results_of_other_settings_are_not_mixed(stub: StubController, questions: Path) -> None:
    _run(stub, questions)
    message = str(_run(stub, questions, "--resume", "--temperature", "1"))
    assert "was made with parameters" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "other"], "no worker serves 'other'; models with a worker: stub"),
        (["--dataset", "nonsense"], "no data set 'nonsense'"),
        (["--controller", "http://127.0.0.1:1"], "cannot reach the controller at http://127.0.0.1:1"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    stub: StubController, questions: Path, arguments: list[str], message: str
) -> None:
    printed = str(_run(stub, questions, *arguments))
    assert printed.startswith("get_trace: ")
    assert message in printed
    assert "\n" not in printed
    assert not (questions.parent / "out").exists()
