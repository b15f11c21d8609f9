"""DuoAttention for any Hugging Face causal language model.

A few attention heads need the whole context (retrieval heads); every other head works with attention sinks and
recent tokens (streaming heads). The names below are doors: each opens its room, and what that room needs (torch,
transformers), at first use, so that ``import duohead`` itself costs nothing. One more door is for transformers: after
``import duohead`` its Auto classes load pattern folders and adapters.
"""

import sys
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from duohead.adapter.auto import DuoheadConfig, DuoheadForCausalLM
    from duohead.cache import DuoCache
    from duohead.identify import identify
    from duohead.models import disable, duo, enable, reorder_heads, restore_heads
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

__version__ = "0.1.0"
__all__ = [
    "DuoCache",
    "DuoheadConfig",
    "DuoheadForCausalLM",
    "HeadPattern",
    "HeadPolicy",
    "__version__",
    "disable",
    "duo",
    "enable",
    "identify",
    "reorder_heads",
    "restore_heads",
]

_DOORS = {
    "DuoCache": "duohead.cache",
    "DuoheadConfig": "duohead.adapter.auto",
    "DuoheadForCausalLM": "duohead.adapter.auto",
    "HeadPattern": "duohead.pattern",
    "HeadPolicy": "duohead.policy",
    "disable": "duohead.models",
    "duo": "duohead.models",
    "enable": "duohead.models",
    "identify": "duohead.identify",
    "reorder_heads": "duohead.models",
    "restore_heads": "duohead.models",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the room `duohead.identify` would bind it over the function of the same name.
        if not (name in _DOORS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'duohead' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_DOORS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _Finder:
    """Has AutoConfig told of our folders once somebody imports it; see `duohead.adapter.auto` for the rest.

    transformers knows no entry points for this, and importing it here would take seconds of everybody who imports us.
    So the import system has to say when: this finds the one module by asking all other finders, and puts a `_Loader`
    before theirs. It stays out of the way of whatever else hooks imports, itself after a reload included.
    """

    # Threads that ask all finders just now, this one among them, which then has nothing to say.
    asking: ClassVar[set[int]] = set()

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        thread = get_ident()
        if name != _AUTO_CONFIG or thread in cls.asking:
            return None
        cls.asking.add(thread)
        try:
            finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
            found = (finder.find_spec(name, path, target) for finder in finders)
            spec: Any = next((spec for spec in found if spec is not None), None)
        finally:
            cls.asking.discard(thread)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """Somebody else's loader, and a word to us after it; the loaded module knows theirs only."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


def _register() -> None:
    from duohead.adapter.auto import register

    register()


# Looked up before the finder is there: an import that it hooks waits for ours, so ours must not wait for that one.
_loaded = _AUTO_CONFIG in sys.modules
sys.meta_path.insert(0, _Finder)
if _loaded:
    _register()
