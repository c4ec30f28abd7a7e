"""The page's behaviour: what its buttons do."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from protocol.client import ControllerClient
from webui.catalogue import Catalogue, look
from webui.conversation import History, Parameters, request_body, with_answer, with_question, without_answer
from webui.layout import Layout, lay_out
from webui.live import Answers
from webui.status import notice, problem, status_line

LOOK_AGAIN_S = 3  # while there is no model

Updates = dict[Any, Any]


class Page:
    """One page for all sessions; a session's conversation and model list live in ``gr.State``."""

    def __init__(self, client: ControllerClient) -> None:
        self._client = client
        self._answers = Answers(client)

    def build(self) -> gr.Blocks:
        """Lay the page out and connect it."""
        with gr.Blocks(title="polydecode", analytics_enabled=False, fill_width=True) as blocks:
            self._parts = parts = lay_out()
            self._history = gr.State([])
            self._catalogue = gr.State(Catalogue({}))
            self._timer = gr.Timer(LOOK_AGAIN_S, active=False)
            self._connect(blocks, parts)
        return blocks

    def _connect(self, blocks: gr.Blocks, parts: Layout) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        once: dict[str, Any] = {**quiet, "trigger_mode": "once"}
        fields = [getattr(parts.parameters, field.name) for field in dataclasses.fields(parts.parameters)]
        asking = [self._history, parts.model, parts.method, *fields]
        buttons = [parts.send, parts.stop, parts.regenerate, parts.clear]
        shown = [self._history, parts.question, parts.chatbot, parts.status, *buttons]
        menus = [self._catalogue, parts.model, parts.method, parts.notice, self._timer]
        gr.on([parts.question.submit, parts.send.click], self.send, [parts.question, *asking], shown, **once)
        gr.on([parts.regenerate.click], self.regenerate, asking, shown, **once)
        gr.on([parts.stop.click], self.stop, None, None, queue=False)
        gr.on([parts.clear.click], self.clear, None, shown, **quiet)
        gr.on([blocks.load, parts.refresh.click, self._timer.tick], self.refresh, asking[1:3], menus, **quiet)
        gr.on([parts.model.input], self.choose_model, [self._catalogue, parts.model], [parts.method], **quiet)
        blocks.unload(self.stop)

    async def send(self, request: gr.Request, question: str, history: History, *choices: Any) -> AsyncIterator[Updates]:
        """Ask a new question."""
        if question.strip():
            asked = with_question(history, question.strip())
            async for updates in self._answer(request, asked, choices, {self._parts.question: ""}):
                yield updates

    async def regenerate(self, request: gr.Request, history: History, *choices: Any) -> AsyncIterator[Updates]:
        """Ask the last question again."""
        if asked := without_answer(history):
            async for updates in self._answer(request, asked, choices, {}):
                yield updates

    async def _answer(
        self, request: gr.Request, asked: History, choices: tuple[Any, ...], accepted: Updates
    ) -> AsyncIterator[Updates]:
        """Draw the answer as it grows. The conversation keeps what there is of it at the end, also after Stop.

        ``choices`` are the values of model, method and all parameters; ``accepted`` is done once they are seen fit.
        """
        parts = self._parts
        model, method, *parameters = choices
        try:
            body = request_body(model, method, asked, Parameters.read(*parameters))
        except ValueError as error:
            yield {parts.status: problem(str(error))}
            return
        yield {**accepted, **self._busy(True)}
        async for live in self._answers.give(_session(request), body):
            now = with_answer(asked, live.text)
            yield {self._history: now, parts.chatbot: now, parts.status: status_line(live)}
        yield self._busy(False)

    def _busy(self, busy: bool) -> Updates:
        parts = self._parts
        return {
            parts.send: gr.update(visible=not busy),
            parts.stop: gr.update(visible=busy),
            parts.regenerate: gr.update(interactive=not busy),
            parts.clear: gr.update(interactive=not busy),
        }

    async def stop(self, request: gr.Request) -> None:
        """Stop the answer that this session waits for, and with it the worker."""
        self._answers.stop(_session(request))

    async def clear(self) -> Updates:
        """Begin a new conversation."""
        return {self._history: [], self._parts.chatbot: [], self._parts.status: ""}

    async def refresh(self, model: str | None, method: str) -> Updates:
        """Look which models there are; keep what is chosen if it still is there."""
        catalogue = await look(self._client)
        chosen = catalogue.chosen(model)
        parts = self._parts
        return {
            self._catalogue: catalogue,
            parts.model: gr.update(choices=list(catalogue.methods), value=chosen),
            parts.method: _method_menu(catalogue, chosen, method),
            parts.notice: gr.update(value=notice(catalogue.problem), visible=bool(catalogue.problem)),
            self._timer: gr.update(active=chosen is None),
        }

    async def choose_model(self, catalogue: Catalogue, model: str | None) -> Updates:
        """Offer the methods of another model."""
        return {self._parts.method: _method_menu(catalogue, model, "")}


def _method_menu(catalogue: Catalogue, model: str | None, method: str) -> Any:
    choices = catalogue.method_choices(model)
    kept = method if method in dict(choices).values() else ""
    return gr.update(choices=choices, value=kept, visible=len(choices) > 2)


def _session(request: gr.Request) -> str:
    return request.session_hash or ""
