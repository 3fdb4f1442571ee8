"""The environment variables that the kernels read, all in one place."""

from __future__ import annotations

import os
from pathlib import Path


def compiler() -> str | None:
    """CXX: the C++ compiler to try first."""
    return os.environ.get("CXX")


def cache_home() -> Path:
    """XDG_CACHE_HOME, or ~/.cache, or the current folder's .cache for a user without a home."""
    found = os.environ.get("XDG_CACHE_HOME")
    if found:
        return Path(found)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(".cache")
