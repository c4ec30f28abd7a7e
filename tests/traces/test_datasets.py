from pathlib import Path

import pytest

from traces.datasets import BUNDLED, DatasetError, load_datasets


def test_bundled_sets_are_whole() -> None:
    vicuna, mt = load_datasets(list(BUNDLED))
    assert [question.question_id for question in vicuna.questions] == list(range(1, 81))
    assert [question.question_id for question in mt.questions] == list(range(81, 161))
    assert all(len(question.turns) == 1 for question in vicuna.questions)
    assert all(len(question.turns) == 2 for question in mt.questions)


def test_a_set_named_twice_is_loaded_once() -> None:
    assert [dataset.name for dataset in load_datasets(["mt_bench", "mt_bench"])] == ["mt_bench"]


def test_a_path_keeps_the_keys_it_does_not_know(questions: Path) -> None:
    (dataset,) = load_datasets([str(questions)])
    assert dataset.name == "small"
    assert dataset.questions[0].model_dump()["note"] == "kept"


def test_line_separators_inside_strings_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question_id": 1, "turns": ["a\u2028b\x85c"]}\r\n\n', "utf-8")
    assert load_datasets([str(path)])[0].questions[0].turns == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "turns": []}', "line 1: turns:"),
        ('{"turns": ["a"]}', "line 1: question_id:"),
        ("[1]", "line 1: question:"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question', "line 2: not valid JSON"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}', "a question_id occurs twice"),
        ("\n", "no questions"),
        ("\udcff", "cannot read"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match=message) as caught:
        load_datasets([str(path)])
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DatasetError, match=r"no data set 'vicuna'.*vicuna_bench, mt_bench"):
        load_datasets(["vicuna"])


def test_two_files_of_one_name_clash(tmp_path: Path, questions: Path) -> None:
    twin = tmp_path / "other" / "small.jsonl"
    twin.parent.mkdir()
    twin.write_text(questions.read_text())
    with pytest.raises(DatasetError, match="small"):
        load_datasets([str(questions), str(twin)])
