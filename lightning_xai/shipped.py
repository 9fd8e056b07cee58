"""Configurations that the package brings, by the names that they have in its repository."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped"]

_PACKAGE = Path(__file__).resolve().parent
# In a wheel they lie in the package; in a clone next to it.
_ROOTS = (_PACKAGE, _PACKAGE.parent)


def shipped(path: Path) -> Path:
    """Find a file: where the path says, else the one of the package's configs that has this name.

    Args:
        path: of a file, relative to the working folder or absolute; `configs/demo.yaml` is one that the package brings.

    Returns:
        The path of the package's own file where only that exists, the path as it was otherwise.
    """
    if path.parts[:1] != ("configs",) or ".." in path.parts or path.exists():
        return path
    return next((root / path for root in _ROOTS if (root / path).is_file()), path)
