"""Results that are dear to compute, kept in a JSONL file: appended when they are there, found again in the next run."""

import json
from collections.abc import Callable, Hashable
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar


class Keyed(Protocol):
    """A dataclass that knows what it is the result of."""

    @property
    def key(self) -> Hashable: ...


Item = TypeVar("Item", bound=Keyed)


class Kept(Generic[Item]):
    """The file and its content by key; any thread may add to it."""

    def __init__(self, path: Path, make: Callable[..., Item]) -> None:
        """``make`` builds an item from the fields of a line."""
        self._path = path
        self._lock = Lock()
        lines = path.read_text().splitlines() if path.is_file() else []
        self.found: dict[Hashable, Item] = {item.key: item for item in (make(**json.loads(line)) for line in lines)}

    def add(self, item: Item) -> None:
        """Keep an item."""
        fields: dict[str, Any] = asdict(item)  # type: ignore[call-overload]  # every kept kind is a dataclass
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(fields) + "\n")
            self.found[item.key] = item
