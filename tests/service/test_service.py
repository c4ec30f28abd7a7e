"""The worker over HTTP: FastChat's frames, refusals in the body, and clients that leave."""

import base64
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import numpy as np
import pytest
import torch

from protocol.generation import ChatMessage, GenerateParams, StreamFrame, parse_frame
from protocol.trace import RequestTrace
from tests.service.conftest import CONTEXT, LiveWorker
from tests.support.processes import idle
from tests.support.serving import wait_until
from tests.support.tiny import tiny_checkpoint
from workers.prompts import PromptRenderer
from workers.request import Event

LONG = 3500
BASE = {"prompt": "hello", "temperature": 0, "max_new_tokens": 12, "echo": False}


@pytest.fixture(autouse=True)
def nothing_leaks(live: LiveWorker):
    yield
    wait_until(lambda: idle(live.url))


def test_frames_grow_and_the_last_text_comes_twice(live: LiveWorker) -> None:
    frames = live.frames(**BASE)
    texts = [frame["text"] for frame in frames]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == texts[-2] != ""
    assert [frame["finish_reason"] for frame in frames[-2:]] == [None, "length"]
    assert all(frame["finish_reason"] is None for frame in frames[:-1])
    assert all(frame["error_code"] == 0 for frame in frames)
    assert frames[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert "trace" not in frames[0]


def test_frames_parse_as_fastchat_reads_them(live: LiveWorker) -> None:
    """Whatever the chunks, splitting at NUL gives JSON objects, as FastChat's clients do it."""
    with live.client.stream("POST", "/worker_generate_stream", json={**BASE, "logprobs": 1}) as response:
        chunks = list(response.iter_raw(7))
    frames = [parse_frame(frame) for frame in b"".join(chunks).split(b"\0") if frame]
    assert frames[-1].finish_reason == "length"
    assert len(frames[-1].logprobs.tokens) == 12


def test_deltas_join_to_the_cumulative_text(live: LiveWorker) -> None:
    cumulative = live.frames(**BASE)
    deltas = live.frames(**BASE, text_deltas=True)
    assert "".join(frame["text"] for frame in deltas) == cumulative[-1]["text"]
    assert {frame["cumulative"] for frame in deltas} == {False}


def test_echo_is_fastchats_default(live: LiveWorker) -> None:
    request = {key: value for key, value in BASE.items() if key != "echo"}
    frames = live.frames(**request)
    assert all(frame["text"].startswith("hello") for frame in frames)
    assert frames[-1]["text"] == "hello" + live.frames(**BASE)[-1]["text"]


def test_trace_rides_in_the_frames(live: LiveWorker) -> None:
    frames = [StreamFrame.model_validate(frame) for frame in live.frames(**BASE, trace=True)]
    steps = [step for frame in frames for step in frame.trace or []]
    trace = RequestTrace(header=frames[0].trace_header, steps=steps, summary=frames[-1].trace_summary)
    assert sum(len(thread.token_ids) for step in steps for thread in step.threads) == trace.summary.tokens == 12
    assert "".join(thread.text for step in steps for thread in step.threads) == frames[-1].text
    assert "".join(delta.text for frame in frames for delta in frame.threads or []) == frames[-1].text
    assert trace.header.method == "vanilla"


def test_generate_returns_the_last_frame(live: LiveWorker) -> None:
    answer = live.client.post("/worker_generate", json=BASE).json()
    assert answer["text"] == live.frames(**BASE)[-1]["text"]
    assert answer["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", 40302),
        (b"{", 40001),
        (b"[1]", 40001),
        (b'{"prompt": 3}', 40001),
        (b'{"prompt": "a", "messages": []}', 40302),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 40302),
        (b'{"prompt": "a", "max_new_tokens": 0}', 40302),
        (b'{"prompt": "a", "max_new_tokens": 100000}', 40303),
        (b'{"prompt": "a", "temperature": NaN}', 40302),
        (b'{"prompt": "a", "model": "gpt-4"}', 40301),
        (b'{"prompt": "a", "method": "telepathy"}', 40302),
        (b'{"prompt": "a", "draft": {"level": 2}}', 40302),
        (b'{"prompt": "a", "draft": {"LEVEL": 2}}', 40302),
        (b'{"prompt": "a", "draft": {"window": 0}}', 40302),
        (b'{"prompt": "a", "draft": {"guesses": 0}}', 40302),
        (b'{"prompt": "a", "draft": {"window": 100000}}', 40302),
        (b'{"prompt": "a", "draft": {"nodes": 0}}', 40302),
        (b'{"prompt": "a", "draft": {"acceptance": "perhaps"}}', 40001),
        (b'{"prompt": "a", "draft": {"posterior_threshold": NaN}}', 40302),
        (b"\xff\xfe", 40001),
    ],
)
@pytest.mark.parametrize("path", ["/worker_generate_stream", "/worker_generate"])
def test_bad_bodies_get_one_error_frame(live: LiveWorker, path: str, body: bytes, code: int) -> None:
    response = live.client.post(path, content=body)
    assert response.status_code == 200
    frames = [json.loads(frame) for frame in response.content.split(b"\0") if frame]
    assert [frame["error_code"] for frame in frames] == [code]
    assert frames[0]["text"] and "\n" not in frames[0]["text"]


def test_other_endpoints(live: LiveWorker) -> None:
    assert live.client.post("/count_token", json={"prompt": "hello"}).json() == {"count": 5, "error_code": 0}
    assert live.client.post("/count_token").json()["count"] == 0
    details = live.client.post("/model_details").json()
    assert (details["context_length"], details["methods"]) == (CONTEXT, ["vanilla"])
    assert details["memory"] == live.worker.engine.memory()
    status = live.client.post("/worker_get_status").json()
    assert (status["model_names"], status["speed"], status["queue_length"]) == (["tiny"], 1, 0)
    assert live.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("template", [None, "vicuna_v1.1", "mpt-7b-chat"])
def test_conv_template_renders_what_the_worker_renders(live: LiveWorker, template: str | None) -> None:
    """The model's own template, one of FastChat's that goes out as it is, and one whose style has no stable number."""
    fastchat = pytest.importorskip("fastchat.conversation")
    renderer = live.worker.engine.renderer
    conv = live.client.post("/worker_get_conv_template").json()["conv"]
    if template:
        renderer = PromptRenderer(live.worker.engine.tokenizer, "tiny", template)
        conv = renderer.conversation("tiny").model_dump()
    assert len(conv) == 11 and 1 <= conv["sep_style"] <= 7
    turns = [ChatMessage(role=role, content=text) for role, text in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    assert rendered(fastchat, conv, None) == renderer.render(turns).text
    system = ChatMessage(role="system", content="s")
    assert rendered(fastchat, conv, "s") == renderer.render([system, *turns]).text


def rendered(fastchat, conv: dict, system: str | None) -> str:
    """As FastChat's API server builds a prompt from the answer of /worker_get_conv_template."""
    fields = {**conv, "sep_style": fastchat.SeparatorStyle(conv["sep_style"]), "messages": []}
    conversation = fastchat.Conversation(**fields)
    if system is not None:
        conversation.set_system_message(system)
    for role, text in [(0, "a"), (1, "b"), (0, "c"), (1, None)]:
        conversation.append_message(conversation.roles[role], text)
    return conversation.get_prompt()


def test_embeddings_are_unit_means_of_the_last_hidden_states(live: LiveWorker) -> None:
    answer = live.client.post("/worker_get_embeddings", json={"input": ["hello", "you"]}).json()
    model = tiny_checkpoint().model
    ids = torch.tensor([live.worker.engine.tokenizer.encode("hello")])
    with torch.inference_mode():
        mean = model.model(ids).last_hidden_state[0].mean(0)
    assert np.allclose(answer["embedding"][0], mean / mean.norm(), atol=1e-5)
    assert answer["token_num"] == 8
    packed = live.client.post("/worker_get_embeddings", json={"input": "hello", "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(packed["embedding"][0]), dtype=np.float32)
    assert np.allclose(decoded, answer["embedding"][0], atol=1e-6)
    for bad in ({}, {"input": []}, {"input": ["x" * (CONTEXT + 1)]}):
        assert live.client.post("/worker_get_embeddings", json=bad).json()["error_code"] >= 40000


def test_worker_trace_has_apars_six_arrays(live: LiveWorker) -> None:
    body = {"prompts": "hello", "max_length": 12, "max_batch_size": 32, "max_depth": 2, "model": "tiny"}
    trace = live.client.post("/worker_trace", json=body).json()
    assert set(trace) == {"responses", "ret_input_ids", "global_root", "g_to_i", "elapse", "dynamic_bs"}
    assert len({len(column) for column in trace.values()}) == 1
    ids = live.worker.engine.tokenizer.encode("hello")
    assert trace["ret_input_ids"][-1][0][:5] == ids
    assert len(trace["ret_input_ids"][-1][0]) == 12
    assert trace["global_root"][0] == [{"start": 5, "gid": 0, "termination": None, "next": None, "detail": None}]
    assert trace["g_to_i"][0] == {"0": 0}
    assert trace["elapse"] == sorted(trace["elapse"])
    assert trace["dynamic_bs"] == [1] * 7
    both = live.client.post("/worker_trace", json={**body, "prompts": ["hello", "you"]}).json()
    assert both["responses"][-1][0] == trace["responses"][-1][0]
    assert both["g_to_i"][0] == {"0": 0, "1": 1}
    for bad in ({"max_length": 3}, {"max_batch_size": 0}, {"max_depth": 0}):
        refused = live.client.post("/worker_trace", json={**body, **bad})
        assert refused.json()["error_code"] >= 40000 and "\n" not in refused.json()["text"]


def open_stream(live: LiveWorker, **params: object) -> tuple[httpx.Client, httpx.Response]:
    client = httpx.Client(base_url=live.url, timeout=60, trust_env=False)
    request = client.build_request("POST", "/worker_generate_stream", json={**BASE, "max_new_tokens": LONG, **params})
    return client, client.send(request, stream=True)


def test_a_client_that_leaves_stops_its_generation(live: LiveWorker) -> None:
    before = live.metrics()
    client, response = open_stream(live)
    next(response.iter_raw())
    response.close()
    client.close()
    wait_until(
        lambda: live.metrics()["polydecode_requests_cancelled_total"] > before["polydecode_requests_cancelled_total"]
    )
    wait_until(lambda: idle(live.url))
    assert live.metrics()["polydecode_generated_tokens_total"] - before["polydecode_generated_tokens_total"] < LONG


def test_cancelling_takes_effect_before_the_next_step(live: LiveWorker) -> None:
    """A request that is cancelled while its third step is reported makes no fourth one."""
    engine, events, submitted = live.worker.engine, [], threading.Event()

    def sink(event: Event) -> None:
        submitted.wait()
        events.append(event)
        if len(events) == 3:
            engine.cancel(request)

    request = engine.submit(GenerateParams.model_validate({**BASE, "max_new_tokens": LONG}), sink)
    submitted.set()
    wait_until(lambda: idle(live.url))
    assert len(request.steps) == len(events) == 3


def test_a_client_of_the_whole_answer_may_leave_too(live: LiveWorker) -> None:
    before = live.metrics()["polydecode_requests_cancelled_total"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/worker_generate", json={**BASE, "max_new_tokens": LONG}, timeout=0.2, trust_env=False)
    wait_until(lambda: live.metrics()["polydecode_requests_cancelled_total"] == before + 1)


def test_after_200_random_departures_everything_is_free(live: LiveWorker) -> None:
    """Clients that leave early, late or at once, bad requests and good ones, 16 at a time."""

    def one(index: int) -> None:
        chooser = random.Random(index)
        kind = chooser.choice(["leave", "leave", "leave", "whole", "bad", "good"])
        if kind == "bad":
            live.frames(prompt="x", max_new_tokens=chooser.choice([0, -1, 10**6]))
        elif kind == "good":
            assert live.frames(**{**BASE, "max_new_tokens": 5})[-1]["finish_reason"] == "length"
        elif kind == "whole":
            try:
                timeout = chooser.choice([0.05, 0.2, 0.5])
                httpx.post(f"{live.url}/worker_generate", json={**BASE, "max_new_tokens": LONG}, timeout=timeout)
            except httpx.TimeoutException:
                pass
        else:
            client, response = open_stream(live, max_new_tokens=LONG)
            chunks = response.iter_raw()
            for _ in range(chooser.randint(0, 5)):
                next(chunks)
            response.close()
            client.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(200)))
    wait_until(lambda: idle(live.url))
