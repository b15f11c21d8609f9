"""Pattern files: our format, the reference code's, the Laguna adapter's, the hub; whole, damaged and hostile."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from duohead.pattern import HeadPattern

NAN = float("nan")
TSV, CONFIG, TENSORS = "full_attention_heads.tsv", "config.json", "duohead.safetensors"


def pattern(**fields) -> HeadPattern:
    alpha = [[0.1, 0.9, 0.5, 0.0], [NAN] * 4, [1.0, 1.0, 0.5, 1e-7]]
    return HeadPattern.from_alpha(alpha, **fields)


def upstream(folder: Path, text: str, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TSV).write_text(text)
    (folder / CONFIG).write_text(json.dumps({"sink_size": 128, "recent_size": 256, **settings}))
    return folder


def adapter(folder: Path, alpha, **settings) -> Path:
    (folder / "duo_attention").mkdir(parents=True)
    torch.save(alpha, folder / "duo_attention" / "full_attention_heads.pt")
    keys = {
        "sink_size": 64,
        "recent_size": 256,
        "base_model_name_or_path": "some/laguna",
        "format_version": 1,
    }
    (folder / "duo_attention" / CONFIG).write_text(json.dumps({**keys, **settings}))
    (folder / CONFIG).write_text(json.dumps({"model_type": "laguna"}))
    return folder


@settings(max_examples=30, deadline=None)
@given(
    alpha=arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        elements=st.floats(0, 1, width=32),
    ),
    ungated=st.sets(st.integers(0, 4), max_size=3),
    sink=st.integers(0, 500),
    recent=st.integers(1, 500),
)
def test_saving_and_loading_gives_the_same_pattern_to_the_bit(
    tmp_path_factory, alpha, ungated, sink, recent
) -> None:
    alpha[[i for i in ungated if 0 < i < len(alpha)]] = NAN
    made = HeadPattern.from_alpha(alpha, sink=sink, recent=recent)
    folder = tmp_path_factory.mktemp("pattern") / "out"
    made.save(folder)
    loaded = HeadPattern.load(folder)
    assert loaded == made
    assert hash(loaded) == hash(made)
    assert loaded.alpha.tobytes() == made.alpha.tobytes()


def test_every_field_survives(tmp_path: Path) -> None:
    made = pattern(
        sink=4, recent=32, base_model="org/model", base_revision="abc", base_type="gemma3", windows=[None, 512, None],
        kv_heads=[4, 4, 4], selection={"retrieval_ratio": 0.5, "retrieval_dtype": "fp8"},
        training={"steps": 10, "loss": [0.5, 0.25]},
    )  # fmt: skip
    made.save(tmp_path / "out")
    assert HeadPattern.load(tmp_path / "out") == made
    stored = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert stored["model_type"] == "duohead"
    assert stored["format_version"] == 1
    assert stored["base_model_name_or_path"] == "org/model"
    assert (stored["sink_size"], stored["recent_size"]) == (4, 32)
    assert (stored["num_hidden_layers"], stored["num_key_value_heads"]) == (3, 4)
    assert stored["gated_layers"] == [True, False, True]
    assert stored["selection"] == {"retrieval_ratio": 0.5}
    assert stored["precisions"] == {"retrieval_dtype": "fp8"}


def test_patterns_that_differ_are_not_equal() -> None:
    assert pattern() == pattern()
    assert pattern() != pattern(sink=3)
    assert pattern() != pattern().ungate([0])
    assert pattern() != 3


def test_the_reference_codes_loader_can_read_what_we_save(tmp_path: Path) -> None:
    pattern(sink=4, recent=32).save(tmp_path)
    heads = np.clip(np.loadtxt(tmp_path / TSV, dtype=float, delimiter="\t"), 0, 1)
    stored = json.loads((tmp_path / CONFIG).read_text())
    assert np.array_equal(heads.astype(np.float32), pattern().alpha, equal_nan=True)
    assert (stored["sink_size"], stored["recent_size"]) == (4, 32)


def test_a_failed_save_leaves_the_old_pattern_in_place(tmp_path, monkeypatch) -> None:
    pattern().save(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            "os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space left"):
            replace(pattern(), sink=1).save(tmp_path / "out")
        with pytest.raises(OSError, match="No space left"):
            pattern().save(tmp_path / "new")
    assert HeadPattern.load(tmp_path / "out") == pattern()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _edit(**changes):
    def damage(folder: Path) -> None:
        stored = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**stored, **changes}))

    return damage


def _cut(name: str, keep: float):
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def _put(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit(model_type="llama"), r"config.json: model_type must be 'duohead'.*got 'llama'"),
        (_edit(format_version=2), r"format_version 2 is newer than the 1 that this duohead reads; upgrade"),
        (_edit(format_version="1"), r"format_version must be an integer >= 1, got '1'"),
        (_edit(num_hidden_layers=4), r"duohead.safetensors: expected 4 layers x 4 KV heads.*found 3 x 4"),
        (_edit(num_key_value_heads=None), "num_key_value_heads must be an integer >= 1, got None"),
        (_edit(sink_size=-1), "sink_size must be an integer >= 0, got -1"),
        (_edit(recent_size=0), "recent_size must be an integer >= 1, got 0"),
        (_edit(recent_size=True), "recent_size must be an integer >= 1, got True"),
        (_edit(sink_size=10**30), "config.json: sink_size must be at most 268435456 tokens, got 10{30}"),
        (_edit(training=[1]), "training must be of type dict or null"),
        (_edit(gated_layers=[True] * 3), "gated_layers disagrees with the alphas"),
        (_edit(native_windows=[1]), r"windows must have one entry per layer"),
        (_put(CONFIG, b"not json"), "config.json: expected JSON, got something else"),
        (_put(CONFIG, b"\xff\xfe\x00"), "config.json: expected JSON, got something else"),
        (_put(CONFIG, b"[]"), "config.json: expected a JSON object, got list"),
        (lambda folder: (folder / CONFIG).unlink(), r"config.json is missing beside duohead.safetensors"),
        (lambda folder: (folder / TSV).unlink(), r"full_attention_heads.tsv is missing"),
        (lambda folder: (folder / TENSORS).unlink(), r"duohead.safetensors is missing"),
        (_cut(TENSORS, 0.9), r"duohead.safetensors: expected a safetensors file.*truncated"),
        (_cut(TENSORS, 0.02), r"duohead.safetensors: expected a safetensors file.*truncated"),
        (_put(TENSORS, b""), r"duohead.safetensors: expected a safetensors file.*truncated"),
        (_cut(TSV, 0.3), r"tsv"),
        (_put(TSV, b""), "expected one row of alphas per layer, found none"),
        (_put(TSV, b"\x80\x02\x00"), "found binary data"),
        (_put(TSV, b"1\t0\n1\n"), "line 2: expected 2 values as in line 1, found 1; the file may be truncated"),
        (_put(TSV, b"1\tx\n"), "line 1: expected tab-separated numbers, could not convert string to float: 'x'"),
        (_put(TSV, b"1\t1\t1\t1\n" * 3), "hold different alphas"),
        (_put(TSV, b"1\t1\t1\t1\n" * 2), "tsv: expected 3 layers x 4 KV heads as config.json says, found 2 x 4"),
    ],
)  # fmt: skip
def test_a_damaged_folder_says_which_file_is_wrong_and_how(
    tmp_path: Path, damage, message: str
) -> None:
    pattern().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        HeadPattern.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"beta": torch.zeros(3, 4)}, "expected one float32 matrix 'alpha', found {'beta'"),
        ({"alpha": torch.zeros(12)}, "expected one float32 matrix 'alpha'"),
        ({"alpha": torch.zeros(3, 4, dtype=torch.float64)}, "expected one float32 matrix 'alpha'"),
        ({"alpha": torch.zeros(3, 4, dtype=torch.bfloat16)}, "duohead.safetensors"),
        ({"alpha": torch.full((3, 4), 1.5)}, "hold different alphas"),
    ],
)
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, tensors, message: str) -> None:
    from safetensors.torch import save_file

    pattern().save(tmp_path)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=message):
        HeadPattern.load(tmp_path)


def test_upstream_gates_are_clipped(tmp_path: Path) -> None:
    folder = upstream(
        tmp_path,
        "-1.5e-04\t1.03e+00\n5.0e-01\t1.0e+00\n",
        model_name="models/x",
        lr=0.02,
        device="cuda",
    )
    loaded = HeadPattern.load(folder)
    assert loaded.alpha.tolist() == [[0.0, 1.0], [0.5, 1.0]]
    assert (loaded.sink, loaded.recent, loaded.base_model) == (128, 256, "models/x")
    assert loaded.training == {"lr": 0.02}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "nan\t1\n",
            "alpha of layer 0, KV head 0 is nan, which only duohead's own format gives a meaning",
        ),
        ("1\t9.84\n", r"alphas must lie in \[-1, 2\], got 9.84 in layer 0, KV head 1"),
        ("inf\t1\n", "got inf"),
        ("-7\t1\n", "got -7"),
        ("1\t1\n1\n", "line 2: expected 2 values"),
        ("1\t1\n\n1\t1\n", "line 2: expected 2 values as in line 1, found 0"),
    ],
)
def test_malformed_upstream_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadPattern.load(upstream(tmp_path, text))


def test_upstream_needs_its_window_sizes(tmp_path: Path) -> None:
    folder = upstream(tmp_path, "1\t0\n")
    (folder / CONFIG).write_text('{"sink_size": 128}')
    with pytest.raises(ValueError, match="recent_size must be an integer >= 1, got nothing"):
        HeadPattern.load(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"config.json is missing beside full_attention_heads.tsv"):
        HeadPattern.load(folder)


def test_the_published_patterns_load(shared: Path) -> None:
    folders = sorted((shared / "patterns").glob("*/*"))
    shapes = {}
    for folder in folders:
        loaded = HeadPattern.load(folder)
        shapes[folder.parent.name] = loaded.alpha.shape
        assert (loaded.sink, loaded.recent) == (128, 256)
        raw = np.loadtxt(folder / TSV, delimiter="\t")
        assert (
            np.abs(loaded.alpha - np.clip(raw, 0, 1)).max() == 0
        )  # bf16 gates are exact in float32
        for ratio in (0.0, 0.25, 0.5, 1.0):
            policy = loaded.policy(retrieval_ratio=ratio)
            assert sum(len(layer.retrieval) for layer in policy.layers) == ratio * loaded.alpha.size
    assert len(folders) == 6
    assert shapes["Llama-2-7B-32K-Instruct"] == (32, 32)
    assert shapes["Mistral-7B-Instruct-v0.2"] == (32, 8)


def test_an_adapter_folder_loads_from_its_tensor(tmp_path: Path) -> None:
    loaded = HeadPattern.load(adapter(tmp_path, torch.tensor([[-0.01, 0.5], [1.01, 0.25]])))
    assert loaded.alpha.tolist() == [[0.0, 0.5], [1.0, 0.25]]
    assert np.array_equal(loaded.raw_alpha, np.float32([[-0.01, 0.5], [1.01, 0.25]]))
    assert dict(loaded.selection) == {"threshold": 0.5}
    assert (loaded.sink, loaded.recent) == (64, 256)
    assert (loaded.base_model, loaded.base_type) == ("some/laguna", "laguna")


def test_an_adapter_folder_loads_from_its_table_and_its_top_config(tmp_path: Path) -> None:
    folder = adapter(tmp_path, torch.zeros(1, 1))
    (folder / "duo_attention" / "full_attention_heads.pt").unlink()
    (folder / "duo_attention" / CONFIG).unlink()
    (folder / "duo_attention" / TSV).write_text("0.5\t1\n")
    (folder / CONFIG).write_text(json.dumps({"duo_attention": {"sink_size": 3, "recent_size": 5}}))
    loaded = HeadPattern.load(folder)
    assert loaded.alpha.tolist() == [[0.5, 1.0]]
    assert (loaded.sink, loaded.recent) == (3, 5)


def test_layers_that_an_adapters_model_windows_are_not_ranked(tmp_path: Path) -> None:
    folder = adapter(tmp_path, torch.tensor([[0.25, 1.5], [0.75, 1.0]]))
    model = {
        "model_type": "laguna", "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 8, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(model))
    loaded = HeadPattern.load(folder)
    assert np.array_equal(loaded.alpha, np.float32([[0.25, 1], [NAN, NAN]]), equal_nan=True)
    assert loaded.raw_alpha is not None and loaded.raw_alpha.tolist() == [[0.25, 1.5], [0.75, 1.0]]
    assert (loaded.windows, loaded.kv_heads) == ((None, 7), (2, 2))
    loaded.save(tmp_path / "ours")
    assert HeadPattern.load(tmp_path / "ours") == loaded
    for other in (
        {"layer_types": ["full_attention"]},
        {"layer_types": {"0": "full_attention"}},
        {"num_key_value_heads": float("inf")},
    ):
        (folder / CONFIG).write_text(json.dumps({**model, **other}))
        with pytest.raises(ValueError, match="expected the config of a model with 2 layers"):
            HeadPattern.load(folder)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_tries_to_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", Hostile(tmp_path / "ran"))
    message = "full_attention_heads.pt: refused, it is not a plain tensor"
    with pytest.raises(ValueError, match=message):
        HeadPattern.load(folder)
    (folder / "duo_attention" / "full_attention_heads.pt").write_bytes(
        pickle.dumps(Hostile(tmp_path / "ran"), protocol=2)
    )
    with pytest.raises(ValueError, match=message):
        HeadPattern.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.zeros(4), r"expected one tensor \(layers, KV heads\), found shape \(4,\)"),
        ({"alpha": torch.zeros(1, 1)}, r"expected one tensor \(layers, KV heads\), found dict"),
        (torch.full((2, 2), NAN), "is nan"),
        (torch.full((2, 2), 5.0), r"must lie in \[-1, 2\], got 5"),
    ],
)
def test_an_adapter_with_another_tensor_is_refused(tmp_path: Path, alpha, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadPattern.load(adapter(tmp_path, alpha))


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, torch.zeros(8, 8))
    _cut("duo_attention/full_attention_heads.pt", 0.5)(folder)
    with pytest.raises(ValueError, match="full_attention_heads.pt: refused"):
        HeadPattern.load(folder)


def test_an_adapter_without_heads_or_settings_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, torch.zeros(1, 1))
    (folder / "duo_attention" / "full_attention_heads.pt").unlink()
    with pytest.raises(ValueError, match="holds neither full_attention_heads.pt nor"):
        HeadPattern.load(folder)
    (folder / "duo_attention" / CONFIG).unlink()
    with pytest.raises(ValueError, match="holds an adapter without settings"):
        HeadPattern.load(folder)


def test_a_place_that_holds_no_pattern_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "file", "is a file; name the folder"),
        (tmp_path / "empty", "holds no head pattern: expected .*, found nothing"),
        (tmp_path, "found empty, file"),
        (tmp_path / "missing", "no such folder"),
        ("a/b/c", "a/b/c: no such folder, and not a hub id either"),
        ("./missing", "no such folder, and not a hub id either"),
        ("pocket", r"not a hub id either; .*bundled ones lie at duohead.pocket.pattern\(model\)"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadPattern.load(path)


def test_a_hub_id_is_looked_for_in_the_hub_unless_a_folder_has_that_name(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(upstream(tmp_path / "cache", "1\t0\n"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert HeadPattern.load("owner/name", revision="v1").alpha.tolist() == [[1.0, 0.0]]
    assert asked == [("owner/name", "v1")]
    upstream(tmp_path / "owner" / "name", "0\t1\n")
    assert HeadPattern.load("owner/name").alpha.tolist() == [[0.0, 1.0]]
    assert len(asked) == 1


def test_a_hub_id_without_a_network_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"nobody/nothing: no such folder, and it cannot be had from the hub"
    ):
        HeadPattern.load("nobody/nothing")
