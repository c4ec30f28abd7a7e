"""The ``/v1`` endpoints, mostly as the official client sees them."""

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.controller.conftest import Controller, StartWorker
from tests.controller.serving import refused_url, until
from tests.controller.stub_worker import StubWorker

HELLO: Any = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": "stub", "messages": HELLO}


async def events_of(controller: Controller, body: dict, path: str = "/v1/chat/completions") -> list:
    """The decoded events of a stream; "[DONE]" stays text."""
    reply = await controller.post(path, body | {"stream": True})
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_chat_without_streaming(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    await start_worker(stub)
    answer = await controller.openai.chat.completions.create(model="stub", messages=HELLO, temperature=0, seed=7)
    assert answer.choices[0].message.content == "Hello wörld"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens == 8
    sent = stub.requests[0]
    assert sent["messages"] == HELLO and sent["text_deltas"] is True and sent["echo"] is False
    assert (sent["seed"], sent["choice"], sent["temperature"]) == (7, 0, 0)
    assert "prompt" not in sent


async def test_no_seed_is_sent_when_the_client_gave_none(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    await start_worker(stub)
    await controller.post("/v1/chat/completions", CHAT)
    assert "seed" not in stub.requests[0]


async def test_chat_streaming_with_usage(controller: Controller, start_worker: StartWorker) -> None:
    await start_worker(StubWorker())
    stream = await controller.openai.chat.completions.create(
        model="stub", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello wörld"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3
    await until(lambda: controller.in_flight() == 0)


async def test_every_chunk_has_object_created_and_finish_reason(
    controller: Controller, start_worker: StartWorker
) -> None:
    await start_worker(StubWorker())
    *chunks, done = await events_of(controller, CHAT)
    assert done == "[DONE]"
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk" and chunk["created"] > 0 and chunk["id"]
        assert "finish_reason" in chunk["choices"][0] and "delta" in chunk["choices"][0]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert "usage" not in chunks[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_are_n_requests_spread_over_the_workers(
    controller: Controller, start_worker: StartWorker, stream: bool
) -> None:
    stubs = [StubWorker(), StubWorker()]
    for stub in stubs:
        await start_worker(stub)
    texts = {0: "", 1: "", 2: "", 3: ""}
    if stream:
        chunks = await controller.openai.chat.completions.create(model="stub", messages=HELLO, n=4, stream=True)
        async for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        answer = await controller.openai.chat.completions.create(model="stub", messages=HELLO, n=4)
        texts = {choice.index: choice.message.content or "" for choice in answer.choices}
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)
    assert texts == dict.fromkeys(range(4), "Hello wörld")
    assert [len(stub.requests) for stub in stubs] == [2, 2]
    assert sorted(sent["choice"] for stub in stubs for sent in stub.requests) == [0, 1, 2, 3]
    assert len({name for stub in stubs for name in stub.request_ids}) == 4


def with_logprobs(index: int, frame: dict) -> dict:
    if frame["finish_reason"] is not None:
        return frame
    step = {
        "text_offset": [index],
        "token_logprobs": [-0.5],
        "tokens": ["tö"],
        "top_logprobs": [{"a": -1.0, "b": None}],
    }
    return frame | {"logprobs": step}


async def test_chat_logprobs_in_the_chat_layout(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.decorate = with_logprobs
    await start_worker(stub)
    answer = await controller.openai.chat.completions.create(
        model="stub", messages=HELLO, logprobs=True, top_logprobs=2
    )
    assert stub.requests[0]["logprobs"] == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 3
    token = logprobs.content[0]
    assert (token.token, token.logprob, token.bytes) == ("tö", -0.5, list("tö".encode()))
    assert [(top.token, top.logprob) for top in token.top_logprobs] == [("a", -1.0), ("b", -9999.0)]


async def test_completion_logprobs_in_the_completion_layout(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.decorate = with_logprobs
    await start_worker(stub)
    answer = await controller.openai.completions.create(model="stub", prompt="Hi", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["tö"] * 3 and logprobs.text_offset == [0, 1, 2]
    *chunks, _ = await events_of(controller, {"model": "stub", "prompt": "Hi", "logprobs": 1}, "/v1/completions")
    assert [chunk["choices"][0].get("logprobs", {}).get("tokens") for chunk in chunks] == [["tö"]] * 3 + [None]


async def test_completions_take_a_list_of_prompts_and_echo(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    await start_worker(stub)
    answer = await controller.openai.completions.create(
        model="stub", prompt=["one ", "two "], n=2, echo=True, stop=["x"]
    )
    assert [choice.text for choice in answer.choices] == ["one Hello wörld"] * 2 + ["two Hello wörld"] * 2
    assert sorted((sent["prompt"], sent["choice"]) for sent in stub.requests) == [
        ("one ", 0),
        ("one ", 1),
        ("two ", 0),
        ("two ", 1),
    ]
    assert answer.usage is not None and answer.usage.prompt_tokens == 10
    assert all(sent["stop"] == ["x"] and sent["echo"] is True for sent in stub.requests)


async def test_our_own_parameters_reach_the_worker(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker(methods=("vanilla", "medusa"))
    await start_worker(stub)
    extra = {
        "method": "medusa",
        "trace": "full",
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop_token_ids": [3],
        "max_length": 99,
    }
    await controller.openai.chat.completions.create(
        model="stub", messages=HELLO, max_completion_tokens=9, extra_body=extra
    )
    assert extra.items() <= stub.requests[0].items() and stub.requests[0]["max_new_tokens"] == 9


HEADER = {
    "request_id": "r",
    "model": "stub",
    "method": "vanilla",
    "parameters": {},
    "device": "cpu",
    "dtype": "float32",
    "versions": {},
    "prompt_tokens": 5,
    "prefill_ms": 1.0,
    "prefill_steps": 1,
}
SUMMARY = {
    "tokens": 3,
    "steps": 3,
    "tokens_per_step": 1.0,
    "mean_acceptance_length": 1.0,
    "acceptance_histogram": [3],
    "tokens_per_s": 10.0,
    "kv_peak_tokens": 8,
}


def with_trace(index: int, frame: dict) -> dict:
    if frame["finish_reason"] is not None:
        return frame | {"trace_summary": SUMMARY}
    step = {"step": index, "t_ms": 1.0, "forward_ms": 1.0, "width": 1, "batch_width": 1, "kv_tokens": 5 + index}
    thread = {"thread": 0, "text": frame["text"], "token_ids": [index]}
    traced = frame | {"trace": [step | {"threads": [thread]}], "threads": [thread]}
    return traced | {"trace_header": HEADER} if index == 0 else traced


async def test_traces_ride_in_the_chunks(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.decorate = with_trace
    await start_worker(stub)
    *chunks, _ = await events_of(controller, CHAT | {"trace": True})
    assert chunks[0]["trace_header"]["prompt_tokens"] == 5 and "trace_header" not in chunks[1]
    assert [chunk["trace"][0]["step"] for chunk in chunks[:-1]] == [0, 1, 2]
    assert chunks[1]["threads"][0]["text"] == "lo "
    assert chunks[-1]["trace_summary"]["tokens"] == 3


async def test_a_whole_answer_carries_the_whole_trace(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.decorate = with_trace
    await start_worker(stub)
    choice = (await controller.post("/v1/chat/completions", CHAT | {"trace": True})).json()["choices"][0]
    assert [step["step"] for step in choice["trace"]] == [0, 1, 2]
    assert choice["threads"] == [{"thread": 0, "text": "Hello wörld", "token_ids": [0, 1, 2]}]
    assert choice["trace_header"]["model"] == "stub" and choice["trace_summary"]["steps"] == 3


async def test_models_are_listed_with_their_methods(controller: Controller, start_worker: StartWorker) -> None:
    await start_worker(StubWorker("a/b", methods=("vanilla", "ngram")))
    listed = await controller.openai.models.list()
    assert [(model.id, model.methods) for model in listed.data] == [("a/b", ["vanilla", "ngram"])]
    assert (await controller.openai.models.retrieve("a/b")).id == "a/b"
    with pytest.raises(openai.NotFoundError):
        await controller.openai.models.retrieve("c")


@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_model_is_404_and_known_but_absent_is_503(
    controller: Controller, start_worker: StartWorker, stream: bool
) -> None:
    url = await start_worker(StubWorker())
    with pytest.raises(openai.NotFoundError) as unknown:
        await controller.openai.chat.completions.create(model="nope", messages=HELLO, stream=stream)
    assert unknown.value.body["code"] == 40301 and "nope" in unknown.value.body["message"]  # type: ignore[index]
    await controller.post("/unregister_worker", {"worker_name": url})
    with pytest.raises(openai.InternalServerError) as absent:
        await controller.openai.chat.completions.create(model="stub", messages=HELLO, stream=stream)
    assert absent.value.status_code == 503


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "field required"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": "stub", "messages": []}', "messages"),
        (b'{"model": "stub", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"model": "stub", "messages": [{"role": "user"}], "temperature": NaN}', "temperature"),
        (b'{"model": "stub", "messages": [{"role": "user"}], "max_tokens": 0}', "max_tokens"),
        (b'{"model": "stub", "messages": [{"role": "user"}], "n": 1000000}', "n:"),
    ],
)
async def test_malformed_chat_bodies_get_one_readable_line(
    controller: Controller, start_worker: StartWorker, body: bytes, word: str
) -> None:
    stub = StubWorker()
    await start_worker(stub)
    reply = await controller.http.post(f"{controller.url}/v1/chat/completions", content=body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error.keys() == {"message", "type", "param", "code"}
    assert word in error["message"] and "\n" not in error["message"]
    assert stub.requests == []


async def test_a_path_that_does_not_exist_has_the_same_error_shape(controller: Controller) -> None:
    reply = await controller.http.get(f"{controller.url}/v1/nothing")
    assert reply.status_code == 404 and reply.json()["error"]["message"] == "Not Found"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_before_the_first_token_has_a_proper_status(
    controller: Controller, start_worker: StartWorker, stream: bool
) -> None:
    stub = StubWorker()
    stub.error = (40303, "the prompt is too long")
    await start_worker(stub)
    with pytest.raises(openai.BadRequestError, match="the prompt is too long"):
        await controller.openai.chat.completions.create(model="stub", messages=HELLO, stream=stream)
    await until(lambda: controller.in_flight() == 0)


@pytest.mark.parametrize("how", ["die", "end"])
async def test_death_in_the_middle_of_a_stream_ends_in_an_error_event(
    controller: Controller, start_worker: StartWorker, how: str
) -> None:
    stub = StubWorker()
    stub.break_at, stub.break_how = 2, how
    await start_worker(stub)
    *chunks, error, done = await events_of(controller, CHAT)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["Hel", "lo "]
    assert error["error"]["message"] and done == "[DONE]"
    assert controller.in_flight() == 0


async def test_death_in_the_middle_reaches_the_official_client(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker()
    stub.break_at, stub.break_how = 1, "die"
    await start_worker(stub)
    stream = await controller.openai.chat.completions.create(model="stub", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="broke"):
        async for _ in stream:
            pass


async def test_death_in_the_middle_of_a_whole_answer_is_an_error(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker()
    stub.break_at, stub.break_how = 1, "die"
    await start_worker(stub)
    reply = await controller.post("/v1/chat/completions", CHAT)
    assert reply.status_code == 504 and reply.json()["error"]["code"] == 50006


@pytest.mark.parametrize("failure", ["refused", "dies", "http 500", "overloaded", "ends"])
async def test_failover_before_the_first_frame(controller: Controller, start_worker: StartWorker, failure: str) -> None:
    bad, good = StubWorker(words=("bad",)), StubWorker()
    match failure:
        case "refused":
            await controller.register(refused_url(), bad)
        case "dies" | "ends":
            bad.break_at, bad.break_how = 0, failure.removesuffix("s")
        case "http 500":
            bad.http_status = 500
        case "overloaded":
            bad.error = (42903, "the queue is full")
    if failure != "refused":
        await start_worker(bad)
    await start_worker(good)
    for _ in range(2):
        answer = await controller.openai.chat.completions.create(model="stub", messages=HELLO)
        assert answer.choices[0].message.content == "Hello wörld"
    assert controller.in_flight() == 0


async def test_an_overload_everywhere_is_429(controller: Controller, start_worker: StartWorker) -> None:
    for _ in range(2):
        stub = StubWorker()
        stub.error = (42903, "the queue is full")
        await start_worker(stub)
    with pytest.raises(openai.RateLimitError, match="the queue is full"):
        await controller.openai.chat.completions.create(model="stub", messages=HELLO)


async def test_all_workers_unreachable_is_503(controller: Controller) -> None:
    await controller.register(refused_url(), StubWorker())
    reply = await controller.post("/v1/chat/completions", CHAT)
    assert reply.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("break_at", [0, 1])
async def test_a_client_that_leaves_stops_the_worker(
    controller: Controller, start_worker: StartWorker, stream: bool, break_at: int
) -> None:
    stub = StubWorker()
    stub.break_at = break_at
    await start_worker(stub)
    request = asyncio.create_task(controller.post("/v1/chat/completions", CHAT | {"stream": stream, "n": 2}))
    await until(lambda: stub.live == 2)
    assert controller.in_flight() == 2
    request.cancel()
    await until(lambda: stub.live == 0)
    await until(lambda: controller.in_flight() == 0)


async def test_many_departures_leave_no_lease_behind(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    stub.break_at = 1
    await start_worker(stub)
    requests = [
        asyncio.create_task(controller.post("/v1/chat/completions", CHAT | {"stream": index % 2 == 0}))
        for index in range(30)
    ]
    await until(lambda: stub.live == 30)
    for request in requests:
        request.cancel()
    await until(lambda: stub.live == 0 and controller.in_flight() == 0)


async def test_request_ids_are_taken_passed_on_and_returned(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker()
    await start_worker(stub)
    reply = await controller.post("/v1/chat/completions", CHAT, headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1" and stub.request_ids == ["mine-1"]
    reply = await controller.post("/v1/chat/completions", CHAT, headers={"x-request-id": "a b" * 100})
    made = reply.headers["x-request-id"]
    assert stub.request_ids[-1] == made and " " not in made and reply.json()["id"] == f"chatcmpl-{made}"
