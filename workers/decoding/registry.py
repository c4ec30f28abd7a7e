"""The methods by name. A new method is a new file beside this one and a line here."""

from workers.decoding.interface import Method
from workers.decoding.vanilla import Vanilla

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
}


class UnknownMethod(Exception):
    """No such method; the message is one line that lists the known ones."""


def method_class(name: str) -> type[Method]:
    """The method called ``name``, or UnknownMethod."""
    try:
        return METHODS[name]
    except KeyError:
        raise UnknownMethod(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}") from None
