"""How transformers finds an adapter: after `import duohead`, in either order, or through the folder's remote code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from duohead import HeadPattern, pocket
from duohead.adapter import save

ROOT = Path(__file__).resolve().parent.parent
AUTO = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
"""


def run(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_first_is_quick_and_still_teaches_the_auto_classes() -> None:
    said = run(f"""
import time
start = time.perf_counter()
import duohead
print(time.perf_counter() - start)
assert "transformers" not in sys.modules and "torch" not in sys.modules
assert duohead._AutoModules.find_spec("json") is None
{AUTO}
config = AutoConfig.from_pretrained({str(pocket.pattern("pocket"))!r})
assert type(config) is duohead.DuoheadConfig
assert AutoModelForCausalLM._model_mapping[type(config)] is duohead.DuoheadForCausalLM
assert type(config) in TOKENIZER_MAPPING
assert "duohead.models" not in sys.modules  # nothing is opened before somebody asks
from importlib.util import find_spec
assert find_spec("transformers.models.auto.modeling_auto").origin.endswith("modeling_auto.py")
assert find_spec("transformers.models.auto.nothing") is None
""")
    assert float(said) < 0.5


def test_remote_code_takes_the_installed_package_after_which_no_flag_is_needed(
    tmp_path: Path,
) -> None:
    # Here the Auto classes are imported first, and the package comes later.
    save.write(tmp_path / "adapter", HeadPattern.load(pocket.pattern("pocket")))
    code = f"""
{AUTO}
folder = {str(tmp_path / "adapter")!r}
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("remote code ran without being trusted")
assert "duohead" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, retrieval_ratio=0.25)
assert type(AutoConfig.from_pretrained(folder)).__module__ == "duohead.adapter.auto"
from duohead.models import policy_of
assert policy_of(model).retrieval_ratio == 0.25
out = model.generate(**tokenizer("It was", return_tensors="pt"), max_new_tokens=2, do_sample=False)
print("said:", tokenizer.decode(out[0], skip_special_tokens=True))
AutoModelForCausalLM.from_pretrained(folder)
model.save_pretrained({str(tmp_path / "again")!r})
"""
    said = run(code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert "said: It was" in said
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert "auto.py" not in names and "modeling_duohead.py" in names


def test_remote_code_without_the_package_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "duohead", None)
    message = "needs the Python package duohead.*pip install -U duohead"
    with pytest.raises(ImportError, match=message):
        exec(compile(save.SOURCE, save.MODULE, "exec"), {})
