"""polydecode: several tokens per forward pass, and every step to be seen.

``from polydecode import Engine`` decodes in this process, ``custom_generate`` inside ``model.generate``; the
``polydecode`` command starts everything else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.custom_generate import custom_generate
    from workers.engine import Engine

__all__ = ["Engine", "custom_generate"]


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, only when it is asked for: the command starts without them."""
    if name == "Engine":
        from workers.engine import Engine

        return Engine
    if name == "custom_generate":
        from workers.custom_generate import custom_generate

        return custom_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
