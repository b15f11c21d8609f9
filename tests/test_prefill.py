"""Long prompts in pieces, then decoding: the library's loop, and the command `generate`."""

from pathlib import Path

import pytest
import torch
from tiny import (
    LENGTH,
    assert_close,
    expected_greedy,
    expected_logits,
    ids,
    left_padded,
    policy_for,
    tiny,
)

from duohead import DuoCache, HeadPattern, HeadPolicy, duo, pocket
from duohead.cli import main
from duohead.models.generate import generate, prefill


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pattern for the pocket model; which heads does not matter here."""
    folder = tmp_path_factory.mktemp("heads")
    model, _ = pocket.load("pocket")
    config = model.config
    alpha = torch.rand(
        config.num_hidden_layers,
        config.num_key_value_heads,
        generator=torch.Generator().manual_seed(0),
    )
    HeadPattern.from_alpha(alpha.numpy(), model=model).save(folder)
    return folder


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_prefill_gives_the_last_logits_whatever_the_chunk(chunk: int | None) -> None:
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, LENGTH - 9])
    done: list[int] = []
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model)
        found = prefill(
            model, tokens, cache, attention_mask=mask, chunk=chunk, progress=done.append
        )
    assert_close(found, expected_logits(model, policy, tokens, mask)[:, -1])
    assert sum(done) == LENGTH
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("max_length", [None, LENGTH], ids=["growing", "static"])
def test_the_host_counts_the_tokens_while_a_prompt_is_read_and_no_longer(
    max_length: int | None,
) -> None:
    model = tiny("llama")
    with duo(model, policy_for(model, "alternating")) as bound:
        cache = DuoCache(bound, model, max_length=max_length)
        counted: list[set[int | None]] = []

        def look(*_: object) -> None:
            counted.append({layer.counted for layer in cache.duo_layers})

        hook = model.register_forward_hook(look)
        prefill(model, ids(length=20), cache, chunk=7)
        prefill(model, ids(length=9), cache)
        hook.remove()
        assert counted == [{7}, {14}, {20}, {29}]
        assert {layer.counted for layer in cache.duo_layers} == {None}
        cache.reset()

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            prefill(model, ids(), cache, chunk=7)
        hook.remove()
        assert {layer.counted for layer in cache.duo_layers} == {None}


def test_generate_says_what_was_written_and_what_it_took() -> None:
    model = tiny("llama")
    policy = policy_for(model, "random")
    tokens = ids(2)
    with duo(model, policy) as bound:
        result = generate(model, tokens, max_new_tokens=9, chunk=5, do_sample=False)
    assert result.tokens.tolist() == expected_greedy(model, policy, tokens, 9).tolist()
    assert (result.prompt_tokens, result.new_tokens) == (LENGTH, 9)
    # The last new token is never fed back.
    assert result.kv_bytes == bound.kv_bytes(LENGTH + 8, 2)
    assert result.dense_kv_bytes == bound.dense_kv_bytes(LENGTH + 8, 2)
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0


def test_generate_without_a_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"has no policy; use it inside duohead\.duo"):
        generate(tiny("llama"), ids())


def test_more_tokens_than_positions_are_an_error() -> None:
    model = tiny("llama")
    with duo(model, policy_for(model, "all")) as bound:
        with pytest.raises(ValueError, match="must fit the model's 128 positions, got 129"):
            generate(model, ids(), max_new_tokens=129 - LENGTH)
        with pytest.raises(ValueError, match="must fit the model's 128 positions, got 129"):
            prefill(model, ids(length=129), DuoCache(bound, model))


@pytest.mark.parametrize(
    ("chunk", "length", "message"),
    [(0, 5, "chunk must be at least 1"), (1, 0, "at least one token")],
)
def test_senseless_prefills_are_errors(chunk: int, length: int, message: str) -> None:
    model = tiny("llama")
    with duo(model, policy_for(model, "all")) as bound, pytest.raises(ValueError, match=message):
        prefill(model, ids(length=length), DuoCache(bound, model), chunk=chunk)


def test_the_command_writes_the_answer_and_the_cost(
    heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It was a bright cold day in April. " * 40)
    command = [
        "generate",
        "pocket",
        "--policy",
        str(heads),
        "--prompt-file",
        str(prompt),
        "--device",
        "cpu",
    ]
    assert main([*command, "--max-new-tokens", "8", "--chunk", "64"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out.strip()
    assert "8 new at" in streamed.err
    assert "of the dense" in streamed.err
    assert main([*command, "--max-new-tokens", "8", "--chunk", "1000"]) == 0
    assert capsys.readouterr().out == streamed.out
    sampled = (
        "--temperature 0.7 --top-p 0.9 --kv-budget 0.9 --recent 64 --prefill-recent 80".split()
    )
    command[command.index("--policy")] = "--pattern"
    assert main([*command, *sampled, "--max-new-tokens", "2"]) == 0
    assert "2 new at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompt-file", "missing.txt"], "missing.txt"),
        (["--policy", "missing"], "missing"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--chunk", "0"], "--chunk must be at least 1, got 0"),
        (["--max-new-tokens", "40000"], "must fit the model's 32768 positions"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-p", "0"], "--top-p must lie in"),
        (["--top-p", "0.9"], "--temperature 0 does not sample"),
        (["--max-length", "0"], "--max-length must be at least 1, got 0"),
        (["--device", "cpu", "--engine", "graph"], "engine='graph' needs CUDA"),
        (["--device", "cpu", "--max-length", "64"], "max_length=64 is for an engine"),
        (["--prefill-recent", "1"], "prefill_recent must be an integer >= recent"),
        (["--kv-budget", "1.5"], "kv_budget must lie in"),
        (["--kv-budget", "0.5", "--threshold", "0.5"], "not allowed with"),
        (["--retrieval-ratio", "1.2"], "retrieval_ratio must lie in"),
        (["--retrieval-ratio", "0.5", "--threshold", "0.5"], "not allowed with"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
    ],
)
def test_a_wrong_argument_is_one_line(
    heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Once upon a time")
    command = ["generate", "pocket", "--policy", str(heads), "--prompt-file", str(prompt)]
    assert main([*command, *change]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("duohead")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_pattern_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HeadPattern.from_alpha([[0.1, 0.9]] * 3).save(tmp_path / "other")
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    arguments = ["--policy", str(tmp_path / "other"), "--prompt-file", str(tmp_path / "prompt.txt")]
    assert main(["generate", "pocket", *arguments]) == 2
    assert "layers" in capsys.readouterr().err


def test_a_streaming_policy_predicts_the_cache_of_a_long_prompt() -> None:
    model, _ = pocket.load("pocket")
    layers, kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    policy = HeadPolicy.from_heads(
        retrieval=[[0]] * layers, num_kv_heads=kv_heads, sink=16, recent=64
    )
    tokens = torch.arange(5, 1005)[None]
    with duo(model, policy) as bound:
        cache = DuoCache(bound, model)
        prefill(model, tokens, cache, chunk=300)
    assert cache.kv_bytes() == bound.kv_bytes(1000)
    assert cache.kv_bytes() < 0.4 * bound.dense_kv_bytes(1000)
