"""Packages that only some verbs need."""

from __future__ import annotations

import importlib.util

from aif.errors import AifError

# What a package is installed as, where that is not what it is imported as.
INSTALLED_AS = {"sklearn": "scikit-learn"}


def require(verb: str, *packages: str, extra: str = "report") -> None:
    """Raise AifError, one line, where any of `packages` (import names) is not installed."""
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        names = ", ".join(INSTALLED_AS.get(name, name) for name in missing)
        raise AifError(f"{verb}: needs {names}: pip install 'aif[{extra}]'")


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it was taken out of sys.modules by hand
        return False
