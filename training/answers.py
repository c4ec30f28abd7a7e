"""The model's own greedy answers, decoded once by the batched engine and kept in a file.

They are what heads and prompt tokens learn to foresee (self-distillation), and what replays start from.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from protocol.generation import ChatMessage, ThreadDelta, thread_deltas
from training.kept import Kept
from workers.decoding.registry import BASELINE
from workers.engine import Engine
from workers.forking import ControlTokens
from workers.warm_up import WarmUp

logger = logging.getLogger(__name__)

TOGETHER = 48  # conversations that are answered in common forward passes

Messages = list[dict[str, str]]
Key = tuple[str, str, int, tuple[int, ...]]  # model, method, new tokens, prompt


@dataclass(frozen=True)
class Answer:
    """A greedy answer of at most ``new_tokens``: token ids of the rendered prompt and of the answer, and its text.

    Where the method forks it is one thread's, and ``prompt`` the path on which it began.
    """

    model: str
    new_tokens: int
    prompt: list[int]
    answer: list[int]
    text: str
    method: str = BASELINE

    @property
    def key(self) -> Key:
        return self.model, self.method, self.new_tokens, tuple(self.prompt)


class AnswerFile:
    """A JSONL file of answers; each is appended when it is there, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self._kept = Kept(path, Answer)

    def answer(self, engine: Engine, messages: Messages, new_tokens: int) -> Answer:
        """The answer to a conversation: known, or decoded now."""
        return self.threads(engine, messages, new_tokens, BASELINE)[0]

    def threads(self, engine: Engine, messages: Messages, new_tokens: int, method: str) -> list[Answer]:
        """The answer's threads, the first one first."""
        prompt = engine.renderer.render([ChatMessage.model_validate(message) for message in messages]).token_ids
        if known := self._known(engine, (engine.name, method, new_tokens, tuple(prompt))):
            return known
        events = engine.generate(messages, method=method, temperature=0, max_new_tokens=new_tokens)
        told = {thread.thread: thread for thread in thread_deltas(event.step for event in events if event.step)}
        threads = [
            Answer(engine.name, new_tokens, path, told[number].token_ids, told[number].text, method)
            for number, path in _paths(told, prompt, engine.control).items()
        ]
        for thread in reversed(threads):  # the first one last: where it is known, the others are
            self._kept.add(thread)
        return threads

    def _known(self, engine: Engine, key: Key) -> list[Answer]:
        """A thread and those that it forked."""
        found = self._kept.found.get(key)
        threads = [found] if found else []
        for path in _forked(found.prompt, found.answer, engine.control) if found else []:
            threads += self._known(engine, (*key[:3], tuple(path)))
        return threads

    def of(self, model: str) -> list[Answer]:
        """All known answers of a model."""
        return [answer for answer in self._kept.found.values() if answer.model == model]


def _paths(told: Mapping[int, ThreadDelta], prompt: list[int], control: ControlTokens | None) -> dict[int, list[int]]:
    """Thread → the path on which it began, in order: a thread's k-th child began at its k-th fork."""
    paths: dict[int, list[int]] = {}
    ahead: dict[int | None, Iterator[list[int]]] = {None: iter([prompt])}  # by parent, where its next child begins
    for number in sorted(told):
        paths[number] = next(ahead[told[number].parent])
        ahead[number] = iter(_forked(paths[number], told[number].token_ids, control))
    return paths


def _forked(prompt: list[int], tokens: list[int], control: ControlTokens | None) -> list[list[int]]:
    """The paths on which a thread's children began."""
    if control is None:
        return []
    forks = [place for place, token in enumerate(tokens) if token == control.fork]
    return [[*prompt, *tokens[: place + 1], control.child] for place in forks]


def answers(
    engine: Engine,
    prompts: Iterable[str],
    new_tokens: int,
    file: AnswerFile,
    method: str = BASELINE,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[list[Answer]]:
    """The threads of the answers to single prompts, in their order; ``progress`` hears how many are there."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = pool.map(
            lambda prompt: file.threads(engine, [{"role": "user", "content": prompt}], new_tokens, method), prompts
        )
        for done, threads in enumerate(found, 1):
            progress(done)
            yield threads


def own_answers(
    model_path: str, prompts: Sequence[str], new_tokens: int, path: Path, method: str = BASELINE
) -> list[Answer]:
    """All threads of more than one token; see :func:`answers_of`."""
    found = answers_of(model_path, prompts, new_tokens, path, method)
    return [answer for threads in found for answer in threads if len(answer.answer) > 1]


def answers_of(
    model_path: str, prompts: Sequence[str], new_tokens: int, path: Path, method: str = BASELINE
) -> list[list[Answer]]:
    """The threads of a model's answer to each prompt; those in the file ``path`` are known."""
    with Engine.load(model_path, method=method, kv_tokens=65536, max_requests=64) as engine:
        WarmUp(engine, model_path, measure=False).wait()

        def progress(done: int) -> None:
            if done % 100 == 0:
                logger.info("%d of %d prompts answered", done, len(prompts))

        return list(answers(engine, prompts, new_tokens, AnswerFile(path), method, progress))
