"""FastChat's own workers behind ``/v1``: prompts rendered here, cumulative frames cut into deltas."""

from itertools import product
from typing import Any

import pytest

from controller.conversation import render
from protocol.errors import RequestError
from protocol.fleet import ConvTemplate
from protocol.generation import ChatMessage
from tests.controller.conftest import Controller, StartWorker
from tests.controller.stub_worker import VICUNA, StubWorker

CHAT: dict[str, Any] = {"model": "stub", "messages": [{"role": "user", "content": "Hi"}]}

DIALOGUES = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("system", ""), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye {now}")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("user", "Hi"), ("assistant", ""), ("user", "Again")],
    [("assistant", "I begin"), ("user", "Hi")],
]


def fastchat_templates() -> list[str]:
    conversation = pytest.importorskip("fastchat.conversation")
    return [name for name, conv in conversation.conv_templates.items() if conv.sep_style in range(1, 8)]


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_prompts_equal_fastchats(dialogue: list[tuple[str, str]]) -> None:
    conversation = pytest.importorskip("fastchat.conversation")
    styles = set()
    for name in fastchat_templates():
        theirs = conversation.get_conv_template(name)
        ours = template_of(theirs)
        for role, text in dialogue:
            if role == "system":
                theirs.set_system_message(text)
            else:
                theirs.append_message(theirs.roles[role == "assistant"], text)
        theirs.append_message(theirs.roles[1], None)
        messages = [ChatMessage(role=role, content=text) for role, text in dialogue]
        assert render(ours, messages) == theirs.get_prompt(), name
        styles.add(ours.sep_style)
    assert styles >= {1, 2, 4, 6, 7}


@pytest.mark.parametrize(("style", "dialogue"), list(product(range(1, 8), DIALOGUES)))
def test_every_separator_style_equals_fastchats(style: int, dialogue: list[tuple[str, str]]) -> None:
    conversation = pytest.importorskip("fastchat.conversation")
    theirs = conversation.Conversation(
        name="made up",
        system_template="<{system_message}>",
        system_message="Sys",
        roles=("U", "A"),
        messages=[["U", "example"], ["A", "shown"]],
        offset=2,
        sep_style=conversation.SeparatorStyle(style),
        sep="|",
        sep2="||",
    )
    ours = template_of(theirs)
    for role, text in dialogue:
        if role == "system":
            theirs.set_system_message(text)
        else:
            theirs.append_message(theirs.roles[role == "assistant"], text)
    theirs.append_message("A", None)
    assert render(ours, [ChatMessage(role=role, content=text) for role, text in dialogue]) == theirs.get_prompt()


def template_of(conv: Any) -> ConvTemplate:
    fields = {name: getattr(conv, name) for name in ConvTemplate.model_fields}
    fields |= {
        "sep_style": int(conv.sep_style),
        "roles": list(conv.roles),
        "messages": [list(turn) for turn in conv.messages],
    }
    return ConvTemplate(**fields)


@pytest.mark.parametrize("style", [0, 8, 10])
def test_styles_on_which_fastchats_versions_disagree_are_refused(style: int) -> None:
    with pytest.raises(RequestError, match="separator style"):
        render(ConvTemplate(name="x", sep_style=style), [ChatMessage(role="user", content="Hi")])


async def test_a_chat_is_rendered_clamped_and_cut_into_deltas(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker(own=False, words=("Hel", "lo w\ufffd", "x"))
    stub.decorate = lambda index, frame: frame | {"text": frame["text"].replace("\ufffdx", "örld")}
    await start_worker(stub)
    body = CHAT | {"stop": "END", "stop_token_ids": [7], "top_k": 0, "trace": True, "method": "vanilla"}
    stream = await controller.openai.chat.completions.create(
        model="stub", messages=CHAT["messages"], stream=True, extra_body=body
    )
    assert [chunk.choices[0].delta.content async for chunk in stream] == ["Hel", "lo w", "örld", None]
    sent = stub.requests[0]
    assert sent["prompt"] == "A chat. USER: Hi ASSISTANT:"
    assert sent["max_new_tokens"] == 2048 - len(sent["prompt"].split())
    assert sent["stop"] == ["END", "###"] and sent["stop_token_ids"] == [7, 2] and sent["top_k"] == -1
    assert sent["echo"] is False
    assert not {"messages", "method", "trace", "choice", "text_deltas"} & sent.keys()


async def test_templates_are_asked_once_a_registration(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker(own=False)
    url = await start_worker(stub)
    for _ in range(2):
        assert (await controller.post("/v1/chat/completions", CHAT)).status_code == 200
    assert stub.calls.count("/worker_get_conv_template") == stub.calls.count("/model_details") == 1
    stub.conv = VICUNA | {"system_message": "Another."}
    await controller.register(url, stub)
    await controller.post("/v1/chat/completions", CHAT)
    assert stub.requests[-1]["prompt"].startswith("Another.")


async def test_completions_send_the_prompt_as_it_is(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker(own=False)
    await start_worker(stub)
    answer = await controller.openai.completions.create(model="stub", prompt="Once ", echo=True, max_tokens=3)
    assert answer.choices[0].text == "Once Hello wörld"
    assert stub.requests[0]["prompt"] == "Once " and stub.requests[0]["max_new_tokens"] == 3


async def test_cumulative_logprobs_become_deltas(controller: Controller, start_worker: StartWorker) -> None:
    def with_logprobs(index: int, frame: dict[str, Any]) -> dict[str, Any]:
        count = min(index + 1, 3)
        return frame | {
            "logprobs": {
                "text_offset": list(range(count)),
                "token_logprobs": [None] + [-1.0] * (count - 1),
                "tokens": ["t"] * count,
                "top_logprobs": [None] * count,
            }
        }

    stub = StubWorker(own=False)
    stub.decorate = with_logprobs
    await start_worker(stub)
    answer = await controller.openai.completions.create(model="stub", prompt="Once", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.text_offset == [0, 1, 2]


async def test_the_proxy_refuses_a_method_that_a_fastchat_worker_would_ignore(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker(own=False)
    await start_worker(stub)
    body = {"model": "stub", "prompt": "Hi", "method": "medusa"}
    frame = (await controller.post("/worker_generate_stream", body)).content
    assert b"only knows 'vanilla'" in frame and frame.count(b"\0") == 1
    assert stub.requests == []


@pytest.mark.parametrize("reason", ["abort", ["stop"]])
async def test_finish_reasons_of_their_own_become_stop(
    controller: Controller, start_worker: StartWorker, reason: Any
) -> None:
    stub = StubWorker(own=False)
    stub.decorate = lambda index, frame: frame | {"finish_reason": frame["finish_reason"] and reason}
    await start_worker(stub)
    answer = await controller.openai.chat.completions.create(model="stub", messages=CHAT["messages"])
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "Hello wörld")


async def test_frames_of_text_and_error_code_alone_are_enough(
    controller: Controller, start_worker: StartWorker
) -> None:
    stub = StubWorker(own=False)
    stub.decorate = lambda index, frame: {"text": frame["text"], "error_code": 0}
    await start_worker(stub)
    answer = await controller.openai.chat.completions.create(model="stub", messages=CHAT["messages"])
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "Hello wörld")


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"method": "medusa"}, 400, "vanilla"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "unknown role"),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, 400, "no room"),
    ],
)
async def test_what_a_fastchat_worker_cannot_do_is_refused(
    controller: Controller, start_worker: StartWorker, body: dict[str, Any], status: int, word: str
) -> None:
    stub = StubWorker(own=False)
    await start_worker(stub)
    reply = await controller.post("/v1/chat/completions", CHAT | body)
    assert reply.status_code == status and word in reply.json()["error"]["message"]
    assert stub.requests == [] and controller.in_flight() == 0


async def test_a_malformed_template_is_an_error_in_one_line(controller: Controller, start_worker: StartWorker) -> None:
    stub = StubWorker(own=False)
    stub.conv = {"name": "x"}
    await start_worker(stub)
    reply = await controller.post("/v1/chat/completions", CHAT)
    assert reply.status_code == 500 and "conv.sep_style" in reply.json()["error"]["message"]
