"""The methods by name. A new method is a new file beside this one and a line here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from workers.decoding.int8_heads import load_drafting_heads
from workers.decoding.interface import BadAdapter, Method
from workers.decoding.lookahead import Lookahead
from workers.decoding.medusa import Medusa
from workers.decoding.ngram import Ngram, WithNgrams
from workers.decoding.ppd import Ppd
from workers.decoding.ppd_checkpoint import load_prompt_tokens
from workers.decoding.vanilla import Vanilla

METHODS: dict[str, Callable[[], Method]] = {
    "vanilla": Vanilla,
    "ngram": Ngram,
    "lookahead": Lookahead,
}
# Methods that need trained weights, and how these are loaded from a path for a model.
TRAINED: dict[str, tuple[Callable[[Any], Method], Callable[[Path, PreTrainedModel], Any]]] = {
    "medusa": (Medusa, load_drafting_heads),
    "ppd": (Ppd, load_prompt_tokens),
}
BASELINE = "vanilla"  # always served
NGRAM_SUFFIX = "+ngram"

Adapters = Mapping[str, Any]  # kind → its loaded weights, which know their ``nbytes``


class UnknownMethod(Exception):
    """No such method; the message is one line that lists the known ones."""


def load_adapters(paths: Mapping[str, Path], model: PreTrainedModel) -> Adapters:
    """Load trained weights by kind for a model. Raises BadAdapter."""
    if unknown := [kind for kind in paths if kind not in TRAINED]:
        raise BadAdapter(f"unknown kind of adapter {unknown[0]!r}; known: {', '.join(sorted(TRAINED))}")
    return {kind: TRAINED[kind][1](path, model) for kind, path in paths.items()}


def check_method(name: str) -> str:
    """The kind of adapter that the method ``name`` needs, or "". Raises UnknownMethod."""
    base = name.removesuffix(NGRAM_SUFFIX)
    if base not in METHODS and base not in TRAINED:
        known = ", ".join(sorted([*METHODS, *TRAINED]))
        raise UnknownMethod(f"unknown method {name!r}; known: {known}, and each of them with {NGRAM_SUFFIX}")
    return base if base in TRAINED else ""


def make_method(name: str, adapters: Adapters | None = None) -> Method:
    """A new instance of the method called ``name``: one of METHODS or TRAINED, or one with ``+ngram``.

    Raises:
        UnknownMethod: no such method.
        BadAdapter: its adapter is not among ``adapters``.
    """
    kind, base = check_method(name), name.removesuffix(NGRAM_SUFFIX)
    if kind and kind not in (adapters or {}):
        raise BadAdapter(f"method {name!r} needs trained weights: --adapter {kind}=PATH")
    method = TRAINED[kind][0]((adapters or {})[kind]) if kind else METHODS[base]()
    return WithNgrams(method) if base != name else method
