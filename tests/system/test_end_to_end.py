"""Client → controller → worker, all real: the official OpenAI client, refusals, departures and dying workers."""

import json
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from protocol.trace import RequestTrace, StepTrace
from tests.support import processes
from tests.support.processes import Program, idle, metrics
from tests.support.serving import wait_until

MESSAGES = [{"role": "user", "content": "Count to ten."}]
Fleet = tuple[Program, Program]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> str:
    return checkpoint.name


@pytest.fixture(autouse=True)
def nothing_leaks(fleet: Fleet) -> Iterator[None]:
    yield
    wait_until(lambda: idle(fleet[1].url))


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> openai.OpenAI:
    http = httpx.Client(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{fleet[0].url}/v1", api_key="-", max_retries=0, http_client=http)


def test_models_are_listed(client: openai.OpenAI, model: str) -> None:
    assert [card.id for card in client.models.list()] == [model]


def test_a_streamed_answer_is_the_whole_one(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    usage = {"include_usage": True}
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options=usage))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 20
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"


def test_traces_ride_along(client: openai.OpenAI, model: str) -> None:
    """With the keys that OpenAI's API does not have: they reach the worker, and its steps come back."""
    extra = {"trace": "full", "method": "vanilla", "top_k": 1}
    options = {"model": model, "messages": MESSAGES, "max_tokens": 20}
    chunks = list(client.chat.completions.create(**options, stream=True, extra_body=extra))
    extras = [chunk.model_extra or {} for chunk in chunks]
    steps = [StepTrace.model_validate(step) for extra in extras for step in extra.get("trace") or []]
    header = next(extra["trace_header"] for extra in extras if extra.get("trace_header"))
    summary = next(extra["trace_summary"] for extra in extras if extra.get("trace_summary"))
    trace = RequestTrace.model_validate({"header": header, "steps": steps, "summary": summary})
    assert sum(len(thread.token_ids) for step in steps for thread in step.threads) == trace.summary.tokens == 20
    assert len(trace.header.prompt_token_ids) == trace.header.prompt_tokens
    assert (trace.header.method, trace.header.parameters["top_k"]) == ("vanilla", 1)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "".join(thread.text for step in steps for thread in step.threads) == text
    greedy = client.chat.completions.create(**options, temperature=0)
    assert greedy.choices[0].message.content == text


def test_choices_seeds_and_stops(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": MESSAGES, "temperature": 1.2, "max_tokens": 16, "seed": 5}
    first, second = client.chat.completions.create(**options, n=2).choices
    again = client.chat.completions.create(**options).choices[0]
    assert first.message.content == again.message.content != second.message.content
    stop = first.message.content[4:6]
    stopped = client.chat.completions.create(**options, stop=stop).choices[0]
    assert stopped.message.content == first.message.content.split(stop)[0]
    assert stopped.finish_reason == "stop"


def test_logprobs_in_both_layouts(client: openai.OpenAI, model: str) -> None:
    chat = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:  # some of the tiny model's ids have no text and count as one
        assert 1 <= len(token.top_logprobs) <= 3
        assert token.logprob == token.top_logprobs[0].logprob == max(top.logprob for top in token.top_logprobs)
        assert token.token.startswith("bytes:") or bytes(token.bytes).decode() == token.token
    text = client.completions.create(model=model, prompt="ab", max_tokens=4, temperature=0, logprobs=2, echo=True)
    logprobs = text.choices[0].logprobs
    assert text.choices[0].text.startswith("ab")
    assert len(logprobs.tokens) == 6
    assert logprobs.token_logprobs[0] is None
    assert logprobs.text_offset[:3] == [0, 1, 2]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "gpt-9"}, 404, "gpt-9"),
        ({"messages": []}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**7}, 400, "exceed the context"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "length of 4096"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 7}, 400, "top_p"),
        ({"method": "telepathy"}, 400, "telepathy"),
        ({"logit_bias": {"100000": 1}}, 400, "100000"),
        (b"{", 400, "JSON"),
        (b"", 400, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_get_a_status_and_a_line(
    fleet: Fleet, model: str, body: dict | bytes, status: int, words: str, stream: bool
) -> None:
    if isinstance(body, dict):
        body = json.dumps({"model": model, "messages": MESSAGES, "stream": stream, **body}).encode()
    url = f"{fleet[0].url}/v1/chat/completions"
    response = httpx.post(url, content=body, timeout=60, trust_env=False)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert words in message and "\n" not in message


def test_null_top_k_is_the_default(fleet: Fleet, model: str) -> None:
    url = f"{fleet[0].url}/v1/chat/completions"
    body = {"model": model, "messages": MESSAGES, "top_k": None, "max_tokens": 3}
    assert httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 200


def endless(fleet: Fleet, model: str, **options: object) -> dict:
    return {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 3500, "stream": True, **options}


def test_leaving_the_controller_stops_the_worker(fleet: Fleet, model: str) -> None:
    controller, worker = fleet
    url = f"{controller.url}/v1/chat/completions"
    before = metrics(worker.url)
    with (
        httpx.Client(timeout=60, trust_env=False) as http,
        http.stream("POST", url, json=endless(fleet, model)) as response,
    ):
        next(response.iter_raw())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=endless(fleet, model, stream=False), timeout=0.5, trust_env=False)
    wait_until(lambda: idle(worker.url))
    after = metrics(worker.url)
    assert after["polydecode_requests_cancelled_total"] == before["polydecode_requests_cancelled_total"] + 2
    assert after["polydecode_generated_tokens_total"] < before["polydecode_generated_tokens_total"] + 3500


def test_after_200_random_departures_everything_is_free(fleet: Fleet, model: str) -> None:
    """Clients of both doors that leave early, late or at once, bad requests and good ones, 12 at a time."""
    controller, worker = fleet
    url = f"{controller.url}/v1/chat/completions"
    fastchats = {"model": model, "prompt": "hi", "temperature": 0, "max_new_tokens": 3500}
    streams = [(url, endless(fleet, model)), (f"{controller.url}/worker_generate_stream", fastchats)]

    def one(index: int) -> None:
        chooser = random.Random(index)
        kind = chooser.choice(["leave", "leave", "whole", "bad", "good"])
        with httpx.Client(timeout=60, trust_env=False) as http:
            if kind == "bad":
                assert http.post(url, json=endless(fleet, model, max_tokens=0)).status_code == 400
            elif kind == "good":
                body = endless(fleet, model, max_tokens=4, stream=False, n=chooser.randint(1, 3))
                assert http.post(url, json=body).status_code == 200
            elif kind == "whole":
                with pytest.raises(httpx.TimeoutException):
                    http.post(url, json=endless(fleet, model, stream=False), timeout=chooser.choice([0.05, 0.3]))
            else:
                address, body = chooser.choice(streams)
                with http.stream("POST", address, json=body) as response:
                    chunks = response.iter_raw()
                    for _ in range(chooser.randint(0, 4)):
                        next(chunks)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(200)))
    wait_until(lambda: idle(worker.url))
    shown = httpx.get(f"{controller.url}/fleet", trust_env=False).json()["workers"]
    assert [entry["in_flight"] for entry in shown] == [0]


def test_a_dying_worker_ends_its_stream_and_the_other_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    with (
        processes.controller(state=tmp_path / "state.json") as controller,
        processes.worker(checkpoint, controller.url) as first,
        processes.worker(checkpoint, controller.url) as second,
        httpx.Client(timeout=60, trust_env=False) as http,
    ):
        url = f"{controller.url}/v1/chat/completions"
        body = {"model": checkpoint.name, "messages": MESSAGES, "temperature": 0, "max_tokens": 3500, "stream": True}
        for _ in range(2):
            assert http.post(url, json={**body, "stream": False, "max_tokens": 3}).status_code == 200
        assert [metrics(each.url)["polydecode_requests_finished_total"] for each in (first, second)] == [1, 1]
        with http.stream("POST", url, json=body) as response:
            chunks = response.iter_raw()
            next(chunks)
            busy = next(program for program in (first, second) if not idle(program.url))
            busy.kill(signal.SIGKILL)
            rest = b"".join(chunks).decode()
        assert '"error"' in rest and rest.rstrip().endswith("data: [DONE]")
        for _ in range(4):
            answer = http.post(url, json={**body, "stream": False, "max_tokens": 3})
            assert answer.status_code == 200
        (second if busy is first else first).kill(signal.SIGTERM)
        gone = http.post(url, json={**body, "stream": False})
        assert gone.status_code == 503
        assert checkpoint.name in gone.json()["error"]["message"]
