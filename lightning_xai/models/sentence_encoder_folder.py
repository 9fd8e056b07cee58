"""Folders of sentence-transformers, read with Hugging Face's transformers: the package itself is not needed.

`modules.json` lists a model's parts: a transformer, the pooling of its tokens, and layers on the pooled embedding.
No code of a folder is run, and files of PyTorch are read as tensors alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import UnsupportedTowerError
from lightning_xai.models.hugging_face_folder import (
    HuggingFaceTokenizer,
    import_transformers,
    read_model,
    read_tokenizer,
)
from lightning_xai.models.sentence_encoder import SentenceEncoder
from lightning_xai.models.weights_file import read_weights

__all__ = ["load_sentence_encoder"]

_LONGEST = 512
"""Tokens of a text, at most: attributions of two texts are a square of as many."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FLAGS = {  # as older releases of sentence-transformers write them, in the order of their outputs
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def load_sentence_encoder(
    folder: str | Path, device: str | torch.device = "cpu", *, context_length: int | None = None
) -> SentenceEncoder:
    """Load a model of sentence-transformers from its folder.

    A model's default prompt is not put in front of texts (a warning says so): write it into them.

    Args:
        folder: with `modules.json`, the folders that this names, `config.json`, weights and the tokenizer's files, such
            as a clone of `sentence-transformers/all-MiniLM-L6-v2`.
        device: where to put the model.
        context_length: tokens that a text is cut or padded to; None: the model's own, but not more than 512.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a file is missing or broken.
        UnsupportedTowerError: a part of the model, or its pooling, is of a kind that is not supported.

    Example:
        >>> encoder = load_sentence_encoder("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> encoder.encode_text(encoder.tokenizer.encode(["A dog runs."])).shape  # doctest: +SKIP
        torch.Size([1, 384])
    """
    folder = Path(folder)
    parts = _parts(folder)
    kinds = [kind for kind, _ in parts]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedTowerError(
            f"{folder} is made of {', '.join(kinds) or 'nothing'}; supported are Transformer, Pooling, Dense and "
            "Normalize, in this order"
        )
    transformer = _transformer(parts[0][1])
    tokenizer = _tokenizer(parts[0][1], transformer.config, context_length)
    pooling = _pooling(_read_json(parts[1][1] / "config.json"))
    encoder = SentenceEncoder(transformer, pooling, _layers(parts[2:]), CaptionTokenizer(tokenizer))
    _warn_of_prompt(folder)
    return encoder.to(device)


class _Normalize(nn.Module):
    """Divides embeddings by their norms."""

    def forward(self, embedding: Tensor) -> Tensor:
        return normalize(embedding, dim=1)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): download the model's whole folder") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}): download it again") from error


def _parts(folder: Path) -> list[tuple[str, Path]]:
    """The kinds of a model's parts, and their folders."""
    if not (folder / "modules.json").is_file():
        raise ValueError(
            f"{folder} is no folder of a sentence encoder: it lacks modules.json; download one, for example with "
            "`hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir FOLDER`"
        )
    listed = _read_json(folder / "modules.json")
    try:
        # Releases of sentence-transformers differ in the modules that hold these classes.
        return [(str(part["type"]).rpartition(".")[2], folder / part["path"]) for part in listed]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'modules.json'} is no list of parts with type and path") from error


def _transformer(folder: Path) -> Any:
    """The transformer, in float32."""
    transformers = import_transformers()
    names = [name for name in _WEIGHTS if any((folder / f"{name}{more}").is_file() for more in ("", ".index.json"))]
    if not names:
        raise ValueError(f"{folder} holds no weights ({', '.join(_WEIGHTS)}): download the model's whole folder")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    if config.is_encoder_decoder:
        raise UnsupportedTowerError(
            f"{folder} holds a {config.model_type} model with a decoder, which is not supported"
        )
    try:
        # Sentence encoders have their own pooling; BERT's pooler is often left out.
        return read_model(transformers.AutoModel, folder, safetensors=names[0] == _WEIGHTS[0], optional="pooler.")
    except ValueError:
        raise
    except Exception as error:  # a file that is cut off, or holds other objects, raises whatever breaks first
        raise ValueError(f"transformers cannot read the weights in {folder}: download them again ({error})") from error


def _tokenizer(folder: Path, config: Any, context_length: int | None) -> HuggingFaceTokenizer:
    tokenizer = read_tokenizer(folder)
    marks = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, None}
    if tokenizer.pad_token_id in marks:
        raise UnsupportedTowerError(
            f"the tokenizer in {folder} has no padding token of its own, so that padding cannot be told from text"
        )
    # Each family of transformers once had a file of its own name.
    found = sorted(folder.glob("sentence_*_config.json"))
    settings = _read_json(found[0]) if found else {}
    own = settings.get("max_seq_length")
    if own is None:
        own = min(getattr(config, "max_position_embeddings", _LONGEST), tokenizer.model_max_length)
    length = min(int(own), _LONGEST) if context_length is None else context_length
    return HuggingFaceTokenizer(tokenizer, length, lower=bool(settings.get("do_lower_case")))


def _pooling(config: dict[str, Any]) -> list[str]:
    """The modes of pooling, in the order of their outputs."""
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        return [modes] if isinstance(modes, str) else list(modes)
    return [mode for flag, mode in _FLAGS.items() if config.get(flag)]


def _layers(parts: Sequence[tuple[str, Path]]) -> nn.Sequential:
    """The modules that follow on the pooled embedding, without normalisation at the end."""
    layers = nn.Sequential()
    for number, (kind, folder) in enumerate(parts):
        if kind == "Dense":
            layers.extend(_dense(folder))
        elif kind != "Normalize":
            raise UnsupportedTowerError(f"{folder} is a {kind}; after pooling, Dense and Normalize are supported")
        elif any(later != "Normalize" for later, _ in parts[number + 1 :]):
            layers.append(_Normalize())
    return layers


def _dense(folder: Path) -> nn.Sequential:
    """A linear layer and its activation."""
    config = _read_json(folder / "config.json")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise UnsupportedTowerError(f"{folder} is a Dense layer beside the embedding's own way, which is not supported")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    # By name among torch's activations alone: a folder does not choose what is imported.
    kinds = {each: getattr(nn.modules.activation, each) for each in nn.modules.activation.__all__}
    activation = {**kinds, "Identity": nn.Identity}.get(name)
    if activation is None:
        raise UnsupportedTowerError(f"{folder} has the activation {name}, which is none of torch.nn")
    paths = [folder / file for file in _WEIGHTS if (folder / file).is_file()]
    if not paths:
        raise ValueError(f"{folder} holds no weights ({', '.join(_WEIGHTS)}): download the model's whole folder")
    state = {key.removeprefix("linear."): value for key, value in read_weights(paths[0]).state.items()}
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    try:
        linear.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{paths[0]} does not fit its config.json: {error}") from error
    return nn.Sequential(linear.float(), activation())


def _warn_of_prompt(folder: Path) -> None:
    path = folder / "config_sentence_transformers.json"
    config = _read_json(path) if path.is_file() else {}
    name = config.get("default_prompt_name")
    prompt = (config.get("prompts") or {}).get(name) if name else None
    if prompt:
        warnings.warn(
            f"sentence-transformers puts the prompt {prompt!r} in front of each text of {folder}, which is not done "
            "here: write it into your texts",
            stacklevel=3,
        )
