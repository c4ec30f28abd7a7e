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
FORKING = "apar"  # a request's threads may fork; each of them drafts by the method behind the "+"

Adapters = Mapping[str, Any]  # kind → its loaded weights, which know their ``nbytes``


class UnknownMethod(Exception):
    """No such method; the message is one line that lists the known ones."""


def load_adapters(paths: Mapping[str, Path], model: PreTrainedModel) -> Adapters:
    """Load trained weights by kind for a model. Raises BadAdapter."""
    if unknown := [kind for kind in paths if kind not in TRAINED]:
        raise BadAdapter(f"unknown kind of adapter {unknown[0]!r}; known: {', '.join(sorted(TRAINED))}")
    return {kind: TRAINED[kind][1](path, model) for kind, path in paths.items()}


def forks(name: str) -> bool:
    """Whether a method's name allows threads to fork."""
    return name.partition("+")[0] == FORKING


def drafting_method(name: str) -> str:
    """By which method a thread drafts: ``apar+medusa`` → ``medusa``, ``apar`` → ``vanilla``."""
    return (name.partition("+")[2] or BASELINE) if forks(name) else name


def canonical(name: str) -> str:
    """One name for each method: ``apar`` for ``apar+vanilla``."""
    return FORKING if forks(name) and drafting_method(name) == BASELINE else name


def check_method(name: str) -> str:
    """The kind of adapter that the method ``name`` needs, or "". Raises UnknownMethod."""
    base = drafting_method(name).removesuffix(NGRAM_SUFFIX)
    if base not in METHODS and base not in TRAINED:
        known = ", ".join(sorted([*METHODS, *TRAINED]))
        suffixes = f"each of them with {NGRAM_SUFFIX}, and {FORKING}, alone or as {FORKING}+METHOD"
        raise UnknownMethod(f"unknown method {name!r}; known: {known}, {suffixes}")
    return base if base in TRAINED else ""


def make_method(name: str, adapters: Adapters | None = None) -> Method:
    """A new instance of what drafts in the method called ``name``: one of METHODS or TRAINED, or one with ``+ngram``.

    Raises:
        UnknownMethod: no such method.
        BadAdapter: its adapter is not among ``adapters``.
    """
    kind, drafting = check_method(name), drafting_method(name)
    base = drafting.removesuffix(NGRAM_SUFFIX)
    if kind and kind not in (adapters or {}):
        raise BadAdapter(f"method {name!r} needs trained weights: --adapter {kind}=PATH")
    method = TRAINED[kind][0]((adapters or {})[kind]) if kind else METHODS[base]()
    return WithNgrams(method) if base != drafting else method
