"""A policy comes and goes without a trace, and models do not know of each other's policies."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from tiny import (
    assert_close,
    config_of,
    expected_greedy,
    expected_logits,
    ids,
    policy_for,
    sharpen,
    tiny,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from duohead import DuoCache, disable, duo, enable
from duohead.models import interface, policy_of

FAMILIES = ["llama", "gemma3", "gpt-oss", "laguna", "qwen3-next"]


def traces(model: Any) -> dict[str, Any]:
    """All that a policy could leave behind: attributes, hooks, methods, weights, configs and what they say."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = list(value.items()) if "_hooks" in key else id(value)
        found[f"{name} forward"] = (
            getattr(module.forward, "__func__", None),
            "forward" in vars(module),
        )
        if "config" in vars(module):
            found[f"{name} config"] = (
                module.config.to_json_string(),
                module.config._attn_implementation,
            )
        found[f"{name} class"] = type(module)
    weights = model.state_dict()
    found["weights"] = [
        (key, value.data_ptr(), value.sum().item()) for key, value in weights.items()
    ]
    found["training"] = model.training
    return found


def use(model: Any) -> None:
    model.generate(ids(1, 9), max_new_tokens=3, do_sample=False)
    model.generate(ids(1, 9), max_new_tokens=3, do_sample=False, cache_implementation="static")
    with torch.no_grad():
        model(ids(2, 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_a_policy_restores_everything(family: str) -> None:
    model = tiny(family)
    before = traces(model)
    with duo(model, policy_for(model, "alternating")):
        assert traces(model) != before
        use(model)
    assert traces(model) == before
    assert policy_of(model) is None


def test_modules_keep_their_own_training_mode() -> None:
    model = tiny("llama").train()
    model.model.layers[1].eval()
    before = traces(model)
    with duo(model, policy_for(model, "alternating")):
        pass
    assert traces(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_attends_as_before_afterwards(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        before = model(ids(2)).logits
        with duo(model, policy_for(model, "none")):
            assert not torch.equal(model(ids(2)).logits, before)
        assert torch.equal(model(ids(2)).logits, before)


def test_an_error_inside_the_block_restores_everything() -> None:
    model = tiny("llama")
    before = traces(model)
    with pytest.raises(KeyError, match="mine"), duo(model, policy_for(model, "alternating")):
        raise KeyError("mine")
    assert traces(model) == before


def test_an_error_inside_the_model_restores_everything() -> None:
    model = tiny("llama")
    before = traces(model)
    with pytest.raises(ValueError, match="4-D"), duo(model, policy_for(model, "alternating")):
        model(ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    assert traces(model) == before


def broken_forward(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken on purpose")


def break_own_run(model: Any) -> None:
    model.model.forward = broken_forward


def break_cached_run(model: Any) -> None:
    inner = model.model.layers[1].self_attn
    plain = inner.forward

    def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            raise RuntimeError("broken on purpose")
        return plain(*args, past_key_values=past_key_values, **kwargs)

    inner.forward = forward


@pytest.mark.parametrize("breakage", [break_own_run, break_cached_run])
def test_an_error_inside_the_probe_restores_everything(breakage: Callable[[Any], None]) -> None:
    model = tiny("llama").train()
    breakage(model)
    before = traces(model)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        enable(model, policy_for(model, "alternating"))
    assert traces(model) == before
    assert policy_of(model) is None


def test_a_policy_that_does_not_fit_changes_nothing() -> None:
    model = tiny("llama")
    before = traces(model)
    with pytest.raises(
        ValueError, match="3 layers but the model has 2|2 layers but the model has 3"
    ):
        enable(model, policy_for(tiny("llama", num_hidden_layers=2), "all"))
    with pytest.raises(ValueError, match="impl must be one of"):
        enable(model, policy_for(model, "all"), impl="magic")
    assert traces(model) == before


def test_enable_and_disable_work_outside_a_block() -> None:
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    before = traces(model)
    bound = enable(model, policy)
    assert policy_of(model) == bound == policy.bind(model)
    found = model.generate(ids(1, 9), max_new_tokens=6, do_sample=False)
    disable(model)
    assert traces(model) == before
    assert found.tolist() == expected_greedy(model, policy, ids(1, 9), 6).tolist()


def test_enabling_twice_and_disabling_without_a_policy_are_errors() -> None:
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    with pytest.raises(ValueError, match="has no policy; nothing to disable"):
        disable(model)
    with duo(model, policy):
        with pytest.raises(ValueError, match=r"has a policy already; call duohead\.disable"):
            enable(model, policy)
        assert policy_of(model) is not None
    with pytest.raises(ValueError, match="has no policy; nothing to disable"):
        disable(model)


def test_two_models_that_share_one_config_object_stay_apart() -> None:
    config = config_of("llama")
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    sharpen(one)
    other.load_state_dict(one.state_dict())
    assert one.config is other.config
    text = config.to_json_string()
    with torch.no_grad():
        dense = other(ids(2)).logits
        with duo(one, policy_for(one, "none")):
            assert torch.equal(other(ids(2)).logits, dense)
            found = one(ids(2)).logits
            with duo(other, policy_for(other, "all")):
                assert_close(other(ids(2)).logits, dense)
                assert torch.equal(one(ids(2)).logits, found)
    assert one.config is other.config is config
    assert config.to_json_string() == text
    assert_close(found, expected_logits(one, policy_for(one, "none"), ids(2)))


def test_two_models_in_two_threads_give_what_they_give_alone() -> None:
    jobs = [
        (model := tiny(family), policy_for(model, kind, recent=recent))
        for family, kind, recent in (("llama", "alternating", 5), ("gemma3", "none", 3))
    ]
    texts = [ids(1, 12, seed=seed) for seed in range(4)]
    expected = [
        [expected_greedy(model, policy, text, 6).tolist() for text in texts]
        for model, policy in jobs
    ]
    together = Barrier(len(jobs))

    def work(job: tuple[Any, Any]) -> list[list[list[int]]]:
        model, policy = job
        together.wait()
        found = []
        for text in texts:
            with duo(model, policy):
                found.append(model.generate(text, max_new_tokens=6, do_sample=False).tolist())
        return found

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            assert list(pool.map(work, jobs)) == expected
    finally:
        sys.setswitchinterval(interval)


def test_a_model_saved_under_a_policy_is_an_ordinary_model(tmp_path: Path) -> None:
    model = tiny("llama")
    with duo(model, policy_for(model, "none")):
        model.save_pretrained(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.suffix == ".json"]
    assert files
    assert all("duo" not in path.read_text() for path in files)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids(2)).logits, model(ids(2)).logits)


def test_a_compiled_wrapper_is_looked_through() -> None:
    model = tiny("llama")
    wrapped = torch.compile(model, backend="eager")
    with duo(wrapped, policy_for(model, "none")) as bound:
        assert policy_of(model) == policy_of(wrapped) == bound


def test_the_probe_runs_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    calls: list[Any] = []
    probe = interface.probe
    monkeypatch.setattr(interface, "probe", lambda *args: (calls.append(args), probe(*args)))
    for _ in range(2):
        with duo(model, policy_for(model, "none")):
            pass
    assert len(calls) == 1
    with duo(tiny("llama", seed=2), policy_for(model, "none"), probe=False):
        assert len(calls) == 1


def test_a_forgotten_model_is_freed() -> None:
    import gc
    import weakref

    model = tiny("llama")
    enable(model, policy_for(model, "none"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_caches_of_one_model_do_not_share_storage() -> None:
    model = tiny("llama")
    policy = policy_for(model, "alternating")
    with torch.no_grad(), duo(model, policy) as bound:
        one, other = DuoCache(bound, model), DuoCache(bound, model)
        model(ids(1, 12), past_key_values=one)
        model(ids(1, 20, seed=4), past_key_values=other)
        found = model(ids()[:, 12:13], past_key_values=one).logits
    text = torch.cat([ids(1, 12), ids()[:, 12:13]], 1)
    assert_close(found, expected_logits(model, policy, text)[:, -1:])
