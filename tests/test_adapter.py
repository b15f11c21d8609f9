"""Adapters: folders without weights that the Auto classes load, with the base model fetched from its own place."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WINDOW, assert_close, expected_logits, ids, refused
from tiny_adapters import base_and_pattern
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import duohead
from duohead import DuoheadConfig, DuoheadForCausalLM, HeadPattern, formats
from duohead.adapter import load, save
from duohead.models import policy_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    return base_and_pattern(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def base(made) -> Path:
    return made[0]


@pytest.fixture
def heads(made) -> Path:
    return made[1]


@pytest.fixture
def adapter(heads, tmp_path) -> Path:
    save.write(tmp_path / "adapter", HeadPattern.load(heads))
    return tmp_path / "adapter"


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@torch.no_grad()
def test_the_auto_class_gives_the_base_model_under_the_policy(adapter, base) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert type(model) is type(plain) and not model.training
    policy = HeadPattern.load(adapter).policy(retrieval_ratio=0.5)
    assert policy_of(model) == policy.bind(plain)
    tokens = ids(1, 20)
    assert_close(model(tokens, use_cache=True).logits, expected_logits(plain, policy, tokens))
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_other_weights_of_the_same_shape_are_refused(adapter, base, tmp_path) -> None:
    stranger = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in stranger.parameters():
            weight.normal_(std=0.1)
    stranger.save_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match="use the pattern all the same with"):
        AutoModelForCausalLM.from_pretrained(adapter, base_model=str(tmp_path / "stranger"))


def test_an_export_from_before_there_were_fingerprints_is_written_over(adapter, heads) -> None:
    pattern = HeadPattern.load(heads)
    save.write(adapter, replace(pattern, fingerprint=None))
    save.write(adapter, pattern)
    assert HeadPattern.load(adapter).fingerprint is not None


def test_a_plain_pattern_folder_loads_if_it_names_its_base(heads) -> None:
    assert policy_of(AutoModelForCausalLM.from_pretrained(heads)).retrieval_ratio == 0.5


def test_the_bundled_pattern_loads_on_the_bundled_model() -> None:
    folder = duohead.pocket.pattern("pocket")
    config = AutoConfig.from_pretrained(folder)
    assert (type(config), config.base_model_name_or_path) == (DuoheadConfig, "pocket")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    plain = AutoTokenizer.from_pretrained(duohead.pocket.folder("pocket"))
    assert tokenizer("It was")["input_ids"] == plain("It was")["input_ids"]
    assert tokenizer.padding_side == "left"


def test_a_pipeline_loads_it_with_its_tokenizer() -> None:
    folder = duohead.pocket.pattern("pocket")
    pipe = pipeline("text-generation", model=str(folder), model_kwargs={"retrieval_ratio": 0.25})
    assert policy_of(pipe.model).retrieval_ratio == 0.25
    text = pipe("It was", max_new_tokens=2, max_length=None, do_sample=False)
    assert text[0]["generated_text"].startswith("It was")


def test_arguments_for_the_base_model_reach_it(adapter, monkeypatch) -> None:
    seen: dict[str, Any] = {}
    real = AutoModelForCausalLM.from_pretrained

    def spy(name: Any, *inputs: Any, **options: Any) -> Any:
        seen.update(options)
        return real(name, *inputs, dtype=options.get("dtype"))

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", spy)
    DuoheadForCausalLM.from_pretrained(
        adapter,
        dtype=torch.float16,
        device_map="cpu",
        attn_implementation="eager",
        quantization_config={"x": 1},
        use_cache=True,
        token="secret",
        cache_dir="/tmp/c",
        trust_remote_code=True,
        sink=3,
    )
    assert seen == {
        "dtype": torch.float16,
        "device_map": "cpu",
        "attn_implementation": "eager",
        "quantization_config": {"x": 1},
        "use_cache": True,
        "token": "secret",
        "cache_dir": "/tmp/c",
        "trust_remote_code": True,
        "revision": None,
    }


def test_dtype_device_map_and_attention_hold_through_the_auto_class(adapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        adapter,
        dtype=torch.bfloat16,
        device_map="cpu",
        attn_implementation="eager",
        output_hidden_states=True,
        hidden_act="gelu",
    )
    assert model.dtype == torch.bfloat16
    assert policy_of(model).native_dtype == "bfloat16"
    assert model.config.output_hidden_states is True
    assert model.config.hidden_act == "gelu"  # a field of the base's config
    duohead.disable(model)
    assert model.config._attn_implementation == "eager"


def test_settings_are_replaced_while_loading(adapter) -> None:
    edited(adapter, selection={"retrieval_ratio": 0.5, "sink": 1}, precisions={"window_dtype": "int8"})  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        adapter, threshold=0.9, recent=6, retrieval_dtype="fp8", streaming_dtype="int4"
    )
    found = policy_of(model)
    expected = HeadPattern.load(adapter).policy(
        threshold=0.9, sink=1, recent=6, retrieval_dtype="fp8", streaming_dtype="int4", window_dtype="int8"
    )  # fmt: skip
    assert found == expected.bind(model)
    kept = AutoModelForCausalLM.from_pretrained(adapter, evict=False)
    assert policy_of(kept).evict is False and policy_of(kept).sink == 1


def test_settings_changed_in_the_config_hold(adapter) -> None:
    config = AutoConfig.from_pretrained(adapter)
    config.selection, config.recent_size = {"retrieval_ratio": 0.25}, 7
    found = policy_of(AutoModelForCausalLM.from_pretrained(adapter, config=config))
    assert (found.retrieval_ratio, found.recent) == (0.25, 7)


def test_whole_numbers_may_be_written_as_floats(adapter) -> None:
    edited(adapter, sink_size=3.0, recent_size=6.0)
    found = policy_of(AutoModelForCausalLM.from_pretrained(adapter))
    assert (found.sink, found.recent) == (3, 6)


def test_the_plain_base_model_is_to_be_had(adapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter, duohead=False)
    assert policy_of(model) is None
    assert "save_pretrained" not in vars(model)
    refused(
        "retrieval_ratio: of no use with duohead=False",
        DuoheadForCausalLM.from_pretrained, adapter, duohead=False, retrieval_ratio=0.5,
    )  # fmt: skip


def test_a_budget_counts_with_the_head_size_of_the_base(adapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        adapter, kv_budget=0.7, tokens=512, streaming_dtype="int8"
    )
    bound = policy_of(model)
    assert bound.kv_bytes(512) <= 0.7 * bound.dense_kv_bytes(512)


def test_loading_info_comes_with_the_model(adapter) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(adapter, output_loading_info=True)
    assert policy_of(model) is not None
    assert not info["missing_keys"]


def test_a_windowed_base_keeps_its_windows(tmp_path: Path) -> None:
    _, heads = base_and_pattern(tmp_path, "gemma2")
    bound = policy_of(AutoModelForCausalLM.from_pretrained(heads, retrieval_ratio=0.0))
    windowed = [layer for layer in bound.layers if layer.window is not None]
    assert [layer.window for layer in windowed] == [WINDOW, WINDOW]
    assert all(not layer.streaming for layer in windowed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model; pass base_model="),
        ({"base_model_name_or_path": "/no/such/place"},
         r"needs its base model /no/such/place, which cannot be loaded \(there is no such folder\)"),
        ({"base_model_name_or_path": "nobody/nothing", "base_model_revision": COMMIT},
         f"needs its base model nobody/nothing at {COMMIT}, which cannot be loaded"),
        ({"base_model_name_or_path": "pocket"},
         "base model pocket do not go together: pattern has 3 layers but the model has 6"),
        ({"selection": {"retrieval_ratio": "half"}}, "settings .* are damaged"),
        ({"selection": {"magic": 1}}, "settings magic are not known to this duohead; known are evict"),
        ({"selection": {"retrieval_ratio": 2}}, r"retrieval_ratio must lie in \[0, 1\], got 2"),
        ({"precisions": {"retrieval_dtype": "int3"}}, "do not go together: retrieval_dtype must be"),
        ({"base_model_type": "mistral"}, "pattern is of a 'mistral' model but the model is 'llama'"),
        ({"format_version": 9}, "format_version 9 is newer"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_loaded_says_why_and_names_both(
    adapter, changes, message: str
) -> None:
    edited(adapter, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(adapter)
    assert str(adapter) in str(caught.value)


def test_an_adapter_of_an_adapter_is_refused(adapter, heads) -> None:
    refused("the base is an adapter itself", DuoheadForCausalLM.from_pretrained, adapter, base_model=heads)  # fmt: skip


def test_other_mistakes_are_refused(adapter, base) -> None:
    get = DuoheadForCausalLM.from_pretrained
    refused("subfolder must be empty, got 'x'", get, adapter, subfolder="x")
    refused("base_revision 'v1': of no use for the base", get, adapter, base_revision="v1")
    refused("exactly one of retrieval_ratio", get, adapter, retrieval_ratio=0.5, threshold=0.5)
    refused("holds no head pattern", get, base)
    config = AutoConfig.from_pretrained(adapter)
    refused("has no architecture of its own", AutoModelForCausalLM.from_config, config)


def test_no_weights_are_loaded_before_base_and_heads_are_known_to_fit(adapter, monkeypatch) -> None:
    edited(adapter, base_model_name_or_path="pocket")
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    refused("do not go together", DuoheadForCausalLM.from_pretrained, adapter)


def test_another_place_for_the_base_is_taken_without_the_pinned_commit(adapter, base) -> None:
    edited(adapter, base_model_name_or_path="org/model", base_model_revision=COMMIT)
    found = load.open_adapter(adapter, base_model=base)
    assert (found.pattern.base_model, found.pattern.base_revision) == (str(base), None)
    model = DuoheadForCausalLM.from_pretrained(adapter, base_model=str(base))
    assert policy_of(model) is not None
    tokenizer = load.load_tokenizer(adapter, base_model=base)
    assert tokenizer("a b")["input_ids"]


def test_the_pinned_commit_and_the_token_go_to_the_hub(adapter, base, monkeypatch) -> None:
    edited(adapter, base_model_name_or_path="org/model", base_model_revision=COMMIT)
    asked: list[tuple[str, Any, Any]] = []

    def fetch(name: str, revision: str | None, **hub: Any) -> Path:
        asked.append((name, revision, hub))
        return adapter

    def config(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"], options["token"]))
        return real(base)

    real = AutoConfig.from_pretrained
    monkeypatch.setattr(formats, "fetch", fetch)
    monkeypatch.setattr(load.AutoConfig, "from_pretrained", config)
    found = load.open_adapter("org/heads", revision="v1", token="t", local_files_only=True)
    assert asked == [
        ("org/heads", "v1", {"token": "t", "local_files_only": True}),
        ("org/model", COMMIT, "t"),
    ]
    assert found.pattern.base_revision == COMMIT


def test_saving_a_loaded_model_gives_a_folder_that_loads_again_without_weights(
    adapter, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter, retrieval_ratio=0.25, streaming_dtype="int8")  # fmt: skip
    for _ in range(2):  # and once more, over itself
        model.save_pretrained(tmp_path / "saved", max_shard_size="1GB")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json", "duohead.safetensors", "full_attention_heads.tsv", "modeling_duohead.py", "requirements.txt",
    ]  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert policy_of(again) == policy_of(model)
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()


def test_saving_refuses_what_would_be_lost(adapter, base, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter)
    message = "the weights of this model are no longer those of"
    refused(message, model.save_pretrained, tmp_path / "x", state_dict=model.state_dict())
    refused("push_to_hub must be False", model.save_pretrained, tmp_path / "x", push_to_hub=True)
    model.to(torch.float64).to(torch.float32)  # conversions are none of an adapter's business
    model.save_pretrained(tmp_path / "moved")
    model.lm_head.weight.data += 1  # as LoRA is merged, which autograd does not count
    refused(message, model.save_pretrained, tmp_path / "x")
    model.lm_head.weight.data -= 1
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] += 1  # one number among many
    refused(message, model.save_pretrained, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    duohead.disable(model)
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)
    duohead.enable(model, HeadPattern.load(adapter).policy(retrieval_ratio=1.0))
    refused("the policy on this model is no longer its adapter's", model.save_pretrained, tmp_path / "x")  # fmt: skip


def test_a_model_can_be_copied_and_once_the_policy_is_off_pickled(adapter, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight += 1  # none of the copy's business
    twin.save_pretrained(tmp_path / "heads")
    assert policy_of(AutoModelForCausalLM.from_pretrained(tmp_path / "heads")) == policy_of(twin)
    duohead.disable(model)
    again = pickle.loads(pickle.dumps(model))
    again.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)


def test_a_folder_with_anything_else_in_it_is_not_written_to(adapter, heads, tmp_path) -> None:
    pattern = HeadPattern.load(heads)
    other = tmp_path / "other"
    other.mkdir()
    (other / ".git").mkdir()
    save.write(other, pattern)  # a fresh clone is as good as empty
    (other / "requirements.txt").write_text("mine\n")
    refused("requirements.txt is there already and was not written by", save.write, other, pattern)
    different = replace(pattern, alpha=1 - pattern.alpha)
    refused("which differ from these; name a new folder", save.write, adapter, different)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    refused(r"holds other files \(diary.txt\)", save.write, tmp_path / "notes", pattern)
    refused("is a file; name a new folder", save.write, tmp_path / "notes" / "diary.txt", pattern)
    assert (other / "requirements.txt").read_text() == "mine\n"
    assert HeadPattern.load(adapter) == pattern


def test_heads_of_an_adapter_are_a_pattern_like_any_other(adapter, heads) -> None:
    assert HeadPattern.load(adapter) == HeadPattern.load(heads)
