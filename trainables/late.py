"""Libraries that are imported when they are first used.

What a study file may name (maskings, losses, data sources, ...) is read off the functions that
stand in our tables. So the driver and every command import the files of those functions, and
must not wait seconds for libraries that only training or decoding calls:

    if TYPE_CHECKING:
        import torch
    else:
        torch = Late("torch")
"""

from __future__ import annotations

import importlib
from functools import cached_property
from types import ModuleType
from typing import Any


class Late:
    """Stands for a module; the first attribute that is asked for imports it."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self) -> ModuleType:
        return importlib.import_module(self._name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)
