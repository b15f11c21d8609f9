"""The haystack and the multi-passkey task: exact lengths, right spans, the same sample for the same seed and step."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from duohead import pocket
from duohead.identify.assembly import Sample
from duohead.identify.haystack import default_text, read_text, tokens
from duohead.identify.passkeys import ORDINALS, WORDS, passkey_sample


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket.folder("pocket"))


@pytest.fixture(scope="module")
def haystack(tokenizer: Any) -> torch.Tensor:
    return tokens(default_text(), tokenizer, at_least=8000, at_most=8000)


def make(tokenizer: Any, haystack: torch.Tensor, *, seed: int = 0, **options: Any) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return passkey_sample(
        tokenizer, haystack, generator=generator, **({"context_length": 2048} | options)
    )


def test_text_is_read_from_plain_xz_and_gz_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\ntwo", encoding="utf-8")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("drei é".encode()))
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"vier"))
    assert (
        read_text([tmp_path / "a.txt", tmp_path / "b.txt.xz", tmp_path / "c.gz"])
        == "one\ntwo\n\ndrei é\n\nvier"
    )
    assert read_text(tmp_path / "c.gz") == "vier"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("image.png", b"\x89PNG\0\0", "is binary"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("broken.xz", b"not an archive", "cannot be read"),
        ("cut.gz", gzip.compress(bytes(range(32, 120)), mtime=0)[:40], "cannot be read"),
        ("missing.txt", None, "does not exist"),
    ],
    ids=["empty", "binary", "latin", "broken", "cut", "missing"],
)
def test_bad_text_files_are_named_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_text([tmp_path / name])


def test_a_folder_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        read_text(tmp_path)


def test_no_file_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one file"):
        read_text([])


def test_tokens_do_not_depend_on_where_reading_stops(tokenizer: Any) -> None:
    text = default_text()[:200_000]
    whole = tokens(text, tokenizer, at_least=1)
    assert tokenizer.decode(whole) == text
    assert torch.equal(tokens(text, tokenizer, at_least=500, at_most=20_000), whole[:20_000])


def test_short_text_is_never_repeated(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"too short: 4096 tokens are needed and it has \d+; give a longer text"
    ):
        tokens("Only a few words.", tokenizer, at_least=4096)


@pytest.mark.parametrize("length", [1300, 2048, 4097])
def test_a_sample_is_exactly_as_long_as_asked(
    tokenizer: Any, haystack: torch.Tensor, length: int
) -> None:
    sample = make(tokenizer, haystack, context_length=length)
    assert sample.input_ids.shape == (length,)
    assert sample.input_ids.dtype == torch.long
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert sample.answers[-1][1] == length


def test_every_answer_is_the_passkey_hidden_under_its_ordinal(
    tokenizer: Any, haystack: torch.Tensor
) -> None:
    sample = make(tokenizer, haystack, num_passkeys=10, passkey_words=8, context_length=3000)
    text = tokenizer.decode(sample.input_ids[1 : sample.answers[0][0]])
    assert len(sample.answers) == 10
    for ordinal, (start, end) in zip(ORDINALS, sample.answers, strict=False):
        answer = tokenizer.decode(sample.input_ids[start:end]).split()
        assert len(answer) == 8 and set(answer) <= set(WORDS)
        assert f"the {ordinal} passkey: {' '.join(answer)}." in text


def test_needles_lie_between_the_depths_in_ascending_order(
    tokenizer: Any, haystack: torch.Tensor
) -> None:
    sample = make(
        tokenizer, haystack, num_passkeys=6, passkey_words=2, context_length=6000, depths=(0.4, 0.6)
    )
    text = tokenizer.decode(sample.input_ids)
    places = [text.index(f"they are the {ordinal} passkey") / len(text) for ordinal in ORDINALS[:6]]
    assert places == sorted(places)
    assert all(0.33 < place < 0.67 for place in places)


def test_the_same_seed_gives_the_same_sample(tokenizer: Any, haystack: torch.Tensor) -> None:
    one, same, other = (make(tokenizer, haystack, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.input_ids, same.input_ids) and one.answers == same.answers
    assert not torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_passkeys": 21}, "num_passkeys must be 1 to 20"),
        ({"passkey_words": 0}, "passkey_words must be at least 1"),
        ({"depths": (0.5, 1.2)}, "depths must be two ascending shares"),
        ({"depth_steps": 5}, "depth_steps must be at least num_passkeys"),
        ({"context_length": 300}, "context_length=300 is too small"),
        ({"context_length": 30_000}, "haystack_ids is too short"),
    ],
)
def test_options_out_of_range_are_refused(
    tokenizer: Any, haystack: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer, haystack, **options)


def test_a_tokenizer_without_start_token_gets_none(tokenizer: Any, haystack: torch.Tensor) -> None:
    class Bare:
        bos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return tokenizer(text, add_special_tokens=False)

        def decode(self, ids: list[int]) -> str:
            return str(tokenizer.decode(ids))

    sample = make(Bare(), haystack)
    assert len(sample.input_ids) == 2048
    assert sample.input_ids[0] != tokenizer.bos_token_id
