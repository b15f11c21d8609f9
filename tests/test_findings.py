"""Cases that an independent check found, each of which once gave wrong tokens or a traceback without a word."""

from pathlib import Path

import pytest
import torch
from tiny import LENGTH, assert_close, expected_logits, ids, left_padded, policy_for, tiny

from duohead import DuoCache, HeadPattern, HeadPolicy, duo
from duohead.cli import main
from duohead.evaluate.needle import cache_bytes, new_cache
from duohead.identify import IdentifyOptions
from duohead.models.generate import generate, prefill


@torch.no_grad()
def test_chunk_visibility_keeps_the_native_window_in_every_implementation() -> None:
    model = tiny("mistral-window")
    policy = policy_for(model, "none", sink=0, visibility="chunk")
    tokens = ids()
    found = []
    for impl in ("reference", "tiled"):
        with duo(model, policy, impl=impl):
            found.append(model(input_ids=tokens).logits)
    assert_close(found[1], found[0])


def test_weights_that_are_never_formed_cannot_be_asked_for() -> None:
    model = tiny("llama")
    with (
        duo(model, policy_for(model, "all")),
        pytest.raises(ValueError, match="output_attentions must be False"),
    ):
        model(input_ids=ids(), output_attentions=True)


@torch.no_grad()
def test_packed_positions_are_refused_beside_a_cache_as_well() -> None:
    model = tiny("llama")
    places = torch.cat([torch.arange(15), torch.arange(LENGTH - 15)])[None]
    with duo(model, policy_for(model, "alternating")) as bound:
        cache = DuoCache(bound, model)
        with pytest.raises(ValueError, match="position_ids must count up by one within a row"):
            model(input_ids=ids(), position_ids=places, past_key_values=cache)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("first", [0, 9], ids=["forgotten", "changed"])
@torch.no_grad()
def test_padding_that_changes_between_calls_is_refused(static: bool, first: int) -> None:
    model = tiny("llama")
    tokens, mask = left_padded([LENGTH, LENGTH - 6])
    before = mask.clone()
    before[1, :first] = 0
    before[1, first:] = 1
    with duo(model, policy_for(model, "alternating")) as bound:
        cache = DuoCache(bound, model, max_length=LENGTH if static else None)
        model(input_ids=tokens[:, :20], attention_mask=before[:, :20], past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"attention_mask says that the rows have \[0, 6\] padding tokens"
        ):
            model(input_ids=tokens[:, 20:], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_a_row_that_begins_late_is_still_padded_through_many_chunks() -> None:
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    tokens, mask = left_padded([LENGTH, 4])
    with duo(model, policy) as bound:
        found = prefill(model, tokens, DuoCache(bound, model), attention_mask=mask, chunk=5)
    assert_close(found, expected_logits(model, policy, tokens, mask)[:, -1])


@pytest.mark.parametrize("chunk", [7, 14, 28, None])
def test_a_longer_prefill_window_gives_the_same_answer_for_every_chunk(chunk: int | None) -> None:
    model = tiny("llama")
    policy = policy_for(model, "none", prefill_recent=15)
    tokens = ids()
    with duo(model, policy) as bound:
        whole = prefill(model, tokens, DuoCache(bound, model))
        assert_close(prefill(model, tokens, DuoCache(bound, model), chunk=chunk), whole)
        expected = model.generate(tokens, max_new_tokens=6, do_sample=False)
        assert (
            generate(model, tokens, max_new_tokens=6, chunk=chunk, do_sample=False).tokens.tolist()
            == expected.tolist()
        )


@pytest.mark.parametrize(("option", "rows"), [("num_beams", 1), ("num_return_sequences", 3)])
def test_generation_in_chunks_takes_beams_and_several_sequences(option: str, rows: int) -> None:
    model = tiny("llama")
    tokens, mask = left_padded([LENGTH, LENGTH - 6])
    options = {option: 3, "do_sample": rows == 3, "max_new_tokens": 5, "attention_mask": mask}
    with duo(model, policy_for(model, "alternating")) as bound:
        torch.manual_seed(0)
        expected = model.generate(tokens, **options)
        torch.manual_seed(0)
        result = generate(model, tokens, chunk=7, **options)
    assert result.tokens.tolist() == expected.tolist()
    assert result.tokens.shape[0] == 2 * rows
    assert result.kv_bytes == bound.kv_bytes(LENGTH + 4, 6)
    assert result.dense_kv_bytes == bound.dense_kv_bytes(LENGTH + 4, 6)


def test_the_full_cache_of_a_hybrid_has_bytes() -> None:
    model = tiny("lfm2")
    cache = new_cache(model, None)
    with torch.no_grad():
        model(input_ids=ids(), past_key_values=cache)
    policy = policy_for(model, "all").bind(model)
    assert cache_bytes(cache) == policy.dense_kv_bytes(LENGTH)


def test_bench_on_a_device_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "kernels", "--lengths", "100", "--device", "nowhere"]) == 2
    assert "device 'nowhere' cannot be used" in capsys.readouterr().err


def test_a_diverged_training_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from duohead.identify import train

    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(train, "distillation", lambda *_: nan)
    options = IdentifyOptions(steps=3)
    gates = train.Gates.of(tiny("llama"), sink=4, recent=8)
    optimizer = torch.optim.AdamW([gates.values])
    watched = train.Stability(options)
    steps = train.train_gates(None, gates, optimizer, [None] * 3, options, watched, start=0)
    with pytest.raises(
        ValueError, match="loss must be finite, got nan at step 0: training diverged"
    ):
        next(steps)


def adapter(folder: Path, value: object) -> Path:
    inner = folder / "duo_attention"
    inner.mkdir()
    (inner / "config.json").write_text('{"sink_size": 4, "recent_size": 8}')
    torch.save(value, inner / "full_attention_heads.pt")
    return folder


def test_gates_saved_as_a_parameter_load(tmp_path: Path) -> None:
    alpha = torch.rand(3, 4)
    pattern = HeadPattern.load(adapter(tmp_path, torch.nn.Parameter(alpha)))
    assert torch.equal(torch.from_numpy(pattern.alpha.copy()), alpha)


@pytest.mark.parametrize(
    "value",
    [torch.rand(3, 4).to_sparse(), torch.empty(3, 4, device="meta")],
    ids=["sparse", "meta"],
)
def test_gates_of_another_kind_are_refused(tmp_path: Path, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="full_attention_heads.pt: "):
        HeadPattern.load(adapter(tmp_path, value))


def test_a_table_cut_inside_its_last_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"sink_size": 4, "recent_size": 8}')
    (tmp_path / "full_attention_heads.tsv").write_text("0.5\t0.25\n0.75\t0.9")
    with pytest.raises(
        ValueError, match="expected a line end after the last row.*may be truncated"
    ):
        HeadPattern.load(tmp_path)


def test_json_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="expected JSON"):
        HeadPattern.load(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "batch", "message"),
    [
        (5.5, 1, "tokens must be an integer >= 0, got 5.5"),
        (-1, 1, "tokens must"),
        (5, -1, "batch must be an integer >= 1"),
    ],
)
def test_senseless_sizes_have_no_bytes(tokens: int, batch: int, message: str) -> None:
    policy = HeadPolicy.from_heads(retrieval=[[0]], num_kv_heads=2)
    for count in (policy.kv_bytes, policy.dense_kv_bytes):
        with pytest.raises(ValueError, match=message):
            count(tokens, batch, head_dim=64)


def test_a_budget_at_no_length_and_a_policy_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        HeadPattern.from_alpha([[0.1, 0.9]]).policy(kv_budget=0.5, tokens=0)
    with pytest.raises(ValueError, match="policy has no field 'layers'"):
        HeadPolicy.from_dict({})
