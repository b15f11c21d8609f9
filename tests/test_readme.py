"""The README is short, its tables say what the records say, and its code and paths exist."""

import importlib.util
import re
from pathlib import Path


def test_the_tables_are_those_of_the_records(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("readme", root / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    for page in readme.PAGES:
        text = (root / page).read_text()
        assert re.findall(r"<!-- table: (\w+) -->", text), page
        assert readme.rendered(text) == text, f"{page}: run python tools/readme.py"


def test_it_is_short(root: Path) -> None:
    assert len((root / "README.md").read_text().splitlines()) < 150


def test_the_rooms_and_files_it_names_exist(root: Path) -> None:
    text = (root / "README.md").read_text()
    tree = re.search(r"```\nduohead/\n(.*?)```", text, re.DOTALL)
    assert tree is not None
    for line in tree[1].splitlines():
        for name in line.split("  ")[1].split():
            assert (root / "duohead" / name).exists(), name
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (root / path).exists(), path


def test_its_code_runs(root: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["cache_bytes"]
