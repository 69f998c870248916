"""fastqadapter: a small adapter on a frozen LLM, trained from preference pairs to be its residual Q-function.

The public names are loaded when they are first used, so that `import fastqadapter` itself imports nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here

if TYPE_CHECKING:
    from fastqadapter import ops
    from fastqadapter.config import QAdapterConfig
    from fastqadapter.data import PreferenceCollator
    from fastqadapter.models import QAdapterModel, get_qadapter_model
    from fastqadapter.packing import PackedPairs
    from fastqadapter.trainer import QAdapterTrainer, QAdapterTrainingArguments

__all__ = [
    "PackedPairs",
    "PreferenceCollator",
    "QAdapterConfig",
    "QAdapterModel",
    "QAdapterTrainer",
    "QAdapterTrainingArguments",
    "get_qadapter_model",
    "ops",
]

_MODULE_OF = {
    "PackedPairs": "packing",
    "PreferenceCollator": "data",
    "QAdapterConfig": "config",
    "QAdapterModel": "models",
    "QAdapterTrainer": "trainer",
    "QAdapterTrainingArguments": "trainer",
    "get_qadapter_model": "models",
}

if not TYPE_CHECKING:  # a type checker sees the imports above, and still reports a name that does not exist

    def __getattr__(name: str) -> object:
        if name == "ops":
            return import_module("fastqadapter.ops")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"fastqadapter.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # the next use finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
