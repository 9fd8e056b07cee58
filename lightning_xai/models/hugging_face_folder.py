"""Folders of Hugging Face's transformers, as `save_pretrained` writes them: read, and written again.

Nothing is downloaded, no code of a folder is run, and nothing is unpickled: weights have to be safetensors.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.model_options import ModelOptions
from lightning_xai.models.architecture import differing_settings
from lightning_xai.models.hugging_face import INTERPOLATED, SIZELESS, HuggingFaceEncoder
from lightning_xai.models.processor_transform import ProcessorTransform
from lightning_xai.models.weights_file import Weights, without_common_prefix

__all__ = [
    "LIBRARY",
    "PREFIX",
    "HuggingFaceTokenizer",
    "check_folder",
    "import_transformers",
    "load_hugging_face",
    "load_recorded",
    "read_model",
    "read_tokenizer",
    "save_hugging_face",
]

PREFIX = "hf:"
"""In front of a folder, it names a model of transformers."""
LIBRARY = "transformers"
"""`library` of these architectures."""
_INSTALL = "models of Hugging Face need transformers 5 and sentencepiece: pip install 'lightning_xai[hf]'"
_MODELS = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "chinese_clip": "ChineseCLIPModel",
    "altclip": "AltCLIPModel",
    "metaclip_2": "MetaClip2Model",
    "align": "AlignModel",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
}
"""model_type -> the class of transformers."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files of which a tokenizer has one; without, transformers makes one that knows no words."""
_ABOUT_THE_FILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
"""Settings of a configuration that change no number."""
_PROBES = ("a photo of a cat", "Two RED rings, & 3 blue ones.")


def load_hugging_face(folder: Path, weights: Weights | None, options: ModelOptions) -> HuggingFaceEncoder:
    """Load a dual encoder from a folder with `config.json`, `model.safetensors`, and processor and tokenizer files.

    Args:
        folder: as `save_pretrained` of model and processor writes it.
        weights: take the place of the folder's.
        options: replace what the folder's image processor says.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a file is missing, a model of another kind, weights that lack a part or are of another model, or an
            image processor that cannot be served.
    """
    kind = check_folder(folder, _MODELS, "a dual encoder", needs_weights=weights is None)
    model_class = getattr(import_transformers(), _MODELS[kind])
    if weights is None:
        model = read_model(model_class, folder)
    else:
        model = _build(kind, model_class.config_class.from_pretrained(folder, local_files_only=True))
    name, settings = f"{folder.resolve().name} ({_MODELS[kind]})", _settings(model.config)
    if weights is not None and weights.architecture is not None:
        difference = differing_settings(weights.architecture["model_cfg"], settings)
        if difference:
            raise ValueError(
                f"{weights.path} holds another model than {name}: they differ in {', '.join(sorted(difference)[:6])}"
            )
        return load_recorded(weights, options, folder)
    tokenizer = HuggingFaceTokenizer.of(folder, model.config)
    architecture = {
        "name": name,
        "library": LIBRARY,
        "model_cfg": settings,
        "preprocess_cfg": _with_options(_read_processor(folder), options),
        "tokenizer": {"folder": str(folder.resolve()), "vocabulary": tokenizer.fingerprint()},
    }
    return _encoder(model, tokenizer, architecture, weights)


def load_recorded(weights: Weights, options: ModelOptions, folder: Path | None = None) -> HuggingFaceEncoder:
    """Load a checkpoint of this project, which knows all of its model but the tokenizer's files.

    They have to be in `folder`, or else next to the checkpoint, or in the folder that the model was loaded from.

    Raises:
        ImportError: transformers is not installed.
        ValueError: they are in neither, or are others.
    """
    assert weights.architecture is not None, "the caller has looked"
    recorded = weights.architecture
    kind = str(recorded["model_cfg"].get("model_type"))
    if kind not in _MODELS:
        raise ValueError(f"{weights.path} holds a model of type {kind!r}; this release knows {', '.join(_MODELS)}")
    config = getattr(import_transformers(), _MODELS[kind]).config_class.from_dict(dict(recorded["model_cfg"]))
    places = [weights.path.parent, Path(recorded["tokenizer"]["folder"])] if folder is None else [folder]
    place = next((place for place in places if _has_vocabulary(place)), None)
    if place is None:
        raise ValueError(
            f"{weights.path} needs the tokenizer of {recorded['name']}, and finds no tokenizer.json in "
            f"{' or '.join(map(str, places))}: copy the tokenizer's files next to the checkpoint, or give the model's "
            f"folder as name ({PREFIX}FOLDER) and the checkpoint as pretrained"
        )
    tokenizer = HuggingFaceTokenizer.of(place, config)
    if tokenizer.fingerprint() != recorded["tokenizer"]["vocabulary"]:
        raise ValueError(
            f"the tokenizer in {place} is another one than {weights.path} was trained with: its vocabulary, or how it "
            "cuts captions, differs; copy the right one's files next to the checkpoint"
        )
    architecture = {**recorded, "preprocess_cfg": _with_options(recorded["preprocess_cfg"], options)}
    return _encoder(_build(kind, config), tokenizer, architecture, weights)


def save_hugging_face(encoder: HuggingFaceEncoder, folder: Path) -> None:
    """Write a folder that `from_pretrained` of transformers loads, image processor and tokenizer included.

    Raises:
        ValueError: `folder` is a file or has a file's name, or holds some already.
    """
    if folder.suffix in (".safetensors", ".pt") or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} has to be a new folder, or an empty one: the export is several files")
    folder.mkdir(parents=True, exist_ok=True)
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.tokenizer.tokenizer.save_pretrained(folder)
    if {"letterbox", "input_size"} & encoder.preprocessing.keys():
        warnings.warn(
            f"the exported image processor makes images as the model's folder said, not of "
            f"{[*encoder.image_transform.size]} pixels, nor with padding around them: make such images yourself, and "
            "call the model with interpolate_pos_encoding=True for another size",
            stacklevel=2,
        )
    text = json.dumps(encoder.preprocessing, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def check_folder(
    folder: Path, kinds: Mapping[str, str], what: str, *, needs_weights: bool = True, example: str = ""
) -> str:
    """The model_type of a folder, one of `kinds`.

    Raises:
        ValueError: the folder is none, lacks a file, or holds a model of another kind.
    """
    has_processor = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    has_weights = any((folder / f"model.safetensors{more}").is_file() for more in ("", ".index.json"))
    found = {
        "config.json": (folder / "config.json").is_file(),
        "model.safetensors": has_weights or not needs_weights,
        "preprocessor_config.json": has_processor,
    }
    missing = [name for name, there in found.items() if not there]
    if missing:
        raise ValueError(
            f"{folder} is no folder of {what}: it lacks {', '.join(missing)}; download one, for example with "
            f"`hf download {example or 'openai/clip-vit-large-patch14'} --local-dir FOLDER`, and convert weights of "
            "another kind with save_pretrained"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is broken JSON: {error}") from error
    if kind not in kinds:
        known = " or ".join(f"{name!r}" for name in kinds)
        raise ValueError(f"{folder} holds a model of type {kind!r}, not {known}")
    return str(kind)


def read_model(model_class: Any, folder: Path, *, safetensors: bool = True, optional: str | None = None) -> Any:
    """The model in a folder, in float32, with all of its weights.

    Args:
        model_class: of transformers.
        folder: as `save_pretrained` writes it.
        safetensors: whether its weights are safetensors; else they are PyTorch's file, read as tensors alone.
        optional: beginning of the names of weights that it may lack, since nobody uses that part.

    Raises:
        ValueError: weights are missing or of other shapes, which transformers would replace by random numbers.
    """
    options = {
        "use_safetensors": safetensors, "weights_only": True, "local_files_only": True, "dtype": torch.float32,
        "output_loading_info": True,
    }  # fmt: skip
    try:
        try:
            model, report = model_class.from_pretrained(folder, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, report = model_class.from_pretrained(folder, **options)
    except RuntimeError as error:  # transformers 5 has logged which are of another shape
        raise ValueError(f"the weights in {folder} do not fit its config.json: some are of another shape") from error
    wrong = [str(name) for part in ("missing_keys", "mismatched_keys") for name in sorted(report[part], key=str)]
    wrong = [name for name in wrong if optional is None or not name.startswith(optional)]
    if wrong:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: missing or of another shape are "
            f"{', '.join(wrong[:4])}{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}"
        )
    return model


def import_transformers() -> Any:
    """The library.

    Raises:
        ImportError: it is not installed, or too old.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    if int(version("transformers").partition(".")[0]) < 5:
        raise ImportError(f"{_INSTALL}; found transformers {version('transformers')}")
    return transformers


def _build(kind: str, config: Any) -> Any:
    """A model with random weights, which others are to replace."""
    model_class = getattr(import_transformers(), _MODELS[kind])
    try:
        return model_class._from_config(config, attn_implementation="sdpa")
    except ValueError:
        return model_class(config)


def _encoder(
    model: Any, tokenizer: HuggingFaceTokenizer, architecture: dict[str, Any], weights: Weights | None
) -> HuggingFaceEncoder:
    if weights is not None:
        weights = without_common_prefix(weights, model.state_dict().keys())
        try:
            model.load_state_dict(weights.state)
        except RuntimeError as error:
            raise ValueError(f"the weights in {weights.path} do not fit {architecture['name']}: {error}") from error
    transform = ProcessorTransform.of(architecture["preprocess_cfg"])
    if model.config.model_type == "siglip2" and transform.resize_mode != "letterbox":
        warnings.warn(
            f"{architecture['name']} takes images of any aspect ratio (NaFlex); here each is squashed to "
            f"{transform.size[0]} x {transform.size[1]} pixels, which for images that are no squares are not its own "
            "pixels",
            stacklevel=2,
        )
    _check_size(model.config, transform.size, architecture["name"])
    model.train()  # as models of open_clip come; transformers hands out models in evaluation mode
    try:
        return HuggingFaceEncoder(model, CaptionTokenizer(tokenizer), architecture, transform)
    except (AttributeError, TypeError) as error:  # a vision-text dual encoder may be of any two models
        raise ValueError(
            f"transformers cannot embed with {architecture['name']} ({error}): both towers need a pooler_output, which "
            "DistilBERT, for one, has not; take a BERT or RoBERTa"
        ) from error


def _check_size(config: Any, size: tuple[int, int], name: str) -> None:
    """Raise a ValueError where a model takes no images of (height, width); warn where positions are interpolated."""
    vision = config.vision_config
    own, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(own, int | None) or size == (own, own):
        return
    if isinstance(patch, int) and any(side % patch for side in size):
        near = [max(round(side / patch), 1) * patch for side in size]
        raise ValueError(f"image_size has to be a whole number of patches of {patch} pixels; got {[*size]}, try {near}")
    if own is None or config.model_type in SIZELESS:
        return
    if config.model_type not in INTERPOLATED:
        raise ValueError(
            f"{name} takes images of {own} x {own} pixels only, not {[*size]}: leave out image_size; other sizes are "
            f"served for {', '.join(sorted(INTERPOLATED | SIZELESS))}"
        )
    warnings.warn(
        f"{name} was made for images of {own} x {own} pixels; its positions are interpolated to {size[0]} x {size[1]}",
        stacklevel=2,
    )


def _settings(config: Any) -> dict[str, Any]:
    """A configuration in plain values, without what says where it came from."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return _without(plain, _ABOUT_THE_FILE)


def _without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in names
    }


def _read_processor(folder: Path) -> dict[str, Any]:
    """The settings of a folder's image processor, with the defaults of its class."""
    try:
        processor = import_transformers().AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the image processor of {folder} cannot be read: {error}") from error
    settings: dict[str, Any] = json.loads(json.dumps(processor.to_dict(), default=str))
    return {name: value for name, value in settings.items() if value is not None and name != "processor_class"}


def _with_options(processor: Mapping[str, Any], options: ModelOptions) -> dict[str, Any]:
    """The settings of an image processor with those that the caller knows better.

    Raises:
        ValueError: an option that these models have not.
    """
    if options.quick_gelu is not None:
        raise ValueError(
            "models of Hugging Face have the activation that their folder says: leave out quick_gelu, or change "
            "hidden_act in config.json"
        )
    given: dict[str, Any] = {} if options.size is None else {"input_size": list(options.size)}
    for name, value in (("image_mean", options.image_mean), ("image_std", options.image_std)):
        if value is not None:
            given[name] = list(value)
    if options.interpolation is not None:
        numbers = {"bilinear": 2, "bicubic": 3}
        if options.interpolation not in numbers:
            raise ValueError(f"interpolation has to be bilinear or bicubic here; got {options.interpolation!r}")
        given["resample"] = numbers[options.interpolation]
    changed = {**processor, **given}
    if options.mode is None:
        return changed
    height, width = ProcessorTransform.of(changed).size
    if options.mode == "letterbox":
        return {**changed, "letterbox": True}
    changed.pop("letterbox", None)
    if options.mode == "squash":
        return {**changed, "size": {"height": height, "width": width}, "do_center_crop": False}
    if options.mode != "shortest" or str(changed.get("image_processor_type")).startswith("Siglip2"):
        raise ValueError(
            f"resize_mode has to be shortest, letterbox or squash here, not shortest for SigLIP 2; got {options.mode!r}"
        )
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return {**changed, "size": {"shortest_edge": max(height, width)}, **crop}


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers makes it.

    Raises:
        ImportError: it needs a package that is not installed.
        ValueError: there is none, or it pads on the left.
    """
    transformers = import_transformers()
    if not _has_vocabulary(folder):
        raise ValueError(f"{folder} holds no tokenizer ({', '.join(_VOCABULARIES)}): copy its files there")
    if (folder / "spiece.model").is_file() and find_spec("sentencepiece") is None:
        # transformers would take another tokenizer then, which does not clean captions as SigLIP's does.
        raise ImportError(_INSTALL)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"the tokenizer of {folder} cannot be read ({error}); put its files there, as its save_pretrained "
            "writes them"
        ) from error
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"the tokenizer of {folder} pads on the left, so that words are at other places in every batch: if "
            'the model was trained with padding on the right, put "padding_side": "right" into its '
            "tokenizer_config.json"
        )
    return tokenizer


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of transformers as `CaptionTokenizer` takes it: captions -> token ids of one length.

    Attributes:
        tokenizer: of transformers.
        context_length: tokens that a caption is cut or padded to.
        end: the mark of the end, if all after it is replaced by token 0, as OpenAI's own CLIP pads.
        lower: whether captions are put in lower case before.
    """

    tokenizer: Any
    context_length: int
    end: int | None = None
    lower: bool = False

    @classmethod
    def of(cls, folder: Path, config: Any) -> HuggingFaceTokenizer:
        """The tokenizer in a folder, for a model's configuration."""
        tokenizer = read_tokenizer(folder)
        text = config.text_config
        positions = int(text.max_position_embeddings)
        if "roberta" in text.model_type or config.model_type == "altclip":
            positions -= int(text.pad_token_id) + 1  # counted from there
        length = min(positions, int(tokenizer.model_max_length))
        # Where the mark of the end is also the padding, a masked word would be the end of its caption. What comes after
        # the end is never seen, so that it can be anything.
        ends = text.model_type in ("clip_text_model", "metaclip_2_text_model")
        same = ends and tokenizer.pad_token_id == tokenizer.eos_token_id
        return cls(tokenizer, length, int(tokenizer.eos_token_id) if same else None)

    def clean_fn(self, text: str) -> str:
        """The caption as it is, but for upper case: the tokenizer does its own cleaning."""
        return text.lower() if self.lower else text

    def __call__(self, captions: list[str]) -> Tensor:
        """Token ids [C, L] of captions."""
        tokens: Tensor = self.tokenizer(
            [self.clean_fn(caption) for caption in captions],
            padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt",
        )["input_ids"]  # fmt: skip
        if self.end is None:
            return tokens
        after = tokens.eq(self.end).cumsum(dim=1).cumsum(dim=1) > 1
        return tokens.masked_fill(after, 0)

    def fingerprint(self) -> str:
        """A short name of its vocabulary and of how it cuts captions."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        digest = hashlib.sha256(json.dumps([vocabulary, self(list(_PROBES)).tolist()]).encode())
        return digest.hexdigest()[:16]
