"""Settings as plain data: by dotted path, as one text for equal ones, in few characters."""

from __future__ import annotations

import hashlib
import json
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


def canonical_json(value: Any) -> str:
    """One text for equal content: sorted keys, no spaces, shortest floats that read back equal.

    Ids of arms and trials and the seals of the ledger rest on it.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def short(value: Any) -> str:
    """Fractions with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
