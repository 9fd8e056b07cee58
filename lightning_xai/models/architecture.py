"""Architectures of open_clip models: by name, from a JSON file, and with the activation that weights were trained with.

An architecture is a dictionary of plain values: `name`, `model_cfg` and `preprocess_cfg`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

__all__ = [
    "architecture_from_json",
    "built_in_architecture",
    "check_architecture",
    "differing_settings",
    "tag_architecture",
    "tags_of",
    "with_quick_gelu",
]


def built_in_architecture(name: str) -> dict[str, Any]:
    """The architecture that open_clip knows by a name.

    Raises:
        ValueError: open_clip knows no such model; the message lists close names.
    """
    cleaned = name.replace("/", "-")
    config = open_clip.get_model_config(cleaned) if cleaned in open_clip.list_models() else None
    if config is None:
        close = difflib.get_close_matches(cleaned, open_clip.list_models(), n=5, cutoff=0.4)
        raise ValueError(
            f"unknown model {name!r}; did you mean {', '.join(close) or 'one of open_clip.list_models()'}? "
            "A path of a JSON model config or of a .ckpt file works as well"
        )
    return {"name": cleaned, "model_cfg": config, "preprocess_cfg": {}}


def architecture_from_json(path: Path) -> dict[str, Any]:
    """The architecture in a JSON model config, in open_clip's form.

    Raises:
        ValueError: the file cannot be read, is broken, or lacks a part.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"model config {path} cannot be read ({error.strerror}); give the path of a JSON file"
        ) from error
    except ValueError as error:
        raise ValueError(f"model config {path} is broken JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model config {path} holds a JSON {type(config).__name__}, expected an object")
    model_cfg = config.get("model_cfg", config)
    _check_config(model_cfg, f"model config {path}")
    return {"name": path.stem, "model_cfg": model_cfg, "preprocess_cfg": config.get("preprocess_cfg", {})}


def check_architecture(recorded: Any, path: Path) -> dict[str, Any]:
    """The architecture that a checkpoint has recorded.

    Raises:
        ValueError: it lacks a part, or would run code from elsewhere.
    """
    source = f"the architecture recorded in {path}"
    parts = {"name": str, "model_cfg": dict, "preprocess_cfg": dict}
    if not isinstance(recorded, dict) or any(not isinstance(recorded.get(key), kind) for key, kind in parts.items()):
        raise ValueError(f"{source} is broken, expected {', '.join(parts)}; write the file again with this project")
    _check_config(recorded["model_cfg"], source)
    return recorded


def _check_config(model_cfg: Any, source: str) -> None:
    """Raise a ValueError where a model configuration lacks a part, or would run code from elsewhere."""
    parts = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    given = model_cfg if isinstance(model_cfg, dict) else {}
    wrong = [f"{key} ({kind.__name__})" for key, kind in parts.items() if not isinstance(given.get(key), kind)]
    if wrong:
        raise ValueError(f"{source} lacks {', '.join(wrong)}; see open_clip's model_configs for examples")
    if (model_cfg["text_cfg"].get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise ValueError(
            f"{source} asks for a tokenizer that runs code from elsewhere (trust_remote_code); remove that"
        )


def tag_architecture(name: str, tag: str) -> dict[str, Any]:
    """The architecture that open_clip's weights `tag` of model `name` were trained in, with the right activation.

    Raises:
        ValueError: open_clip knows no such model.

    Example:
        >>> [tag_architecture("ViT-B-16", tag)["name"] for tag in ("openai", "datacomp_xl_s13b_b90k")]
        ['ViT-B-16-quickgelu', 'ViT-B-16']
    """
    architecture = built_in_architecture(name)
    quick_gelu = open_clip.get_pretrained_cfg(architecture["name"], tag).get("quick_gelu", False)
    return with_quick_gelu(architecture) if quick_gelu else architecture


def with_quick_gelu(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture with OpenAI's activation, under the name that open_clip has for that, if any."""
    name, model_cfg = architecture["name"], {**architecture["model_cfg"], "quick_gelu": True}
    # Loading an export by the recorded name then gives this activation too.
    known = open_clip.get_model_config(f"{name}-quickgelu") == model_cfg
    return {**architecture, "name": f"{name}-quickgelu" if known else name, "model_cfg": model_cfg}


def tags_of(architecture: Mapping[str, Any]) -> list[str]:
    """The tags open_clip has weights for, none for an architecture that only shares a name with one of open_clip's."""
    name = architecture["name"]
    known = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if known is None or differing_settings(known, architecture["model_cfg"]) - {"quick_gelu"}:
        return []
    return list(open_clip.list_pretrained_tags_by_model(name))


def differing_settings(first: Any, second: Any, at: str = "") -> set[str]:
    """Names of the settings that two nested configurations do not share; a setting of null is none.

    Example:
        >>> differing_settings({"a": 1, "b": {"c": (2, 3)}}, {"b": {"c": [2, 4]}, "d": None}) == {"a", "b.c"}
        True
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = first.keys() | second.keys()
        return set().union(*(differing_settings(first.get(k), second.get(k), f"{at}.{k}".lstrip(".")) for k in keys))
    plain = [list(x) if isinstance(x, tuple) else x for x in (first, second)]
    return set() if plain[0] == plain[1] else {at}
