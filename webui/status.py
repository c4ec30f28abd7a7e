"""The line of figures under an answer, and the notices, as HTML."""

from html import escape

from webui.live import LiveAnswer

_ENDINGS = {"length": "cut at the longest length"}


def status_line(live: LiveAnswer) -> str:
    """Tokens, steps and speed of an answer, while it grows and after."""
    parts = [*_figures(live), *_ending(live)]
    state = "ended" if live.ended else "growing"
    return f'<div class="status {state}" role="status">{"".join(parts)}</div>' + problem(live.error)


def _figures(live: LiveAnswer) -> list[str]:
    if live.first_token_s is None:
        return [] if live.ended else [_figure(f"{live.waited_s:.1f} s", "waiting for the first token")]
    summary = live.summary()
    parts = []
    if summary:
        parts = [
            _figure(str(summary.tokens), "tokens"),
            _figure(str(summary.steps), "steps"),
            _figure(f"{summary.tokens_per_step:.2f}", "tokens/step"),
            _figure(f"{summary.tokens_per_s:.1f}", "tokens/s"),
        ]
        if summary.pace is not None:
            parts.append(_figure(f"{summary.pace:.2f}×", "vanilla's pace"))
        if not summary.exact:
            parts.append(_figure("lossy", "typical acceptance"))
    return [
        *parts,
        _figure(f"{live.elapsed_s:.1f} s", "elapsed"),
        _figure(f"{live.first_token_s:.2f} s", "first token"),
    ]


def _figure(value: str, label: str) -> str:
    return f'<span class="figure"><b>{value}</b> {label}</span>'


def _ending(live: LiveAnswer) -> list[str]:
    text = "stopped" if live.stopped else _ENDINGS.get(live.finish_reason or "")
    return [f'<span class="ending">{text}</span>'] if text else []


def problem(message: str | None) -> str:
    """What went wrong, in one line; nothing for None."""
    return f'<div class="problem" role="alert">{escape(message)}</div>' if message else ""


def notice(message: str) -> str:
    """A message that stands above the conversation; nothing for an empty one."""
    return f'<div class="notice" role="alert">{escape(message)}</div>' if message else ""
