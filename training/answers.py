"""The model's own greedy answers, decoded once by the batched engine and kept in a file.

They are what heads and prompt tokens learn to foresee (self-distillation), and what replays start from.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from protocol.generation import ChatMessage
from training.kept import Kept
from workers.engine import Engine
from workers.warm_up import WarmUp

logger = logging.getLogger(__name__)

TOGETHER = 48  # conversations that are answered in common forward passes

Messages = list[dict[str, str]]
Key = tuple[str, int, tuple[int, ...]]  # model, new tokens, prompt


@dataclass(frozen=True)
class Answer:
    """A greedy answer of at most ``new_tokens``: token ids of the rendered prompt and of the answer, and its text."""

    model: str
    new_tokens: int
    prompt: list[int]
    answer: list[int]
    text: str

    @property
    def key(self) -> Key:
        return self.model, self.new_tokens, tuple(self.prompt)


class AnswerFile:
    """A JSONL file of answers; each is appended when it is there, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self._kept = Kept(path, Answer)

    def answer(self, engine: Engine, messages: Messages, new_tokens: int) -> Answer:
        """The answer to a conversation: known, or decoded now."""
        prompt = engine.renderer.render([ChatMessage.model_validate(message) for message in messages]).token_ids
        if known := self._kept.found.get((engine.name, new_tokens, tuple(prompt))):
            return known
        tokens: list[int] = []
        text = ""
        for event in engine.generate(messages, method="vanilla", temperature=0, max_new_tokens=new_tokens):
            text += event.text
            if event.step:
                tokens += event.step.threads[0].token_ids
        answer = Answer(engine.name, new_tokens, prompt, tokens, text)
        self._kept.add(answer)
        return answer

    def of(self, model: str) -> list[Answer]:
        """All known answers of a model."""
        return [answer for answer in self._kept.found.values() if answer.model == model]


def answers(
    engine: Engine,
    prompts: Iterable[str],
    new_tokens: int,
    file: AnswerFile,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Answer]:
    """Answers to single prompts, in their order; ``progress`` hears how many are there."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = pool.map(lambda prompt: file.answer(engine, [{"role": "user", "content": prompt}], new_tokens), prompts)
        for done, answer in enumerate(found, 1):
            progress(done)
            yield answer


def own_answers(model_path: str, prompts: Sequence[str], new_tokens: int, path: Path) -> list[Answer]:
    """A model's answers of more than one token; see :func:`answers_of`."""
    return [answer for answer in answers_of(model_path, prompts, new_tokens, path) if len(answer.answer) > 1]


def answers_of(model_path: str, prompts: Sequence[str], new_tokens: int, path: Path) -> list[Answer]:
    """A model's answer to each prompt, with the engine that serves; those in the file ``path`` are known."""
    with Engine.load(model_path, kv_tokens=65536, max_requests=64) as engine:
        WarmUp(engine, model_path, measure=False).wait()

        def progress(done: int) -> None:
            if done % 100 == 0:
                logger.info("%d of %d prompts answered", done, len(prompts))

        return list(answers(engine, prompts, new_tokens, AnswerFile(path), progress))
