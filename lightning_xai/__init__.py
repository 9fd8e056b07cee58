"""Train CLIP-like dual encoders and watch which words they match with which image regions.

    >>> import lightning_xai as lx
    >>> lx.explain("dog.jpg", "a dog on a red mat", model="ViT-B-16", pretrained="openai")  # doctest: +SKIP

Importing the package loads no torch: the names below are imported when they are first used. Everything else is in the
subpackages, from `lightning_xai.data` to `lightning_xai.training`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_xai.api import Result, Results, explain, load
    from lightning_xai.attribution.registry import METHODS

__all__ = ["METHODS", "Result", "Results", "__version__", "explain", "load"]
__version__ = version("lightning_xai")

_LAZY = {name: "lightning_xai.api" for name in ("Result", "Results", "explain", "load")}
_LAZY["METHODS"] = "lightning_xai.attribution.registry"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, those that are not imported yet included."""
    return sorted({*globals(), *__all__})
