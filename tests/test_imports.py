"""The shape of the code: who may import whom, what stays unloaded, how long a file may be."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "duohead"

# A room imports only rooms above it.
ROOMS = (
    "files", "record", "shapes", "fingerprint", "codec", "selection", "storage", "policy", "formats", "pattern",
    "mask", "cache", "attention", "models", "pocket", "adapter", "identify", "evaluate", "bench", "cli",
)  # fmt: skip
HEAVY = ("torch", "transformers", "triton", "cutlass", "flash_attn", "matplotlib", "tokenizers")


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, inside functions and for type checkers alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: name the module in full"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def room(name: str) -> str:
    return name.split(".")[1].removesuffix(".py")


def breaches(path: Path, package: Path = PACKAGE) -> list[str]:
    relative = path.relative_to(package)
    if relative.parts[0] in ("__init__.py", "__main__.py"):  # the doors
        return []
    own = relative.parts[0].removesuffix(".py")
    found = []
    for line, name in imports(path):
        if name.split(".")[0] != "duohead" or name == "duohead.__version__":
            continue
        if room(name) not in ROOMS:
            found.append(f"{relative}:{line} imports {name}: name the room it is in")
        elif ROOMS.index(room(name)) > ROOMS.index(own):
            found.append(f"{relative}:{line} imports {name}: {room(name)} is below {own}")
        elif is_implementation(path) and is_implementation(module_file(name)):
            found.append(
                f"{relative}:{line} imports {name}: implementations do not import one another"
            )
    return found


def module_file(name: str) -> Path:
    """The file of the module that a full name is, or lies in."""
    inner = PACKAGE.joinpath(*name.split(".")[1:])
    return next(
        (path for path in (inner.with_suffix(".py"), inner.parent.with_suffix(".py")) if path.is_file()), inner
    )  # fmt: skip


def is_implementation(path: Path) -> bool:
    """Whether a file of the attention room is an implementation: it defines `attend`."""
    if path.parent.name != "attention" or path.name == "__init__.py" or not path.is_file():
        return False
    return any(
        isinstance(node, ast.FunctionDef) and node.name == "attend"
        for node in ast.parse(path.read_text()).body
    )


def test_every_room_has_its_place() -> None:
    present = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules("duohead")
    }
    assert present - {"__init__", "__main__"} <= set(ROOMS)


def test_a_room_imports_only_rooms_above_it() -> None:
    assert [breach for path in modules("duohead") for breach in breaches(path)] == []


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("policy.py", "def f():\n    from duohead.cache import DuoCache", "cache is below policy"),
        ("codec.py", "import duohead.attention.reference", "attention is below codec"),
        ("mask.py", "from duohead import HeadPattern", "name the room"),
        (
            "attention/flex.py",
            "from duohead.attention import reference\ndef attend(): ...",
            "do not import one another",
        ),
        ("attention/choice.py", "from duohead.attention import reference", None),
        ("attention/__init__.py", "from duohead.attention import reference", None),
        ("models/x.py", "from duohead import codec\nfrom duohead import __version__", None),
    ],
)
def test_the_import_rule_sees_what_it_should(
    tmp_path: Path, file: str, code: str, message: str | None
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    found = breaches(path, tmp_path)
    assert (message is None and not found) or (len(found) == 1 and str(message) in found[0])


def loaded_after(code: str) -> set[str]:
    """Top-level packages in memory after running `code` in a fresh interpreter."""
    probe = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(*{{n.split('.')[0] for n in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code", ["import duohead", "import duohead.record, duohead.files, duohead.cli"]
)
def test_importing_the_package_loads_nothing_heavy(code: str) -> None:
    assert not {*HEAVY, "numpy"} & loaded_after(code)


def test_patterns_load_without_torch() -> None:
    assert not set(HEAVY) & loaded_after("from duohead import HeadPattern")


def test_a_policy_needs_torch_only() -> None:
    heavy = set(HEAVY) - {"torch"}
    assert not heavy & loaded_after(
        "from duohead import HeadPolicy; import duohead.mask, duohead.codec"
    )


def test_the_command_line_loads_what_a_verb_needs_when_it_runs() -> None:
    heavy = set(HEAVY) - {"torch"}
    code = "from duohead.cli import VERBS, build_parser\nfor verb in VERBS: build_parser(verb)"
    assert not heavy & loaded_after(code)


def test_every_door_opens() -> None:
    import duohead

    for name in duohead.__all__:
        assert getattr(duohead, name) is not None
        assert name in dir(duohead)
    with pytest.raises(AttributeError, match="module 'duohead' has no attribute 'nothing'"):
        _ = duohead.nothing


@pytest.mark.parametrize(
    "first", ["", "import duohead.identify.passkeys", "from duohead.identify import haystack"]
)
def test_identify_is_the_function_although_a_room_has_its_name(first: str) -> None:
    loaded_after(
        f"{first}\nimport duohead, types\nfrom duohead import identify\nimport duohead.identify.gates\n"
        "assert duohead.identify is identify and isinstance(identify, types.FunctionType)"
    )


def test_no_file_is_long_and_most_are_short() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in modules("duohead", "tests", "tools")}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400} == {}
    assert statistics.median(n for p, n in lengths.items() if PACKAGE in p.parents) < 200
