"""What is on the page, and where. What it does is in page.py."""

from dataclasses import dataclass

import gradio as gr

_TITLE = '<div class="title"><b>polydecode</b><span>several tokens per step</span></div>'
_EMPTY = "Ask something. The line below the answer counts its tokens and steps while it is written."


@dataclass(frozen=True)
class ParameterFields:
    """The inputs of :class:`webui.conversation.Parameters`, in its order."""

    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    min_p: gr.Slider
    repetition_penalty: gr.Slider
    max_tokens: gr.Slider
    seed: gr.Textbox
    system: gr.Textbox


@dataclass(frozen=True)
class Layout:
    """The components that the page's functions read and write."""

    model: gr.Dropdown
    method: gr.Dropdown
    refresh: gr.Button
    notice: gr.HTML
    chatbot: gr.Chatbot
    status: gr.HTML
    question: gr.Textbox
    send: gr.Button
    stop: gr.Button
    regenerate: gr.Button
    clear: gr.Button
    parameters: ParameterFields


def lay_out() -> Layout:
    """Build the components; call inside ``gr.Blocks``."""
    model, method, refresh = _header()
    notice = gr.HTML(elem_id="notice", visible=False)
    with gr.Row(elem_id="body"):
        with gr.Column(scale=1, elem_id="talk"):
            chatbot = gr.Chatbot(
                elem_id="chat",
                show_label=False,
                height="100%",
                placeholder=_EMPTY,
                buttons=["copy"],
                allow_tags=False,
                feedback_options=None,
                layout="bubble",
            )
            status = gr.HTML(elem_id="status")
            question, send, stop = _input()
            with gr.Row(elem_id="tools"):
                regenerate = gr.Button("Regenerate", size="sm", min_width=80)
                clear = gr.Button("Clear", size="sm", min_width=80)
        with gr.Column(scale=0, min_width=280, elem_id="side"):
            parameters = _parameters()
    return Layout(model, method, refresh, notice, chatbot, status, question, send, stop, regenerate, clear, parameters)


def _header() -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    with gr.Row(elem_id="header"):
        gr.HTML(_TITLE, elem_id="brand")
        model = gr.Dropdown([], label="Model", elem_id="model", container=False, min_width=120, scale=2)
        method = gr.Dropdown([], label="Method", elem_id="method", container=False, min_width=120, visible=False)
        refresh = gr.Button("↻", elem_id="refresh", size="sm", scale=0, min_width=44)
    return model, method, refresh


def _input() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(elem_id="ask"):
        question = gr.Textbox(
            placeholder="Message", container=False, autofocus=True, lines=1, max_lines=8, scale=1, elem_id="question"
        )
        send = gr.Button("Send", variant="primary", scale=0, min_width=88, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=88, visible=False, elem_id="stop")
    return question, send, stop


def _parameters() -> ParameterFields:
    with gr.Accordion("Parameters", open=True, elem_id="parameters"):
        return ParameterFields(
            temperature=gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0 is greedy"),
            top_p=gr.Slider(0, 1, 1, step=0.01, label="Top p", info="1 is off"),
            top_k=gr.Slider(0, 200, 0, step=1, label="Top k", info="0 is off"),
            min_p=gr.Slider(0, 1, 0, step=0.01, label="Min p", info="0 is off"),
            repetition_penalty=gr.Slider(0.5, 2, 1, step=0.01, label="Repetition penalty", info="1 is off"),
            max_tokens=gr.Slider(1, 4096, 512, step=1, label="Max tokens", info="of the answer"),
            seed=gr.Textbox("", label="Seed", placeholder="random", max_lines=1),
            system=gr.Textbox("", label="System prompt", lines=2, max_lines=8),
        )
