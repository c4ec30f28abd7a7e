"""Text that only grows: no half characters, no stop string, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tokenizers import byte_tokenizer
from workers.text import REPLACEMENT, Detokenizer, StopScanner, token_text

TOKENIZER = byte_tokenizer()


def pieces(tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [detokenizer.push(token) for token in tokens]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=30))
def test_pieces_join_to_the_whole_text_however_characters_are_split(text: str) -> None:
    shown = pieces(TOKENIZER.encode(text, add_special_tokens=False))
    assert "".join(shown) == text
    assert all(REPLACEMENT not in piece for piece in shown)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_any_tokens_give_text_without_replacement_characters(tokens: list[int]) -> None:
    assert REPLACEMENT not in "".join(pieces(tokens))


def test_an_unfinished_character_is_held_back() -> None:
    tokens = TOKENIZER.encode("a🌊", add_special_tokens=False)
    assert pieces(tokens) == ["a", "", "", "", "🌊"]
    assert pieces(tokens[:-1]) == ["a", "", "", ""]


def test_broken_bytes_do_not_hold_back_what_follows() -> None:
    wave = TOKENIZER.encode("🌊", add_special_tokens=False)
    text = TOKENIZER.encode("good", add_special_tokens=False)
    assert "".join(pieces([wave[0], *text])) == "good"
    assert "".join(pieces([*[wave[0]] * 30, *text])).endswith("good")


def test_bytes_in_logprobs_read_as_bytes() -> None:
    wave = TOKENIZER.encode("🌊", add_special_tokens=False)
    assert [token_text(TOKENIZER, token) for token in wave] == [f"bytes:\\x{byte:02x}" for byte in "🌊".encode()]
    assert token_text(TOKENIZER, TOKENIZER.encode("a", add_special_tokens=False)[0]) == "a"


letters = st.text("abc", max_size=12)


@given(chunks=st.lists(letters, max_size=8), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_at_the_first_one_and_never_show_a_part(chunks: list[str], stops: list[str]) -> None:
    scanner, shown, stopped = StopScanner(stops), "", False
    for chunk in chunks:
        text, stopped = scanner.push(chunk)
        shown += text
        if stopped:
            break
        whole = "".join(chunks)
        assert whole.startswith(shown)
    shown += scanner.flush()
    # The first stop to be completed decides; what precedes the earliest match at that moment is shown.
    whole = "".join(chunks)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert stopped == bool(ends)
    if not ends:
        assert shown == whole
    else:
        assert not any(stop in shown for stop in stops)
        assert whole.startswith(shown)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)


@pytest.mark.parametrize("text", ["###", "# #", "##"])
def test_held_back_text_is_flushed_at_the_end(text: str) -> None:
    scanner = StopScanner(["####"])
    shown = "".join(scanner.push(letter)[0] for letter in text)
    assert shown + scanner.flush() == text
