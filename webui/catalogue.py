"""Which models can be asked, and a clear word where there is none."""

from dataclasses import dataclass

from protocol.client import ControllerClient
from protocol.errors import RequestError

OWN_METHOD = ("model's own", "")


@dataclass(frozen=True)
class Catalogue:
    """The models of a controller with their decoding methods, or the reason why there are none."""

    methods: dict[str, list[str]]
    problem: str = ""

    def method_choices(self, model: str | None) -> list[tuple[str, str]]:
        """What the method menu offers: (label, value)."""
        return [OWN_METHOD, *((method, method) for method in self.methods.get(model or "", []))]

    def chosen(self, model: str | None) -> str | None:
        """``model`` if it is (still) there, else the first one."""
        return model if model in self.methods else next(iter(self.methods), None)


async def look(client: ControllerClient) -> Catalogue:
    """Ask the controller."""
    try:
        cards = await client.models()
    except RequestError as error:
        return Catalogue({}, f"{_sentence(error.message)}. This page looks again every few seconds.")
    if not cards:
        return Catalogue(
            {}, "No worker has registered with the controller yet. This page looks again every few seconds."
        )
    return Catalogue({card.id: card.methods for card in cards})


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
