"""Loading encoders: any open_clip model, with weights from a tag, from a file, or random."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.architecture import (
    architecture_from_json,
    built_in_architecture,
    differing_settings,
    tag_architecture,
    tags_of,
    with_quick_gelu,
)
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.weights_file import Weights, read_weights

__all__ = ["load_dual_encoder"]

# Only OpenAI's own state dicts hold these besides the weights; all of OpenAI's models compute with QuickGELU.
_OPENAI_ONLY = frozenset({"input_resolution", "context_length", "vocab_size"})


def load_dual_encoder(
    model: str | Path, pretrained: str | Path | None = None, device: str | torch.device = "cpu"
) -> DualEncoder:
    """Load any open_clip model, with weights from a tag, from a file, or random.

    Args:
        model: an open_clip name (`"ViT-B-16"`), the path of a JSON model config, or the path of a Lightning checkpoint
            of this project, which knows its architecture.
        pretrained: None (random weights, or those of the Lightning checkpoint given as `model`); an open_clip tag
            (`"openai"`, downloaded on first use), or a file: `.pt`, `.safetensors` or a Lightning checkpoint.
        device: where to put the model.

    Raises:
        ValueError: unknown name or tag (the message lists close ones), a config or checkpoint that is broken, or
            weights of another architecture.

    Example:
        >>> encoder = load_dual_encoder("RN50")  # doctest: +SKIP
        >>> encoder.encode_text(encoder.tokenizer.encode(["a red ring"])).shape  # doctest: +SKIP
        torch.Size([1, 1024])
    """
    path = Path(model)
    weights = None
    if path.suffix == ".ckpt":
        weights = read_weights(path)
        if weights.architecture is None:
            raise ValueError(f"{path} names no architecture, so it is no checkpoint of this project; name the model")
        if pretrained is not None and not Path(pretrained).is_file():
            # A tag is often nothing but a default, and would take the place of the checkpoint's weights unseen.
            raise ValueError(
                f"{path} brings its own weights: set pretrained to null; got {str(pretrained)!r}, which is no file"
            )
        architecture = weights.architecture
    else:
        architecture = architecture_from_json(path) if path.suffix == ".json" else built_in_architecture(str(model))
    if pretrained is not None:
        encoder = _with_weights(architecture, str(pretrained))
    else:
        encoder = _from_architecture(architecture)
        if weights is not None:
            _load_weights(encoder, weights)
    return encoder.to(device)


def _with_weights(architecture: dict[str, Any], pretrained: str) -> DualEncoder:
    tags, name = tags_of(architecture), architecture["name"]
    if not Path(pretrained).is_file():
        if pretrained in tags:
            return _from_tag(name, pretrained)
        raise ValueError(
            f"pretrained {pretrained!r} is neither a file nor a tag of {name}; tags: {', '.join(tags) or 'none'}"
        )
    weights = read_weights(Path(pretrained))
    if weights.architecture is not None:
        # Same shapes do not mean the same function (QuickGELU), so the file's own word counts.
        difference = differing_settings(architecture["model_cfg"], weights.architecture["model_cfg"]) - {"quick_gelu"}
        if difference:
            raise ValueError(
                f"{pretrained} holds a {weights.architecture['name']}, not a {name}: they differ in "
                f"{', '.join(sorted(difference))}; pass the model it was made with, or other weights"
            )
        architecture = weights.architecture
    elif weights.state.keys() >= _OPENAI_ONLY:
        architecture = with_quick_gelu(architecture)
        weights = replace(weights, state={key: x for key, x in weights.state.items() if key not in _OPENAI_ONLY})
    encoder = _from_architecture(architecture)
    _load_weights(encoder, weights)
    return encoder


def _from_tag(name: str, tag: str) -> DualEncoder:
    architecture = tag_architecture(name, tag)
    quick_gelu = architecture["model_cfg"].get("quick_gelu", False)
    model = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu)
    return _assemble(model, open_clip.get_tokenizer(name), architecture)


def _from_architecture(architecture: Mapping[str, Any]) -> DualEncoder:
    """A randomly initialised encoder of a given architecture."""
    name, model_cfg = architecture["name"], architecture["model_cfg"]
    with tempfile.TemporaryDirectory() as folder, _quiet_open_clip():
        # open_clip reads a configuration by name from its registry or from a folder; a folder keeps the registry clean.
        config = {"model_cfg": model_cfg, "preprocess_cfg": architecture["preprocess_cfg"]}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
            tokenizer = _tokenizer(model_cfg["text_cfg"], folder)
        except Exception as error:  # open_clip checks nothing: a wrong setting raises wherever it is first used
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ValueError(f"open_clip cannot build the model config {name!r} ({reason})") from error
    return _assemble(model, tokenizer, architecture)


def _tokenizer(text_cfg: Mapping[str, Any], folder: str) -> Any:
    if not text_cfg.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(f"local-dir:{folder}")
    # open_clip would look for this tokenizer's own files in the folder.
    return HFTokenizer(
        text_cfg["hf_tokenizer_name"],
        context_length=text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=text_cfg.get("tokenizer_mode"),
        **(text_cfg.get("tokenizer_kwargs") or {}),
    )


def _assemble(model: Any, tokenizer: Any, architecture: Mapping[str, Any]) -> DualEncoder:
    # The architecture is kept as JSON knows it, without tuples; open_clip's preprocessing takes no lists.
    preprocess = {k: list(v) if isinstance(v, tuple) else v for k, v in model.visual.preprocess_cfg.items()}
    model.visual.preprocess_cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in preprocess.items()}
    return DualEncoder(model, CaptionTokenizer(tokenizer), {**architecture, "preprocess_cfg": preprocess})


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip warns on the root logger that no weights were loaded, which here is what was asked for."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _load_weights(encoder: DualEncoder, weights: Weights) -> None:
    if _shapes(encoder.model.state_dict()) == _shapes(weights.state):
        encoder.model.load_state_dict(weights.state)
    else:
        _convert_weights(encoder, weights)
    try:
        encoder.check_towers()
    except ValueError as error:
        raise ValueError(f"checkpoint {weights.path} does not work: {error}") from error


def _convert_weights(encoder: DualEncoder, weights: Weights) -> None:
    """Load another layout than the model's own, such as older ones, if open_clip can convert it."""
    # The text tower's names differ between layouts by this prefix only.
    own, found = (
        {key.removeprefix("text."): shape for key, shape in _shapes(state).items()}
        for state in (encoder.model.state_dict(), weights.state)
    )
    with tempfile.TemporaryDirectory() as folder:
        # open_clip's own loader converts state dicts; it reads files only.
        file = Path(folder) / "state.pt"
        torch.save(weights.state, file)
        try:
            open_clip.load_checkpoint(encoder.model, str(file), strict=True)
        except Exception as error:  # the conversions take for granted that it is the model they know
            raise ValueError(
                f"the weights in {weights.path} do not fit {encoder.architecture['name']}: "
                f"{_misfit(own, found) or error}. Pass the model the checkpoint was made with"
            ) from error
    resized = [
        f"{key} from {found[key][0]} to {shape[0]} positions"
        for key, shape in own.items()
        if key.endswith("positional_embedding") and found.get(key, shape) != shape
    ]
    if resized:
        warnings.warn(f"{weights.path} was made for another size; interpolated {', '.join(resized)}", stacklevel=2)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _misfit(own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """The differences between a file's tensors and a model's, a few of each kind, by names and shapes.

    Example:
        >>> _misfit({"a": (2,), "b": (3,)}, {"a": (4,), "c": ()})
        'of another shape: a (4) instead of (2); missing: b; unknown: c'
    """
    kinds = {
        "of another shape": [
            f"{key} {_dims(found[key])} instead of {_dims(shape)}"
            for key, shape in own.items()
            if found.get(key, shape) != shape
        ],
        "missing": [key for key in own if key not in found],
        "unknown": [key for key in found if key not in own],
    }
    return "; ".join(
        f"{kind}: {', '.join(items[:4])}" + (f" and {len(items) - 4} more" if len(items) > 4 else "")
        for kind, items in kinds.items()
        if items
    )


def _dims(shape: tuple[int, ...]) -> str:
    return f"({' x '.join(map(str, shape))})"
