"""How the parts of the project that are optional are installed."""

from __future__ import annotations


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml; neck-export is on no package index, so from a checkout."""
    return f"pip install '.[{extra}]' in a checkout of neck-export"
