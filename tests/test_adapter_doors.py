"""How transformers finds an adapter: after `import duohead`, in either order, or through the folder's remote code."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from duohead import DuoheadConfig, DuoheadForCausalLM, HeadPattern, pocket
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
{AUTO}
config = AutoConfig.from_pretrained({str(pocket.pattern("pocket"))!r})
assert type(config) is duohead.DuoheadConfig
assert AutoModelForCausalLM._model_mapping[type(config)] is duohead.DuoheadForCausalLM
assert type(config) in TOKENIZER_MAPPING
assert "duohead.models" not in sys.modules  # nothing is opened before somebody asks
from transformers.models.auto import configuration_auto
assert configuration_auto.__loader__ is configuration_auto.__spec__.loader
assert type(configuration_auto.__loader__).__name__ == "SourceFileLoader"
""")
    assert float(said) < 0.5


def test_the_import_hook_bears_reloads_other_hooks_and_threads() -> None:
    run("""
import importlib, threading

class Greedy:
    # Asks everybody, whoever is asking it.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.startswith("transformers.models.auto"):
            others = (item for item in sys.meta_path if item is not cls)
            return next((s for s in (i.find_spec(name, path, target) for i in others) if s), None)

sys.meta_path.insert(0, Greedy)
import duohead
importlib.reload(duohead)
del sys.modules["duohead"]
sys.setswitchinterval(1e-5)
failed = []

def load(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed.append(error)

import transformers  # which is not safe to import in threads by itself
names = ("duohead", "duohead.adapter.auto", "transformers.models.auto.configuration_auto")
threads = [threading.Thread(target=load, args=(name,)) for name in names * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert not failed and not any(thread.is_alive() for thread in threads), failed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "duohead" in CONFIG_MAPPING
""")


def test_a_config_that_no_auto_class_has_read_is_known_to_them_as_well(monkeypatch) -> None:
    config = DuoheadConfig.from_pretrained(pocket.pattern("pocket"))
    known = AutoModelForCausalLM._model_mapping._extra_content
    monkeypatch.delitem(known, DuoheadConfig)  # as in another process
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert known[DuoheadConfig] is DuoheadForCausalLM


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
