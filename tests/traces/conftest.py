import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stub_controller import StubController


@pytest.fixture
def stub() -> Iterator[StubController]:
    with StubController() as controller:
        yield controller


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A data set of six questions, of two turns each in category b."""
    path = tmp_path / "small.jsonl"
    lines = [
        {"question_id": number, "category": "a" if number < 4 else "b", "turns": [f"q{number}"], "note": "kept"}
        for number in range(1, 7)
    ]
    for line in lines[3:]:
        line["turns"].append(f"again {line['question_id']}")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
