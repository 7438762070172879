"""Settings as plain data: by dotted path, and in few characters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"patch": 8}} -> {"model.patch": 8}; lists and empty mappings stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def short(value: Any) -> str:
    """Fractions with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
