"""Labels of methods: what users call a method and its options in settings, tables and folder names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["check_label", "method_of"]

_LABEL = re.compile(r"[A-Za-z0-9_.,=+-]{1,120}")


def check_label(label: str) -> str:
    """Return a method's label, which names a folder, or raise a ValueError.

    >>> check_label("m2ib,beta=0.1")
    'm2ib,beta=0.1'
    """
    if not _LABEL.fullmatch(label) or not label.strip("."):
        raise ValueError(f"a label has 1 to 120 letters, digits and characters of '_.,=+-'; got {label!r}")
    return label


def method_of(label: str, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Return a method's name and options, as settings give them under its label.

    The label is the method's name, unless `method` among the options says otherwise.

    >>> method_of("m2ib", None), method_of("tight", {"method": "m2ib", "beta": 1.0})
    (('m2ib', {}), ('m2ib', {'beta': 1.0}))
    """
    own = dict(options or {})
    check_label(label)
    return str(own.pop("method", label)), own
