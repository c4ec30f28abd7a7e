"""Asks all questions of a run, many at a time, and journals each answer as it comes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from protocol.client import ControllerClient
from protocol.errors import ErrorCode, RequestError
from traces.client import Answer, ask
from traces.datasets import Question
from traces.results import Record, ResultFile
from traces.settings import RunSettings

BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)

# What a worker that restarts looks like from outside. INVALID_MODEL too: the model had workers when the run began.
_PASSING = {
    ErrorCode.CONTROLLER_NO_WORKER,
    ErrorCode.CONTROLLER_WORKER_TIMEOUT,
    ErrorCode.ENGINE_OVERLOADED,
    ErrorCode.RATE_LIMIT,
    ErrorCode.INVALID_MODEL,
}


@dataclass(frozen=True)
class Job:
    """A question to ask, and the file its answer goes to."""

    question: Question
    results: ResultFile


class Collector:
    """Runs jobs against one controller."""

    def __init__(
        self, client: ControllerClient, settings: RunSettings, back_off_s: tuple[float, ...] = BACK_OFF_S
    ) -> None:
        self._client = client
        self._settings = settings
        self._back_off_s = back_off_s

    async def run(self, jobs: list[Job], concurrency: int, finished: Callable[[Job, Record], None]) -> None:
        """Ask all questions, ``concurrency`` at a time; ``finished`` hears of each after it was journaled."""
        places = asyncio.Semaphore(concurrency)

        async def work(job: Job) -> None:
            async with places:
                record = await self._record(job.question)
                job.results.append(record)
                finished(job, record)

        await asyncio.gather(*map(work, jobs))

    async def _record(self, question: Question) -> Record:
        """All turns of a question, each with the answers before it as history. A failure is recorded, not raised.

        Answers that leave no room for a later turn are no failure: asked again, they would be as long.
        """
        record: Record = {**question.model_dump(), **self._settings.identity(), "answers": [], "traces": []}
        messages: list[dict[str, str]] = []
        try:
            for turn in question.turns:
                messages.append({"role": "user", "content": turn})
                answer = await self._ask(messages)
                messages.append({"role": "assistant", "content": answer.text})
                record["answers"].append(answer.text)
                record["traces"].append(answer.trace.model_dump(mode="json", exclude_none=True))
        except RequestError as error:
            full = error.code == ErrorCode.CONTEXT_OVERFLOW and record["answers"]
            record["left_out" if full else "error"] = error.message
        return record

    async def _ask(self, messages: list[dict[str, str]]) -> Answer:
        body = self._settings.body(messages)
        for pause in self._back_off_s:
            try:
                return await ask(self._client, body)
            except RequestError as error:
                if error.code not in _PASSING:
                    raise
                await asyncio.sleep(pause)
        return await ask(self._client, body)
