"""Architectures of open_clip models: by name, from a file or folder, with the pixels and activation of their training.

An architecture is a dictionary of plain values: `name`, `model_cfg` and `preprocess_cfg`.
"""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg

from lightning_xai.model_options import PIXEL_OPTIONS, ModelOptions
from lightning_xai.shipped import shipped

__all__ = [
    "FOLDER_CONFIG",
    "architecture_from_json",
    "built_in_architecture",
    "check_architecture",
    "differing_settings",
    "folder_architecture",
    "settled",
    "tag_architecture",
    "tags_of",
    "with_quick_gelu",
    "with_sizes",
]

FOLDER_CONFIG = "open_clip_config.json"
"""The file that describes the weights of an open_clip folder."""


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


def folder_architecture(folder: Path) -> dict[str, Any]:
    """The architecture of an open_clip folder, from its open_clip_config.json.

    Raises:
        ValueError: the folder has no such file, or a broken one.
    """
    path = folder / FOLDER_CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} is no open_clip folder: it lacks {FOLDER_CONFIG}; a folder of Hugging Face's transformers is "
            "named hf:FOLDER"
        )
    return {**architecture_from_json(path), "name": folder.resolve().name}


def architecture_from_json(path: Path) -> dict[str, Any]:
    """The architecture in a JSON model config, in open_clip's form.

    Raises:
        ValueError: the file cannot be read, is broken, or lacks a part.
    """
    try:
        config = json.loads(shipped(path).read_text(encoding="utf-8"))
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
    preprocess_cfg = config.get("preprocess_cfg") or {}
    known = {field.name for field in fields(PreprocessCfg)}
    if not isinstance(preprocess_cfg, dict) or not preprocess_cfg.keys() <= known:
        raise ValueError(f"model config {path} has a preprocess_cfg other than an object of {', '.join(sorted(known))}")
    return {"name": path.stem, "model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def check_architecture(recorded: Any, path: Path) -> dict[str, Any]:
    """The architecture that a checkpoint has recorded.

    Raises:
        ValueError: it lacks a part, or would run code from elsewhere.
    """
    source = f"the architecture recorded in {path}"
    parts = {"name": str, "model_cfg": dict, "preprocess_cfg": dict}
    if not isinstance(recorded, dict) or any(not isinstance(recorded.get(key), kind) for key, kind in parts.items()):
        raise ValueError(f"{source} is broken, expected {', '.join(parts)}; write the file again with this project")
    if recorded.get("library") is None:  # else it is no configuration of open_clip's
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


def with_sizes(architecture: Mapping[str, Any], image_size: tuple[int, ...], context_length: int) -> dict[str, Any]:
    """The architecture for images (height, width) and captions of so many tokens."""
    model_cfg = copy.deepcopy(architecture["model_cfg"])
    height, width = image_size
    model_cfg["vision_cfg"]["image_size"] = height if height == width else [height, width]
    model_cfg["text_cfg"]["context_length"] = context_length
    preprocess_cfg = {name: value for name, value in architecture["preprocess_cfg"].items() if name != "size"}
    return {**architecture, "model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def settled(
    architecture: Mapping[str, Any], options: ModelOptions, file: Path | None = None, *, activation_known: bool = True
) -> dict[str, Any]:
    """The architecture with the pixels and the activation of its training settled, as far as anything says them.

    Options go before what the architecture says itself, and that before what all of open_clip's tags of the
    architecture agree on. Random weights fit any pixels, so that nothing has to be known of those.

    Args:
        architecture: with what files have said in its `preprocess_cfg`.
        options: the caller's.
        file: the file of weights that say nothing themselves, if there is one.
        activation_known: False where neither these weights nor the model's name say which activation they need.

    Raises:
        ValueError: weights from a file could have been trained in several ways, and the options do not say in which;
            the message lists the candidates and the options.
    """
    pixels = {**architecture["preprocess_cfg"], **options.preprocessing}
    silent = not architecture["preprocess_cfg"]
    candidates = _ways_of_training(architecture) if silent or not activation_known else {}
    open_questions: dict[str, dict[str, list[str]]] = {}
    for name, option in (*PIXEL_OPTIONS.items(), ("quick_gelu", "quick_gelu")):
        known = not silent or name in pixels
        if name == "quick_gelu":
            known = activation_known or options.quick_gelu is not None
        values = {} if known else candidates.get(name, {})
        if len(values) == 1:
            (value,) = values
            pixels[name] = json.loads(value)
        elif values and file is not None:
            open_questions[option] = values
    if open_questions:
        raise ValueError(_question(file, architecture["name"], open_questions))
    missing = [option for name, option in PIXEL_OPTIONS.items() if name not in pixels]
    if silent and not candidates and file is not None and missing:
        warnings.warn(
            f"neither {file} nor {architecture['name']} says which pixels the weights were trained with: open_clip's "
            f"defaults (OpenAI's mean and deviation, bicubic, cropped) stand for {', '.join(missing)}. If that is "
            "wrong, give these options, or put them into the config as preprocess_cfg",
            stacklevel=3,
        )
    quick_gelu = pixels.pop("quick_gelu", None) if options.quick_gelu is None else options.quick_gelu
    result = {**architecture, "preprocess_cfg": pixels}
    if quick_gelu is None:
        return result
    return with_quick_gelu(result) if quick_gelu else _without_quick_gelu(result)


def _without_quick_gelu(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture with the plain activation, under the name that open_clip has for that, if any."""
    model_cfg = {name: value for name, value in architecture["model_cfg"].items() if name != "quick_gelu"}
    plain = str(architecture["name"]).removesuffix("-quickgelu")
    known = open_clip.get_model_config(plain) if plain in open_clip.list_models() else None
    return {**architecture, "name": plain if known == model_cfg else architecture["name"], "model_cfg": model_cfg}


def _ways_of_training(architecture: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Setting -> value as JSON -> the tags of open_clip's weights that were trained so; empty without tags."""
    found: dict[str, dict[str, list[str]]] = {}
    default = PreprocessCfg()
    for tag in tags_of(architecture):
        config = open_clip.get_pretrained_cfg(architecture["name"], tag)
        settings = {name: config.get(name, getattr(default, name)) for name in PIXEL_OPTIONS}
        for name, value in {**settings, "quick_gelu": config.get("quick_gelu", False)}.items():
            found.setdefault(name, {}).setdefault(json.dumps(value), []).append(tag)
    return found


def _question(file: Path | None, name: str, open_questions: Mapping[str, Mapping[str, list[str]]]) -> str:
    def way(value: str, tags: list[str]) -> str:
        return f"{value} ({tags[0]}{f' and {len(tags) - 1} more' if len(tags) > 1 else ''})"

    listed = "; ".join(
        f"{option}: {' or '.join(way(value, tags) for value, tags in values.items())}"
        for option, values in open_questions.items()
    )
    options = ", ".join(f"--model.{option}" for option in open_questions)
    return (
        f"{file} does not say how it was trained, and open_clip's weights of {name} differ in that: {listed}. Give "
        f"{options} (in Python arguments of these names), or put the {FOLDER_CONFIG} of the weights next to them"
    )


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
