"""DuoAttention for any Hugging Face causal language model.

A few attention heads need the whole context (retrieval heads); every other head works with attention sinks and
recent tokens (streaming heads). The names below are doors: each opens its room, and what that room needs (torch,
transformers), at first use, so that ``import duohead`` itself costs nothing.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duohead.cache import DuoCache
    from duohead.identify import identify
    from duohead.models import disable, duo, enable
    from duohead.pattern import HeadPattern
    from duohead.policy import HeadPolicy

__version__ = "0.1.0"
__all__ = [
    "DuoCache",
    "HeadPattern",
    "HeadPolicy",
    "__version__",
    "disable",
    "duo",
    "enable",
    "identify",
]

_DOORS = {
    "DuoCache": "duohead.cache",
    "HeadPattern": "duohead.pattern",
    "HeadPolicy": "duohead.policy",
    "disable": "duohead.models",
    "duo": "duohead.models",
    "enable": "duohead.models",
    "identify": "duohead.identify",
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
