"""What identification is fed: texts in fair shares, data sets, phrases from a file, and the turns of a chat."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_identification import OPTIONS, TEXT, run, tokenizer

from duohead.identify import haystack
from duohead.identify.assembly import Sample
from duohead.identify.passkeys import WORDS, passkey_sample
from duohead.identify.wording import ChatFrame, Wording, chat_frame

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Words:
    """One token a word, to count whose words are taken."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def numbered(start: int, count: int) -> str:
    return "\n".join(map(str, range(start, start + count)))


def shares(texts: list[str], *, at_most: int) -> list[int]:
    ids = haystack.tokens(texts, Words(), at_least=1, at_most=at_most)  # type: ignore[arg-type]
    return torch.bincount(ids // 100_000, minlength=len(texts)).tolist()


def test_every_text_gives_the_same_share_and_short_ones_leave_theirs_to_the_others() -> None:
    texts = [numbered(i * 100_000, count) for i, count in enumerate((50_000, 300, 50_000))]
    assert shares(texts, at_most=9000) == [4350, 300, 4350]
    assert shares(texts[:1], at_most=9000) == [9000]
    assert sum(shares(texts, at_most=200_000)) == 100_300


def test_of_more_texts_than_pieces_evenly_spaced_ones_are_taken() -> None:
    texts = [numbered(i * 100_000, 9000) for i in range(12)]
    found = shares(texts, at_most=4 * 2048)
    assert [i for i, count in enumerate(found) if count] == [0, 3, 6, 9]
    assert set(found) == {0, 2048}


def test_each_text_keeps_its_order_and_all_count_for_the_least_length() -> None:
    ids = haystack.tokens(["1 2 3", "4 5"], Words(), at_least=5)  # type: ignore[arg-type]
    assert ids.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="6 tokens are needed and it has 5"):
        haystack.tokens(["1 2 3", "4 5"], Words(), at_least=6)  # type: ignore[arg-type]


def test_identification_takes_several_texts() -> None:
    whole = run(text=TEXT)
    halves = run(text=[TEXT[:9000], TEXT[9000:]])
    assert run(text=[TEXT]).alpha.tobytes() == whole.alpha.tobytes() != halves.alpha.tobytes()


def test_texts_are_files_or_the_default_one(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 3)
    assert haystack.texts([tmp_path / "a", tmp_path / "b"]) == ["aaa", "bbb"]
    assert haystack.texts() == [haystack.default_text()]
    with pytest.raises(ValueError, match="give text or dataset, not both"):
        haystack.texts(["a"], dataset="b")


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A library `datasets` with one data set, which remembers what was asked for and read."""
    held = types.SimpleNamespace(asked=[], read=0, rows=[{"id": 1, "text": "one"}])

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        held.asked.append((name, split, streaming))
        if name == "nowhere":
            raise FileNotFoundError("no such data set")
        for row in held.rows:
            held.read += 1
            yield row

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return held


def test_a_data_set_gives_its_texts(datasets: types.SimpleNamespace) -> None:
    datasets.rows += [{"id": 2, "text": " "}, {"id": 3, "text": None}, {"id": 4, "text": "two"}]
    assert haystack.texts(dataset="somebody/books") == ["one", "two"]
    assert datasets.asked == [("somebody/books", "train", True)]
    datasets.rows = [{"body": "three", "id": 1}]
    assert haystack.texts(dataset="books:test") == ["three"]
    datasets.rows = [{"title": "x", "body": "four"}]
    assert haystack.texts(dataset="books:test:body") == ["four"]
    assert datasets.asked[-1] == ("books", "test", True)


def test_no_more_of_a_data_set_is_read_than_needed(
    datasets: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haystack, "_DATASET_CHARACTERS", 250)
    datasets.rows = [{"text": "x" * 100}] * 50
    assert len(haystack.texts(dataset="books")) == datasets.read == 3


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("nowhere", [{"text": "x"}], "cannot be read .FileNotFoundError: no such data set"),
        ("books", [{"a": "x", "b": "y"}], r"has 2 columns of text \(a, b\); name one"),
        ("books:train:c", [{"a": "x", "b": "y"}], "there is no column 'c' but a, b"),
        ("books", [{"text": " "}], "has no text in column 'text'"),
    ],
)
def test_a_data_set_without_text_is_refused(
    datasets: types.SimpleNamespace, name: str, rows: list[dict[str, Any]], message: str
) -> None:
    datasets.rows = rows
    with pytest.raises(ValueError, match=message):
        haystack.texts(dataset=name)


def test_a_data_set_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets; pip install"):
        haystack.texts(dataset="books")


def test_a_data_set_can_be_a_folder_of_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n')
    assert haystack.texts(dataset=str(tmp_path)) == ["one", "two"]


PHRASES = {
    "needle": " [{ordinal} key:",
    "needle_end": "] ",
    "question": "Name the {ordinal} key.",
    "answer": "It is",
}


@pytest.mark.parametrize("kind", ["json", "toml"])
def test_phrases_come_from_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"words.{kind}"
    lines = [f"{name} = {json.dumps(text)}" for name, text in PHRASES.items()]
    path.write_text(json.dumps(PHRASES) if kind == "json" else "\n".join(lines))
    wording = Wording.load(path)
    assert wording == Wording(**PHRASES)
    made = sample_of(wording=wording)
    text = tokenizer().decode(made.input_ids)
    start, end = made.answers[1]
    answer = tokenizer().decode(made.input_ids[start:end])
    assert f" [second key:{answer}] " in text
    assert text.endswith(f"Name the second key.\nIt is{answer}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.txt", "", "must end in .json or .toml"),
        ("w.json", "{", "cannot be read"),
        ("w.json", "[]", "must hold names and phrases, got list"),
        ("w.toml", "neddle = 'x'", "has no use for neddle; the phrases are intro, needle"),
        ("w.toml", "needle = 'x'", "wording 'needle' must hold {ordinal} once, got 'x'"),
        ("w.toml", "intro = '{ordinal}'", "wording 'intro' must not hold {ordinal}"),
        ("w.toml", "intro = 3", "wording 'intro' must be a text, got 3"),
    ],
)
def test_bad_phrases_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Wording.load(tmp_path / name)


def test_other_phrases_make_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="different options .wording"):
        run(tmp_path, options=replace(OPTIONS, wording=Wording(answer="It is:")))


def chatty() -> Any:
    """The tiny tokenizer with a chat template that strips what is said."""
    from transformers import PreTrainedTokenizerFast

    plain = tokenizer()
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def sample_of(words: Any = None, **options: Any) -> Sample:
    words = words or tokenizer()
    ids = haystack.tokens(TEXT, words, at_least=400)
    given = {"context_length": 400, "num_passkeys": 2, "passkey_words": 3} | options
    return passkey_sample(words, ids, generator=torch.Generator().manual_seed(0), **given)


def test_in_a_chat_every_question_is_the_users_and_every_answer_the_models() -> None:
    words = chatty()
    made = sample_of(words, chat="auto")
    text = words.decode(made.input_ids)
    assert len(made.input_ids) == 400
    assert made.input_ids[0] == words.bos_token_id
    assert text.startswith("<s>[user]What follows is a long text")
    assert text.count("<s>") == 1
    answers = [words.decode(made.input_ids[start:end]) for start, end in made.answers]
    assert all(set(answer.split()) <= set(WORDS) and len(answer.split()) == 3 for answer in answers)
    assert (
        f"Which words were the first passkey?[end]\n[assistant]The passkey:{answers[0]}.[end]\n"
        f"[user]Which words were the second passkey?[end]\n[assistant]The passkey:{answers[1]}"
    ) in text
    assert text.endswith(answers[1])


def test_a_chats_tokens_are_those_of_its_template() -> None:
    """The template's own rendering of the same turns gives the same text."""
    words = chatty()
    made = sample_of(words, chat="yes")
    text = words.decode(made.input_ids)
    turns, role = [], ""
    for part in text.removeprefix("<s>").replace("[end]\n", "").split("["):
        if part.startswith(("user]", "assistant]")):
            role, _, said = part.partition("]")
            turns.append({"role": role, "content": said})
        elif turns:
            turns[-1]["content"] += "[" + part
    whole = words.apply_chat_template(turns, tokenize=False)
    assert whole.startswith(text)


def test_without_a_template_or_against_it_the_sample_is_plain() -> None:
    plain, chat = sample_of(), chatty()
    assert torch.equal(sample_of(chat="auto").input_ids, plain.input_ids)
    assert torch.equal(sample_of(chat, chat="no").input_ids, plain.input_ids)


def test_templates_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(ValueError, match="chat='yes' needs a tokenizer with a chat template"):
        chat_frame(tokenizer(), "yes")
    with pytest.raises(ValueError, match="chat must be one of auto, yes, no, got 'maybe'"):
        chat_frame(tokenizer(), "maybe")
    last = chatty()
    last.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="does not repeat what user and model say .*--chat no"):
        ChatFrame.of(last)


def test_a_chat_model_is_identified_in_its_own_turns() -> None:
    options = replace(OPTIONS, steps=2)
    framed = run(tokenizer=chatty(), options=options)
    plain = run(tokenizer=chatty(), options=replace(options, chat="no"))
    assert plain.alpha.tobytes() == run(options=options).alpha.tobytes()
    assert framed.alpha.tobytes() != plain.alpha.tobytes()
