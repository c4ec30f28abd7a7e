"""The methods by name. A new method is a new file beside this one and a line here."""

from workers.decoding.interface import Method
from workers.decoding.lookahead import Lookahead
from workers.decoding.ngram import Ngram, WithNgrams
from workers.decoding.vanilla import Vanilla

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "ngram": Ngram,
    "lookahead": Lookahead,
}
BASELINE = "vanilla"  # always served
NGRAM_SUFFIX = "+ngram"


class UnknownMethod(Exception):
    """No such method; the message is one line that lists the known ones."""


def make_method(name: str) -> Method:
    """A new instance of the method called ``name``: one of METHODS, or one with ``+ngram``. Raises UnknownMethod."""
    base = name.removesuffix(NGRAM_SUFFIX)
    if base not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UnknownMethod(f"unknown method {name!r}; known: {known}, and each of them with {NGRAM_SUFFIX}")
    method = METHODS[base]()
    return WithNgrams(method) if base != name else method
