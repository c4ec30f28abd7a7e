import pytest

from webui.conversation import Parameters, request_body, with_answer, with_question, without_answer

FIELDS = (0.5, 0.9, 40.0, 0.1, 1.1, 64.0, " 7 ", " be brief ")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_turns_alternate() -> None:
    history = with_answer(with_question([], "a"), "A")
    assert with_question(history, "b") == [_user("a"), _assistant("A"), _user("b")]


def test_a_question_without_an_answer_is_dropped_by_the_next() -> None:
    failed = with_answer(with_question([], "a"), "")
    assert failed == [_user("a")]
    assert with_question(failed, "b") == [_user("b")]


def test_regenerating_removes_only_the_last_answer() -> None:
    history = [_user("a"), _assistant("A")]
    assert without_answer(history) == without_answer([_user("a")]) == [_user("a")]
    assert without_answer([]) == []


def test_every_parameter_is_sent() -> None:
    assert request_body("m", "ngram", [_user("a")], Parameters.read(*FIELDS)) == {
        "model": "m",
        "method": "ngram",
        "messages": [{"role": "system", "content": "be brief"}, _user("a")],
        "trace": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "max_tokens": 64,
        "seed": 7,
    }


def test_empty_fields_are_left_to_the_worker() -> None:
    body = request_body("m", None, [_user("a")], Parameters.read(*FIELDS[:6], "", ""))
    assert not {"seed", "method"} & set(body)
    assert body["messages"] == [_user("a")]


def test_what_cannot_be_asked_is_one_line() -> None:
    with pytest.raises(ValueError, match="the seed must be a whole number, not 'x'"):
        Parameters.read(*FIELDS[:6], "x", "")
    with pytest.raises(ValueError, match="no model"):
        request_body(None, "", [], Parameters.read(*FIELDS))
