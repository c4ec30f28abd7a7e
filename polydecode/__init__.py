"""polydecode: several tokens per forward pass, and every step to be seen.

``from polydecode import Engine`` decodes in this process; the ``polydecode`` command starts everything else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, only when it is asked for: the command starts without them."""
    if name != "Engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from workers.engine import Engine

    return Engine
