"""What a request can ask of the engine, and how it ends."""

import math
import time
from queue import SimpleQueue

import pytest
import torch

from protocol.errors import ErrorCode, RequestError
from protocol.generation import GenerateParams
from tests.support.oracle import greedy
from tests.support.tiny import tiny_checkpoint, tiny_engine
from workers.engine import Engine
from workers.model.sampling import Sampling
from workers.request import Event


@pytest.fixture(scope="module")
def engine() -> Engine:
    with tiny_engine() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_leaks(engine: Engine):
    yield
    status = engine.status()
    assert (status.running, status.queued, status.free_pages) == (0, 0, status.total_pages)


def run(engine: Engine, prompt="hello", **params) -> list[Event]:
    return list(engine.generate(prompt, **{"temperature": 0, "max_new_tokens": 12, **params}))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def ids_of(events: list[Event]) -> list[int]:
    return [token for event in events for thread in event.step.threads for token in thread.token_ids]


def test_steps_sum_to_completion_tokens(engine: Engine) -> None:
    events = run(engine)
    assert len(ids_of(events)) == events[-1].completion_tokens == events[-1].summary.tokens == 12
    assert events[-1].summary.tokens_per_step == 1.0
    assert events[-1].finish_reason == "length"
    assert events[0].header.prompt_tokens == events[0].prompt_tokens == 5
    assert [event.step.step for event in events] == list(range(12))
    assert events[-1].summary.kv_peak_tokens == 5 + 11


def test_messages_are_rendered_by_the_models_template(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rendered = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = engine.tokenizer.encode(rendered, add_special_tokens=False)
    assert ids.count(engine.tokenizer.bos_token_id) == 1
    expected = greedy(tiny_checkpoint().model, ids, 12, [2])
    assert ids_of(run(engine, messages)) == expected
    assert run(engine, messages)[0].prompt_tokens == len(ids)


def test_stop_strings_are_trimmed_across_token_borders(engine: Engine) -> None:
    whole = text_of(run(engine, max_new_tokens=40))
    start = next(i for i in range(3, len(whole) - 3) if whole.find(whole[i : i + 3]) == i)
    events = run(engine, max_new_tokens=40, stop=[whole[start : start + 3], "never"])
    assert text_of(events) == whole[:start]
    assert events[-1].finish_reason == "stop"
    assert events[-1].completion_tokens < 40


def test_stop_token_ids_end_the_answer_without_showing(engine: Engine) -> None:
    ids = ids_of(run(engine))
    cut = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 2)
    events = run(engine, stop_token_ids=[ids[cut]])
    assert ids_of(events) == ids[: cut + 1]
    assert events[-1].finish_reason == "stop"
    assert text_of(events) == engine.tokenizer.decode(ids[:cut]).replace("\ufffd", "")


def test_logit_bias_decides(engine: Engine) -> None:
    token = engine.tokenizer.convert_tokens_to_ids("x")
    assert text_of(run(engine, logit_bias={token: 100})) == "x" * 12


def test_echo_and_prompt_logprobs(engine: Engine) -> None:
    events = run(engine, "hello there", echo=True, logprobs=2)
    assert text_of(events).startswith("hello there")
    reports = [report for event in events for report in event.tokens]
    ids = engine.renderer.encode("hello there").token_ids + ids_of(events)
    assert [report.token for report in reports] == ids
    with torch.inference_mode():
        expected = tiny_checkpoint().model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    assert reports[0].logprobs is None
    for place, report in enumerate(reports[1:]):
        assert math.isclose(report.logprobs.logprob, expected[place, ids[place + 1]].item(), abs_tol=1e-4)
        assert [token for token, _ in report.logprobs.top] == expected[place].topk(2).indices.tolist()


def test_long_prompts_are_read_in_chunks(engine: Engine) -> None:
    prompt = "abcdefgh" * 62
    assert ids_of(run(engine, prompt, max_new_tokens=4)) == greedy(
        tiny_checkpoint().model, engine.renderer.encode(prompt).token_ids, 4, [2]
    )


def test_closing_the_iterator_cancels(engine: Engine) -> None:
    answer = engine.generate("hello", max_new_tokens=400, temperature=0)
    next(answer)
    answer.close()
    before = engine.counters.finished
    run(engine)  # the engine has gone on to other steps: the cancelled request is gone
    assert engine.counters.finished == before + 1


def test_traces_carry_prompt_and_drafts_only_if_full(engine: Engine) -> None:
    assert run(engine, trace="full")[0].header.prompt_token_ids == engine.renderer.encode("hello").token_ids
    assert run(engine, trace=True)[0].header.prompt_token_ids is None


@pytest.mark.parametrize(
    ("params", "code", "words"),
    [
        ({"prompt": ""}, ErrorCode.PARAM_OUT_OF_RANGE, "must not be empty"),
        ({"prompt": []}, ErrorCode.PARAM_OUT_OF_RANGE, "must not be empty"),
        ({"prompt": "x" * 600}, ErrorCode.CONTEXT_OVERFLOW, "600 tokens"),
        ({"prompt": "x" * 600_000}, ErrorCode.CONTEXT_OVERFLOW, "600000 characters"),
        ({"max_new_tokens": 0}, ErrorCode.PARAM_OUT_OF_RANGE, "max_new_tokens"),
        ({"max_new_tokens": -3}, ErrorCode.PARAM_OUT_OF_RANGE, "max_new_tokens"),
        ({"max_new_tokens": 5000}, ErrorCode.CONTEXT_OVERFLOW, "exceed the context of 512"),
        ({"max_length": 5}, ErrorCode.CONTEXT_OVERFLOW, "length of 5"),
        ({"temperature": math.nan}, ErrorCode.PARAM_OUT_OF_RANGE, "temperature"),
        ({"temperature": -1}, ErrorCode.PARAM_OUT_OF_RANGE, "temperature"),
        ({"top_p": 1.5}, ErrorCode.PARAM_OUT_OF_RANGE, "top_p"),
        ({"top_k": -2}, ErrorCode.PARAM_OUT_OF_RANGE, "top_k"),
        ({"min_p": math.inf}, ErrorCode.PARAM_OUT_OF_RANGE, "min_p"),
        ({"repetition_penalty": 0}, ErrorCode.PARAM_OUT_OF_RANGE, "repetition_penalty"),
        ({"logit_bias": {99999: 1}}, ErrorCode.PARAM_OUT_OF_RANGE, "99999"),
        ({"stop_token_ids": [-1]}, ErrorCode.PARAM_OUT_OF_RANGE, "-1"),
        ({"temperature": "hot"}, ErrorCode.VALIDATION_TYPE_ERROR, "temperature"),
        ({"method": "telepathy"}, ErrorCode.PARAM_OUT_OF_RANGE, "telepathy"),
        ({"model": "gpt-4"}, ErrorCode.INVALID_MODEL, "gpt-4"),
    ],
)
def test_bad_requests_are_refused_in_one_line(engine: Engine, params: dict, code: ErrorCode, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        run(engine, params.pop("prompt", "hello"), **params)
    assert caught.value.code == code
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_null_means_the_default(engine: Engine) -> None:
    nulls = dict.fromkeys(["top_k", "top_p", "min_p", "stop", "stop_token_ids", "logit_bias", "seed", "trace"])
    assert ids_of(run(engine, **nulls)) == ids_of(run(engine))


def test_a_request_that_fails_in_the_step_loses_no_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids_of(run(engine))
    real = Sampling.adjusts_logits.fget

    def explode(self: Sampling) -> bool:
        if self.seed == 666:
            raise RuntimeError("boom")
        return real(self)

    monkeypatch.setattr(Sampling, "adjusts_logits", property(explode))
    good = engine.generate("hello", temperature=0, max_new_tokens=12)
    events = [next(good)]
    with pytest.raises(RequestError, match="boom"):
        run(engine, seed=666)
    assert ids_of(events + list(good)) == expected


def test_a_full_queue_refuses_and_recovers() -> None:
    params = GenerateParams(prompt="a", max_new_tokens=400, temperature=0)
    with tiny_engine(max_requests=1, max_queue=1) as small:
        events: SimpleQueue[Event] = SimpleQueue()
        running = small.submit(params, events.put)
        waiting = small.submit(params, events.put)
        with pytest.raises(RequestError, match="full") as caught:
            small.submit(params, events.put)
        assert caught.value.code == ErrorCode.ENGINE_OVERLOADED
        small.cancel(running)
        small.cancel(waiting)
        assert len(run_when_free(small)) == 3


def run_when_free(engine: Engine) -> list[Event]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            return run(engine, max_new_tokens=3)
        except RequestError:  # cancelled requests leave at the next step
            continue
    raise AssertionError("the queue stayed full")


def test_closing_the_engine_ends_open_requests() -> None:
    small = tiny_engine()
    events: SimpleQueue[Event] = SimpleQueue()
    small.submit(GenerateParams(prompt="a", max_new_tokens=400, temperature=0), events.put)
    small.close()
    last = events.get(timeout=30)
    while not last.last:
        last = events.get(timeout=30)
    assert last.error is not None
    with pytest.raises(RequestError, match="shutting down"):
        small.submit(GenerateParams(prompt="a"), events.put)
