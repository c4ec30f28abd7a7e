"""Several answers at once: the choices of one request, merged as they arrive."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from controller.pieces import Piece, pieces
from controller.upstream import Call, Upstream
from protocol.generation import Usage

_Event = tuple[int, Piece | Exception | None]  # which choice; None: it is complete


@asynccontextmanager
async def merged(upstream: Upstream, calls: list[Call]) -> AsyncIterator[AsyncIterator[tuple[int, Piece]]]:
    """Run all calls at once and yield ``(index, piece)`` in order of arrival.

    The first error of any call is raised by the iterator. Leaving the block cancels what still runs and frees it.
    """
    events: asyncio.Queue[_Event] = asyncio.Queue(maxsize=1)  # a slow client slows its workers down, not our memory
    tasks = [asyncio.create_task(_run(upstream, index, call, events)) for index, call in enumerate(calls)]
    try:
        yield _until_all_done(events, len(calls))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(upstream: Upstream, index: int, call: Call, events: asyncio.Queue[_Event]) -> None:
    try:
        async with AsyncExitStack() as stack:
            answer = await upstream.open(stack, call)
            async for piece in pieces(answer):
                await events.put((index, piece))
        await events.put((index, None))
    except Exception as error:
        await events.put((index, error))


async def _until_all_done(events: asyncio.Queue[_Event], running: int) -> AsyncIterator[tuple[int, Piece]]:
    while running:
        index, content = await events.get()
        if isinstance(content, Exception):
            raise content
        if content is None:
            running -= 1
        else:
            yield index, content


class UsageTally:
    """Token counts of a request; the prompt of several choices counts once, as OpenAI has it."""

    def __init__(self, choices_per_prompt: int) -> None:
        self._choices_per_prompt = choices_per_prompt
        self._latest: dict[int, Usage] = {}

    def note(self, index: int, piece: Piece) -> None:
        if piece.usage is not None:
            self._latest[index] = piece.usage

    @property
    def total(self) -> Usage:
        prompts: dict[int, int] = {}
        for index, usage in self._latest.items():
            prompts[index // self._choices_per_prompt] = usage.prompt_tokens
        prompt = sum(prompts.values())
        completion = sum(usage.completion_tokens for usage in self._latest.values())
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
