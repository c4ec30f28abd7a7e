"""Token ids to text that only grows: incremental detokenisation, and stop strings held back until decided."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8  # an unfinished character has at most 4 bytes; more than this is no character


class NoText:
    """Stands for a tokenizer where only token ids matter."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return ""


class Detokenizer:
    """Turns one thread's tokens into text, one token at a time.

    Text of a token may depend on the tokens before it (leading spaces, UTF-8 characters split over tokens), so a short
    window is decoded with and without the new token. Bytes that never become a character are dropped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | NoText, context: Sequence[int] = ()) -> None:
        """``context``: the last tokens before the first one that is pushed (a few of the prompt's)."""
        # The tokenizer proper, where there is one: transformers' wrapping costs more than the decoding.
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._ids = list(context)
        self._window = 0  # where the decoded window starts
        self._emitted = len(self._ids)  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._emitted])
        now = self._decode(self._ids[self._window :])
        if now.endswith(REPLACEMENT) and len(self._ids) - self._emitted <= MAX_HELD_TOKENS:
            return ""
        if len(now) > len(before):  # a token without text (a special one) leaves no border to start a window at
            self._window = self._emitted
        self._emitted = len(self._ids)
        return now[len(before) :].replace(REPLACEMENT, "")

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token on its own, as in logprobs; parts of characters read ``bytes:\\xf0\\x9f``, as in OpenAI's API."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    raw = _raw_bytes(str(tokenizer.convert_ids_to_tokens(token))) if REPLACEMENT in text else None
    return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _raw_bytes(piece: str) -> bytes | None:
    """The bytes of a vocabulary entry: SentencePiece's ``<0xF0>``, or GPT-2's printable byte alphabet."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    alphabet = _byte_alphabet()
    return bytes(alphabet[letter] for letter in piece) if all(letter in alphabet for letter in piece) else None


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters → bytes: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class StopScanner:
    """Holds back text that may begin a stop string, and cuts at the first one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was completed (it and what follows is dropped)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [index for index in (text.find(stop) for stop in self._stops) if index >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and turned out to be ordinary text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ends ``text``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
