"""DuoAttention for any Hugging Face causal language model.

A few attention heads need the whole context (retrieval heads); every other head works with attention sinks and
recent tokens (streaming heads). The names below are doors: each opens its room, and what that room needs (torch,
transformers), at first use, so that ``import duohead`` itself costs nothing. One more door is for transformers: after
``import duohead`` its Auto classes load pattern folders and adapters.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


_AUTO_MODULES = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


class _AutoModules:
    """Finds transformers' Auto modules as others would, and has our classes registered once they are loaded.

    Registering at once would import transformers, which takes seconds, for everybody who imports us.
    """

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _AUTO_MODULES:
            return None
        others = (item for item in sys.meta_path if item is not cls and hasattr(item, "find_spec"))
        found = (finder.find_spec(name, path, target) for finder in others)
        spec: Any = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(name)

            spec.loader.exec_module = execute_and_register
        return spec


def _register(module: str) -> None:
    from duohead.adapter import auto

    auto.register(module)


sys.meta_path.insert(0, _AutoModules)
for _module in _AUTO_MODULES:
    if _module in sys.modules:
        _register(_module)
