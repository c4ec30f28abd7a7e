"""FastChat's own controller, API server and test client against our worker, each in a process of its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from protocol.generation import parse_frame
from tests.support import processes
from tests.support.processes import Program, free_port, idle, program
from tests.support.serving import wait_until
from tests.system.conftest import checkpoint, fleet

get_conv_template = pytest.importorskip("fastchat.conversation").get_conv_template

__all__ = ["checkpoint", "fleet"]  # fixtures

MODEL = "tiny-llama"
PROMPT = "hello"
HELLO = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_new_tokens": 12, "echo": False}


def post(url: str, body: object = None) -> httpx.Response:
    return httpx.post(url, json=body, timeout=60, trust_env=False).raise_for_status()


def own_text(worker: Program, **params: object) -> str:
    """What the worker answers when it is asked directly."""
    return str(post(f"{worker.url}/worker_generate", {**GREEDY, **params}).json()["text"])


@pytest.fixture
def hasty_expiration(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastChat's controller drops a worker that has not beaten for two seconds."""
    monkeypatch.setitem(processes.ENVIRONMENT, "FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION", "2")


@pytest.mark.usefixtures("hasty_expiration")
def test_fastchats_controller_accepts_keeps_and_uses_our_worker(checkpoint: Path) -> None:
    """It is registered once, its beats keep it in the table, its address is given out, its frames are passed on."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["--host", "127.0.0.1", "--port", str(port)]
    with (
        program("fastchat.serve.controller", *arguments, port=port) as controller,
        processes.worker(checkpoint, None, "--register", "--controller-address", url) as worker,
    ):
        controller.wait_healthy("/test_connection")
        wait_until(lambda: post(f"{url}/list_models").json() == {"models": [MODEL]})
        beat = f"Receive heart beat. {worker.url}"
        wait_until(lambda: controller.output().count(beat) >= 6)  # one a second: three times the expiration
        assert "Remove stale worker" not in controller.output()
        assert controller.output().count("Register a new worker") == 1
        assert post(f"{url}/get_worker_address", {"model": MODEL}).json() == {"address": worker.url}
        proxied = post(f"{url}/worker_generate_stream", GREEDY).content
        frames = [parse_frame(frame) for frame in proxied.split(b"\0") if frame]
        assert proxied.endswith(b"\0")
        assert (frames[-2].finish_reason, frames[-1].finish_reason) == (None, "length")
        assert frames[-2].text == frames[-1].text == own_text(worker) != ""
        post(f"{url}/refresh_all_workers")  # it polls the worker's status
        assert post(f"{url}/list_models").json() == {"models": [MODEL]}


@pytest.fixture(scope="module")
def api_server(fleet: tuple[Program, Program]) -> Iterator[Program]:
    """FastChat's OpenAI server in front of our controller and our worker."""
    port = free_port()
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--controller-address", fleet[0].url]
    with program("tests.peers.fastchat_api_server", *arguments, port=port) as server:
        server.wait_healthy("/v1/models")
        yield server


@pytest.fixture
def client(api_server: Program) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of FastChat's server."""
    plain = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{api_server.url}/v1", api_key="-", max_retries=0, http_client=plain) as client:
        yield client


@pytest.fixture
def worker(fleet: tuple[Program, Program]) -> Iterator[Program]:
    """Our worker; after the test nothing is left running on it."""
    yield fleet[1]
    wait_until(lambda: idle(fleet[1].url))


def test_fastchats_api_server_lists_our_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_fastchats_api_server_chats_with_our_worker(client: openai.OpenAI, worker: Program) -> None:
    """Streamed or whole, the answer is the one the worker gives to the same messages: the conversation template that
    the worker announces renders what its own chat template renders."""
    direct = post(f"{worker.url}/worker_generate", {**GREEDY, "prompt": None, "messages": HELLO}).json()["text"]
    asked = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == direct != ""
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == direct
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]


def test_fastchats_api_server_passes_our_logprobs_on(client: openai.OpenAI, worker: Program) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.choices[0].text == own_text(worker)
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 12
    best = [max(top.values()) for top in logprobs.top_logprobs]
    assert best == logprobs.token_logprobs
    stream = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_fastchats_token_check_counts_with_our_worker(api_server: Program) -> None:
    prompts = [{"model": MODEL, "prompt": PROMPT, "max_tokens": room} for room in (4091, 4092)]
    checked = post(f"{api_server.url}/api/v1/token_check", {"prompts": prompts}).json()["prompts"]
    assert checked == [{"fits": fits, "tokenCount": 5, "contextLength": 4096} for fits in (True, False)]


def test_fastchats_embeddings_come_from_our_worker(client: openai.OpenAI, worker: Program) -> None:
    """More texts than FastChat puts into one call; OpenAI's client asks for base64 unless told otherwise."""
    texts = ["one", "two", "three", "four", "five"]
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float").data
    packed = client.embeddings.create(model=MODEL, input=texts).data
    direct = post(f"{worker.url}/worker_get_embeddings", {"input": texts}).json()["embedding"]
    assert [entry.embedding for entry in plain] == direct
    for entry, vector in zip(packed, direct, strict=True):
        assert entry.embedding == pytest.approx(vector, abs=1e-6)


def test_fastchats_test_message_gets_an_answer(fleet: tuple[Program, Program], worker: Program) -> None:
    """It asks the controller for the worker, builds the prompt itself, and prints what the worker says."""
    message = "What is the capital of a country that has no name and no people?" * 3
    arguments = ["--controller-address", fleet[0].url, "--model-name", MODEL, "--message", message]
    with program("fastchat.serve.test_message", *arguments, "--max-new-tokens", "200") as client:
        assert client.process.wait(processes.START_S) == 0, client.output()
        assert f"worker_addr: {worker.url}" in client.output()
        answer = client.output().partition("\nAssistant: ")[2]
    conversation = get_conv_template("one_shot")
    conversation.append_message(conversation.roles[0], message)
    conversation.append_message(conversation.roles[1], None)
    stop = conversation.stop_str
    direct = own_text(worker, prompt=conversation.get_prompt(), max_new_tokens=200, stop=stop)
    assert answer.strip() == direct.strip() != ""


def test_an_error_of_our_worker_reaches_fastchats_client(client: openai.OpenAI, worker: Program) -> None:
    """The worker's error frame becomes an event of FastChat's stream, which is how that server tells errors."""
    asked = {"model": MODEL, "prompt": PROMPT, "presence_penalty": 5, "stream": True}
    events = post(f"{client.base_url}completions", asked).text.split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["error_code"] == 40302
    assert events[1] == "data: [DONE]"
