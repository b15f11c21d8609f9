"""The bundled models load, are as small as promised, and retrieve; the tool that makes them runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duohead import HeadPattern, pocket
from duohead.identify.haystack import default_text, tokens
from duohead.identify.passkeys import passkey_sample
from duohead.shapes import layer_shapes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for tools/


@pytest.fixture(params=pocket.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every bundled model in turn."""
    return bundled(request.param)


def bundled(name: str) -> str:
    """The name of a bundled model, if its weights are there; otherwise the test is skipped."""
    if not (Path(pocket.__file__).parent / name / "model.safetensors").is_file():
        pytest.skip(f"{name} has not been trained yet")
    return name


def test_a_bundled_model_takes_eight_megabytes_at_most_and_its_folder_little_more(
    name: str,
) -> None:
    assert (pocket.folder(name) / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(file.stat().st_size for file in pocket.folder(name).iterdir()) <= 8_300_000


def test_all_bundled_weights_take_24_megabytes_at_most() -> None:
    weights = Path(pocket.__file__).parent.glob("*/model.safetensors")
    assert sum(file.stat().st_size for file in weights) <= 24_000_000


def test_the_pattern_beside_a_bundled_model_gates_its_global_layers(name: str) -> None:
    from transformers import AutoConfig

    shapes = layer_shapes(AutoConfig.from_pretrained(pocket.folder(name)))
    pattern = HeadPattern.load(pocket.pattern(name))
    assert pattern.base_model == name
    assert pattern.gated.all(axis=1).tolist() == [shape.gated for shape in shapes]
    assert pattern.gated.any(axis=1).tolist() == [shape.gated for shape in shapes]


@pytest.mark.parametrize(
    ("name", "kv_heads"), [("pocket", 4), ("pocket-mha", 8), ("pocket-laguna", 4)]
)
def test_a_bundled_model_loads_in_the_asked_dtype_and_shape(name: str, kv_heads: int) -> None:
    model, tokenizer = pocket.load(bundled(name), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert sum(p.numel() for p in model.parameters()) <= 3_990_000
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (8, kv_heads)
    assert model.config.head_dim == 64 and model.config.max_position_embeddings == 32768
    text = "It's 42 degrees, said the café owner.\n\n  Twice."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id


def test_a_bundled_model_answers_nine_of_ten_passkey_questions_on_unseen_prose(name: str) -> None:
    model, tokenizer = pocket.load(name)
    haystack = tokens(default_text(), tokenizer, at_least=4096)
    generator = torch.Generator().manual_seed(0)
    sample = passkey_sample(tokenizer, haystack, context_length=2048, generator=generator)
    with torch.no_grad():
        predicted = model(sample.input_ids[None]).logits[0].argmax(-1)
    right = sum(
        torch.equal(predicted[start - 1 : end - 1], sample.input_ids[start:end])
        for start, end in sample.answers
    )
    assert right >= 9


def test_the_card_states_scores_and_training(name: str) -> None:
    card = (pocket.folder(name) / "README.md").read_text(encoding="utf-8")
    for words in ("exact match", "first token", "Perplexity", "minutes on", "16384", "## Limits"):
        assert words in card


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match="name must be one of pocket, pocket-mha, pocket-laguna, got 'giant'"
    ):
        pocket.load("giant")


def test_the_training_form_of_the_model_computes_what_transformers_computes() -> None:
    from tools.pocket_scores import of_transformers
    from tools.pocket_shapes import SHAPES

    torch.manual_seed(0)
    model = SHAPES["tiny"].model(compute=torch.float32, compiled=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ids, places = torch.randint(1024, (2, 40)), torch.arange(80)
    theirs = of_transformers(model.to_transformers().eval())(ids, places)
    torch.testing.assert_close(model.logits(ids, places), theirs, atol=1e-5, rtol=1e-5)
    assert theirs.std() > 0.1


def test_the_training_tool_makes_a_loadable_folder_on_a_cpu(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:250_000], encoding="utf-8")
    command = [
        sys.executable,
        "tools/train_pocket.py",
        "--text",
        str(text),
        "--out",
        str(tmp_path / "tiny"),
        "--shape",
        "tiny",
    ]
    command += ["--minutes", "0.03", "--workers", "0", "--results", str(tmp_path / "results.jsonl")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["op"] for r in records} == {"needle", "perplexity"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in (tmp_path / "tiny").iterdir()
    }
