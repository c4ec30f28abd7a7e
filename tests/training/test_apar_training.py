"""APAR: what forks, the published files, packed trees, and that training teaches a tiny model to fork."""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.support.families import tiny_model
from tests.support.tiny import CHILD, FORK, forking_checkpoint, save_tiny
from tests.support.tokenizers import byte_tokenizer
from training.answers import Answer, AnswerFile
from training.apar import app, tree_loss, with_lora
from training.apar_data import Chat, Sample, is_repetitive, read_trees, sorted_out, write_data
from training.own_threads import own_tree
from training.paragraph_tree import ParagraphTree, packed, tree_of
from training.structure import Structured, structure
from workers.engine import Engine
from workers.forking import ControlTokens
from workers.model.lora import add_tokens

CONTROL = ControlTokens(263, 264)
LIST = (
    "Some things:\n\n1. **Sun:** It is a star, and warm.\n\n2. Moon: It circles the earth.\n\n"
    "3. Mars: A red planet.\n\nEnough."
)


def test_an_ordered_list_forks_behind_its_titles() -> None:
    found = structure(LIST)
    assert found
    assert found.pieces == ("Some things:\n\n1. **Sun:**", "\n\n2. Moon:", "\n\n3. Mars:", "\n\nEnough.")
    assert found.details == (" It is a star, and warm.", " It circles the earth.", " A red planet.")


def test_paragraphs_fork_behind_their_first_sentences() -> None:
    paragraph = "The first sentence is long enough. The second one follows it. And a third."
    found = structure("\n\n".join([paragraph] * 3))
    assert found
    assert found.pieces == (
        "The first sentence is long enough.",
        "\n\nThe first sentence is long enough.",
        "\n\nThe first sentence is long enough.",
        "",
    )
    assert is_repetitive(found)


@given(st.text(alphabet="ab .:\n123", max_size=200))
def test_no_character_is_lost(answer: str) -> None:
    found = structure(answer)
    assert found is None or found.text == answer


pieces = st.lists(st.text(alphabet="ab \n", min_size=1, max_size=9), min_size=1, max_size=5)


@given(pieces, st.data())
def test_published_files_are_read_as_they_were_written(texts: list[str], data: st.DataObject) -> None:
    details = data.draw(st.lists(st.text(min_size=1, max_size=9), min_size=len(texts) - 1, max_size=len(texts) - 1))
    sample = Sample("7", "question", Structured(tuple(texts), tuple(details), loop=("again", "")[: len(texts) - 1]))
    with tempfile.TemporaryDirectory() as folder:
        write_data([sample], [], Path(folder))
        assert read_trees(Path(folder) / "apar.json") == [sample]


def test_chats_are_sorted_out() -> None:
    loop = "It is as it is and so it goes on. " * 9
    chats = [
        Chat("1", "a", LIST),
        Chat("2", "b", "```x = 1```"),
        Chat("3", "c", "Hello."),
        Chat("4", "d", loop, own=True),
    ]
    structured, unstructured = sorted_out(chats)
    assert [sample.index for sample in structured] == ["1"]
    assert [sample.index for sample in unstructured] == ["2", "4"]
    assert unstructured[1].answer == Structured(("It is as it is and so it goes on.",), (), cut=True)


def test_what_was_cut_does_not_end() -> None:
    tokenizer, end = byte_tokenizer(added=["[Fork]", "[Child]"]), 2
    whole, cut_behind, cut_within = (
        tree_of([1], found, tokenizer, CONTROL)
        for text, cut in ((LIST, False), (LIST, True), (LIST.removesuffix("et.\n\nEnough."), True))
        if (found := structure(text, cut=cut))
    )
    assert [whole.root[-1], *(child[-1] for child in whole.children)] == [end] * 4
    assert cut_behind.root == whole.root[:-1] and cut_behind.children == whole.children
    assert cut_within.root[-1] == CONTROL.fork and cut_within.children[-1][-1] != end


def threads_of(root: str, details: list[str], *, ended: bool = True) -> list[Answer]:
    """A model's threads; ``root`` forks at each |."""
    tokenizer, end = byte_tokenizer(added=["[Fork]", "[Child]"]), [2]
    tokens: list[int] = []
    starts = []
    for piece in root.split("|"):
        starts.append(len(tokens))
        tokens += [*([CONTROL.fork] if tokens else []), *tokenizer.encode(piece, add_special_tokens=False)]
    first = Answer("tiny", 99, [1, 9], tokens + end * ended, "")
    children = [
        Answer("tiny", 99, [1, 9, *tokens[: start + 1], CONTROL.child], tokenizer.encode(detail) + end, "")
        for start, detail in zip(starts[1:], details, strict=False)
    ]
    return [first, *children]


def test_an_own_list_ends_where_a_title_comes_back() -> None:
    tokenizer = byte_tokenizer(added=["[Fork]", "[Child]"])
    details = [" It is a star.", " It circles the earth.", " A red planet.", " A star, and warm.", " Red."]
    root = "1. Sun:|\n2. Moon:|\n3. Mars:|\n4. Sun:|\n5. Mars:|"
    found = own_tree("7", "question", threads_of(root, details), tokenizer)
    loop = ("\n4. Sun:", "\n5. Mars:")
    ended = Structured(("1. Sun:", "\n2. Moon:", "\n3. Mars:", ""), tuple(details[:3]), loop=loop)
    assert found == Sample("7", "question", ended)
    whole = own_tree("7", "question", threads_of("1. Sun:|\n2. Moon:|\nEnough.", details, ended=False), tokenizer)
    assert whole
    assert whole.answer == Structured(("1. Sun:", "\n2. Moon:", "\nEnough."), tuple(details[:2]), cut=True)
    assert not own_tree("7", "question", threads_of("1. Sun:|\n2. Moon:|", ["", ""]), tokenizer)


@pytest.mark.parametrize("cut", [False, True])
def test_of_a_loop_only_its_ends_are_learned(cut: bool) -> None:
    """And that of the list before it, unless it was too short to be one."""
    answer = Structured(("1. Sun:", "\n2. Moon:", ""), (" A star.", " A moon."), cut, ("\n3. Sun:", "\n4. Sun:"))
    tree = tree_of([1], answer, byte_tokenizer(added=["[Fork]", "[Child]"]), CONTROL)
    batch, rows = packed([tree]), len(tree.said)
    forks = [place for place, token in enumerate(tree.said) if token == CONTROL.fork]
    ends = (batch.labels[:rows] == 2).nonzero()[:, 0].tolist()
    assert ends == forks[2 if cut else 1 :]
    assert (batch.labels[forks[1] + 1 : rows] >= 0).sum() == 2
    assert batch.mask[0, 0, rows:, forks[1] + 1 : rows].sum() == 0  # no child sees it


def trees() -> list[ParagraphTree]:
    found = structure(LIST)
    assert found
    tokenizer = byte_tokenizer(added=["[Fork]", "[Child]"])
    plain = Structured(("Never.",), ())
    return [tree_of([1, 2, 3, 4], answer, tokenizer, CONTROL) for answer in (found, plain, found)]


def test_a_packed_tree_has_the_losses_of_its_paths() -> None:
    model = tiny_model("llama")
    batch = packed(trees())
    with torch.inference_mode():
        mask = torch.where(batch.mask, 0.0, torch.finfo(torch.float32).min)
        logits = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=mask).logits[0]
        ours = cross_entropy(logits, batch.labels, reduction="sum")
        theirs = 0.0
        counted = 0
        for tree in trees():
            for tokens, masked in tree.paths:
                own = torch.tensor([tokens])
                theirs += float(cross_entropy(model(own).logits[0, masked - 1 : -1], own[0, masked:], reduction="sum"))
                counted += len(tokens) - masked
    assert counted == int((batch.labels >= 0).sum())
    assert abs(float(ours) - theirs) < 1e-3 * theirs
    assert abs(float(tree_loss(model, trees())) - theirs / counted) < 1e-3


def test_the_commands_make_an_adapter_that_is_served(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    chats = tmp_path / "chats.jsonl"
    answers = [LIST, "```x = 1```", "No structure."]
    chats.write_text("".join(json.dumps({"prompt": "Name some.", "answer": answer}) + "\n" for answer in answers))
    _run("prepare", "--chats", chats, "--out", tmp_path / "data")
    assert (tmp_path / "data" / "forks.png").is_file()
    options = [
        "--data",
        tmp_path / "data",
        "--model-path",
        model,
        "--trees",
        2,
        "--rank",
        2,
        "--cache",
        tmp_path / "cache",
    ]
    options += ["--steps", 3, "--trees", 2]
    _run(*options, "--out", tmp_path / "apar")
    _run(*options, "--out", tmp_path / "again", "--resume")  # nothing is left to do
    _run(*options, "--out", tmp_path / "further", "--start", tmp_path / "apar", "--cache", tmp_path / "other")
    refused = CliRunner().invoke(
        app, [str(one) for one in [*options, "--seed", 1, "--out", tmp_path / "x", "--resume"]]
    )
    assert "is of another training" in str(refused.exception)
    first, again, further = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("apar", "again", "further")
    )
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() == further.keys() and not all(torch.equal(first[name], further[name]) for name in first)
    assert json.loads((tmp_path / "apar" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert not (tmp_path / "apar" / "README.md").exists()
    _run("average", tmp_path / "apar", tmp_path / "further", "--share", 0.25, "--out", tmp_path / "between")
    between = load_file(tmp_path / "between" / "adapter_model.safetensors")
    assert all(torch.allclose(between[name], first[name].lerp(further[name], 0.25), atol=1e-3) for name in first)
    origin = json.loads((tmp_path / "apar" / "provenance.json").read_text())
    assert origin["data"]["answers"] == {"all": 3, "fork": 1, "must not": 1}
    further_origin = json.loads((tmp_path / "further" / "provenance.json").read_text())
    assert further_origin["start"] == origin
    assert "--start apar " in further_origin["command"] and str(tmp_path) not in json.dumps(further_origin)
    with Engine.load(str(model), method="apar", adapters={"apar": tmp_path / "apar"}, kv_tokens=512) as engine:
        assert list(engine.generate("Hello", max_new_tokens=3))[-1].finish_reason


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_learns_to_say_fork(tied: bool) -> None:
    """Also one whose output table is not its input table: both rows of the token are trained."""
    torch.manual_seed(0)
    model: Any = tiny_model("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    tokenizer = byte_tokenizer()
    added = add_tokens(model, tokenizer, ["[Fork]", "[Child]"])
    found = structure(LIST)
    assert found
    tree = tree_of([1, 2, 3, 4], found, tokenizer, ControlTokens(added["[Fork]"], added["[Child]"]))
    trained = with_lora(model, list(added.values()), rank=8)
    optimizer = torch.optim.AdamW([one for one in trained.parameters() if one.requires_grad], lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        tree_loss(trained, [tree]).backward()
        optimizer.step()
    with torch.inference_mode():
        logits = trained(torch.tensor([[*tree.prompt, *tree.root]])).logits[0]
    assert all(int(logits[place - 1].argmax()) == added["[Fork]"] for place in tree.forks)


def test_pieces_are_encoded_as_they_are_said() -> None:
    """Also by a tokenizer that puts a space before whatever it encodes."""
    core = Tokenizer(BPE(vocab={letter: place for place, letter in enumerate("▁abc.\n")}, merges=[], unk_token="c"))
    core.pre_tokenizer = Metaspace(prepend_scheme="first")
    core.decoder = MetaspaceDecoder(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="c")
    found = Structured(("a:", "\nb:", "."), (" ab", " b"))
    tree = tree_of([], found, tokenizer, CONTROL)
    said = [token for token in tree.root if token != CONTROL.fork]
    assert tokenizer.decode(said[:-1]).lstrip() == "".join(found.pieces).replace(":", "c")
    assert [tokenizer.decode([0, *child[1:-1]]) for child in tree.children] == [" ab", " b"]


def test_threads_are_answers_behind_the_paths_on_which_they_began(tmp_path: Path) -> None:
    with Engine(forking_checkpoint, methods=["apar"], kv_tokens=4096) as engine:
        engine.generate = partial(engine.generate, logit_bias={FORK: 6.0})
        file = AnswerFile(tmp_path / "answers.jsonl")
        first, *others = file.threads(engine, [{"role": "user", "content": "Hi"}], 30, "apar")
        forks = [place for place, token in enumerate(first.answer[:-2]) if token == FORK]  # at the end is no room
        assert len(forks) > 2
        for fork, thread in zip(forks, others, strict=True):
            assert thread.prompt == [*first.prompt, *first.answer[: fork + 1], CHILD]
        engine.generate = None
        again = AnswerFile(tmp_path / "answers.jsonl").threads(engine, [{"role": "user", "content": "Hi"}], 30, "apar")
        assert again == [first, *others]


def _run(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not result.exception, result.output
