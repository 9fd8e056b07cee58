"""Loading encoders: any open_clip model, with weights from a tag, from a file, or random."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.model_options import ModelOptions
from lightning_xai.models.architecture import (
    FOLDER_CONFIG,
    architecture_from_json,
    built_in_architecture,
    differing_settings,
    folder_architecture,
    settled,
    tag_architecture,
    tags_of,
    with_quick_gelu,
    with_sizes,
)
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.hugging_face_folder import LIBRARY, PREFIX, load_hugging_face, load_recorded
from lightning_xai.models.positions import ImagePositions, interpolate_image, interpolate_text, text_positions
from lightning_xai.models.weights_file import Weights, read_weights, without_common_prefix

__all__ = ["load_dual_encoder"]

# Only OpenAI's own state dicts hold these besides the weights; all of OpenAI's models compute with QuickGELU, and were
# trained with the pixels that are open_clip's defaults.
_OPENAI_ONLY = frozenset({"input_resolution", "context_length", "vocab_size"})
_OPENAI_PIXELS = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
_LOCAL, _HUB, _SENTENCES, _IMAGEBIND = "local-dir:", "hf-hub:", "st:", "imagebind:"
_WEIGHTS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")  # as open_clip looks for them
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
# A file may differ from the model that was asked for in what can be carried over: positions, and it knows best itself.
_ADAPTABLE = frozenset({"quick_gelu", "vision_cfg.image_size", "text_cfg.context_length"})


def load_dual_encoder(  # noqa: PLR0913 - each option is a setting that files may lack
    model: str | Path,
    pretrained: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    image_size: int | tuple[int, int] | None = None,
    image_mean: tuple[float, float, float] | None = None,
    image_std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    resize_mode: str | None = None,
    fit: str | None = None,
    quick_gelu: bool | None = None,
) -> DualEncoder:
    """Load any open_clip model, with weights from a tag, from a file, or random.

    Pixels and activation are those that the weights were trained with: what the file or folder says, else what all of
    open_clip's tags of the architecture agree on. Where they differ, the options below have to say it.

    Args:
        model: an open_clip name (`"ViT-B-16"`), the path of a JSON model config, the path of a Lightning checkpoint
            of this project, which knows its architecture, an open_clip folder (`"local-dir:FOLDER"`, or its path
            alone), `"hf-hub:OWNER/NAME"` (an open_clip model, downloaded on first use), or a folder of Hugging Face's
            transformers (`"hf:FOLDER"`).
        pretrained: None (random weights, or those that `model` brings); an open_clip tag (`"openai"`, downloaded on
            first use), or a file: `.pt`, `.safetensors`, a TorchScript archive or a Lightning checkpoint.
        device: where to put the model.
        image_size: (height, width) of images in pixels, or one number for both; positions are interpolated to it, with
            a warning.
        image_mean: mean of each channel, of pixel values in [0, 1].
        image_std: standard deviation of each channel, likewise.
        interpolation: of resizing images: `"bicubic"`, `"bilinear"` or `"random"`.
        resize_mode: `"shortest"` (crop what sticks out), `"longest"` (pad), `"letterbox"` (pad with the mean colour) or
            `"squash"` (give the aspect ratio up).
        fit: the same in plain words: `"crop"` (shortest) or `"letterbox"`.
        quick_gelu: whether the transformers compute with OpenAI's QuickGELU.

    Raises:
        ValueError: unknown name or tag (the message lists close ones), a config or checkpoint that is broken, weights
            of another architecture, or weights of which nothing says how they were trained.

    Example:
        >>> encoder = load_dual_encoder("RN50")  # doctest: +SKIP
        >>> encoder.encode_text(encoder.tokenizer.encode(["a red ring"])).shape  # doctest: +SKIP
        torch.Size([1, 1024])
    """
    options = ModelOptions(
        image_size=image_size,
        image_mean=image_mean,
        image_std=image_std,
        interpolation=interpolation,
        resize_mode=resize_mode,
        fit=fit,
        quick_gelu=quick_gelu,
    )
    _refuse_other_kinds(str(model))
    if str(model).startswith(PREFIX):
        if pretrained is not None and not Path(pretrained).is_file():
            raise ValueError(_brings_its_own(model, pretrained))
        weights = None if pretrained is None else read_weights(Path(pretrained))
        return load_hugging_face(Path(str(model).removeprefix(PREFIX)), weights, options).to(device)
    source = _Source.of(model)
    if source.weights is not None and source.architecture.get("library") == LIBRARY:
        if pretrained is not None:
            raise ValueError(_brings_its_own(model, pretrained))
        return load_recorded(source.weights, options).to(device)
    if pretrained is not None:
        if source.weights is not None and not Path(pretrained).is_file():
            # A tag is often nothing but a default, and would take the place of the checkpoint's weights unseen.
            raise ValueError(_brings_its_own(model, pretrained))
        if not Path(pretrained).is_file():
            return _from_tag(source, str(pretrained), options).to(device)
        source = replace(source, weights=read_weights(Path(pretrained)))
    architecture = source.architecture
    if source.weights is None:
        architecture = _with_image_size(settled(architecture, options), options.size)
        return _from_architecture(architecture, source.tokenizer).to(device)
    return _from_file(source, source.weights, options).to(device)


def _refuse_other_kinds(model: str) -> None:
    """Raise a ValueError that says what serves models that are no dual encoders of images and texts alone."""
    if model.startswith(_SENTENCES):
        raise ValueError(
            f"{model} is a sentence encoder, which has no image tower: `explain` takes it with --caption and "
            "--other-caption, and in Python load_sentence_encoder(FOLDER) loads it"
        )
    if model.startswith(_IMAGEBIND):
        raise ValueError(
            f"{model} is ImageBind, which is explained, but not trained: `explain` and `sanity-check` take it, and in "
            "Python load_imagebind(FILE) loads it"
        )


def _brings_its_own(model: str | Path, pretrained: str | Path) -> str:
    no_file = "" if Path(pretrained).is_file() else ", which is no file"
    return f"{model} brings its own weights: set pretrained to null; got {str(pretrained)!r}{no_file}"


@dataclass(frozen=True)
class _Source:
    """What the name of a model stands for.

    Attributes:
        architecture: as far as it says.
        weights: those that it brings.
        tokenizer: what open_clip knows the tokenizer by, where that is not the architecture's own.
        built_in: whether it is a name of open_clip's.
    """

    architecture: dict[str, Any]
    weights: Weights | None = None
    tokenizer: str | None = None
    built_in: bool = False

    @classmethod
    def of(cls, model: str | Path) -> _Source:
        name, path = str(model), Path(model)
        if name.startswith(_HUB):
            config = Path(_downloaded(name, FOLDER_CONFIG))
            architecture = {**architecture_from_json(config), "name": name.removeprefix(_HUB).replace("/", "--")}
            return cls(architecture, read_weights(Path(_downloaded(name, None))), tokenizer=name)
        # Any folder may lie about under the name of a model.
        known = name.replace("/", "-") in open_clip.list_models()
        if name.startswith(_LOCAL) or (path.is_dir() and (not known or (path / FOLDER_CONFIG).is_file())):
            folder = Path(name.removeprefix(_LOCAL))
            if not folder.is_dir():
                raise ValueError(f"{name}: there is no such folder")
            return cls(folder_architecture(folder), read_weights(_weights_in(folder)), tokenizer=f"{_LOCAL}{folder}")
        if path.suffix == ".ckpt":
            weights = read_weights(path)
            if weights.architecture is None:
                raise ValueError(
                    f"{path} names no architecture, so it is no checkpoint of this project; name the model"
                )
            return cls(weights.architecture, weights)
        if path.suffix == ".json":
            return cls(architecture_from_json(path))
        return cls(built_in_architecture(name), built_in=True)


def _downloaded(name: str, file: str | None) -> str:
    """A file of a model on the Hugging Face hub, or its weights: from the cache, or downloaded."""
    try:
        return str(download_pretrained_from_hf(name.removeprefix(_HUB), filename=file))
    except Exception as error:  # the hub's client has many kinds
        raise ValueError(f"{name}: {file or 'weights'} could not be fetched from the hub: {error}") from error


def _weights_in(folder: Path) -> Path:
    named = [folder / f"{stem}{suffix}" for stem in _WEIGHTS for suffix in _SUFFIXES]
    found = [path for path in named if path.is_file()]
    found = found or sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no weights ({', '.join(_SUFFIXES)})")
    return found[0]


def _from_file(source: _Source, weights: Weights, options: ModelOptions) -> DualEncoder:
    asked, recorded = source.architecture, weights.architecture
    trained = asked
    if recorded is not None:
        # Same shapes do not mean the same function (QuickGELU), so the file's own word counts.
        difference = differing_settings(asked["model_cfg"], recorded["model_cfg"]) - _ADAPTABLE
        if difference:
            raise ValueError(
                f"{weights.path} holds a {recorded['name']}, not a {asked['name']}: they differ in "
                f"{', '.join(sorted(difference))}; pass the model it was made with, or other weights"
            )
        trained = {**recorded, "preprocess_cfg": recorded["preprocess_cfg"] or asked["preprocess_cfg"]}
    elif weights.state.keys() >= _OPENAI_ONLY:
        trained = {**with_quick_gelu(asked), "preprocess_cfg": asked["preprocess_cfg"] or _OPENAI_PIXELS}
        weights = replace(weights, state={key: x for key, x in weights.state.items() if key not in _OPENAI_ONLY})
        recorded = trained
    named_so = trained["model_cfg"].get("quick_gelu", False) or not source.built_in
    trained = settled(trained, options, weights.path, activation_known=recorded is not None or named_so)
    size = options.size or _image_size(asked)
    length = _context_length(asked)
    encoder = _trained(trained, weights, source.tokenizer, named=weights.architecture is not None)
    try:
        encoder.check_towers()
    except ValueError as error:
        raise ValueError(f"checkpoint {weights.path} does not work: {error}") from error
    return _resized(encoder, size, length, source.tokenizer, str(weights.path))


def _from_tag(source: _Source, tag: str, options: ModelOptions) -> DualEncoder:
    name, tags = source.architecture["name"], tags_of(source.architecture)
    if tag not in tags:
        raise ValueError(f"pretrained {tag!r} is neither a file nor a tag of {name}; tags: {', '.join(tags) or 'none'}")
    architecture = tag_architecture(name, tag)
    quick_gelu = architecture["model_cfg"].get("quick_gelu", False)
    if options.quick_gelu not in (None, quick_gelu):
        raise ValueError(
            f"the weights {tag!r} of {name} were trained with quick_gelu={quick_gelu}: leave the option out"
        )
    model = open_clip.create_model(
        name, pretrained=tag, force_quick_gelu=quick_gelu, force_preprocess_cfg=options.preprocessing
    )
    encoder = _assemble(model, open_clip.get_tokenizer(name), architecture)
    size = options.size or encoder.image_transform.size
    return _resized(encoder, size, _context_length(architecture), None, f"{name}, {tag},")


def _image_size(architecture: Mapping[str, Any]) -> tuple[int, ...]:
    size = architecture["model_cfg"]["vision_cfg"].get("image_size", 224)  # open_clip's default
    return (size, size) if isinstance(size, int) else tuple(size)


def _context_length(architecture: Mapping[str, Any]) -> int:
    return int(architecture["model_cfg"]["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))


def _check_whole_patches(architecture: Mapping[str, Any], size: tuple[int, ...]) -> None:
    """Raise a ValueError where a tower of open_clip's own would not see the last pixels of such images."""
    vision = architecture["model_cfg"]["vision_cfg"]
    patch = vision.get("patch_size", 16) if isinstance(vision.get("layers", 12), int) else 32
    if "timm_model_name" in vision or not isinstance(patch, int) or all(side % patch == 0 for side in size):
        return
    near = [max(round(side / patch), 1) * patch for side in size]
    raise ValueError(
        f"image_size {[*size]} is no whole number of patches of {patch} pixels, so that the last pixels would not be "
        f"seen: give {near}, for example"
    )


def _with_image_size(architecture: Mapping[str, Any], size: tuple[int, ...] | None) -> dict[str, Any]:
    if size is None or size == _image_size(architecture):
        return dict(architecture)
    _check_whole_patches(architecture, size)
    return with_sizes(architecture, size, _context_length(architecture))


def _from_architecture(architecture: Mapping[str, Any], tokenizer_name: str | None = None) -> DualEncoder:
    """A randomly initialised encoder of a given architecture."""
    name, model_cfg = architecture["name"], architecture["model_cfg"]
    size = _image_size(architecture)
    if isinstance(model_cfg["vision_cfg"].get("layers"), list) and len(set(size)) > 1:
        raise ValueError(
            f"{name} is a ResNet of CLIP's, whose attention pool takes square images only: set image_size to one "
            f"number, such as {max(size)}; got {[*size]}"
        )
    with tempfile.TemporaryDirectory() as folder, _quiet_open_clip():
        # open_clip reads a configuration by name from its registry or from a folder; a folder keeps the registry clean.
        config = {"model_cfg": model_cfg, "preprocess_cfg": architecture["preprocess_cfg"]}
        (Path(folder) / FOLDER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            model = open_clip.create_model(f"{_LOCAL}{folder}", pretrained_text=False)
            _size_timm(model.visual)
            tokenizer = _tokenizer(model_cfg["text_cfg"], folder, tokenizer_name)
        except Exception as error:  # open_clip checks nothing: a wrong setting raises wherever it is first used
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ValueError(f"open_clip cannot build the model config {name!r} ({reason})") from error
    return _assemble(model, tokenizer, architecture)


def _size_timm(visual: Any) -> None:
    """Make a timm tower for the size that its config asks for: open_clip builds it for timm's default."""
    size = tuple(visual.image_size) if isinstance(visual, TimmModel) else None
    built_for = getattr(getattr(getattr(visual, "trunk", None), "patch_embed", None), "img_size", None)
    if size is not None and built_for is not None and tuple(built_for) != size:
        if not hasattr(visual.trunk, "set_input_size"):
            raise ValueError(f"a {type(visual.trunk).__name__} of timm takes images of {built_for} only, not {size}")
        visual.set_input_size(size)
    # NaFlexVit is built for no size, and interpolates its positions itself; but it cuts images into whole patches.
    embeds = getattr(getattr(visual, "trunk", None), "embeds", None)
    if size is not None and embeds is not None and any(s % p for s, p in zip(size, embeds.patch_size, strict=True)):
        raise ValueError(f"image_size has to be a multiple of the patches' {embeds.patch_size}; got {size}")


def _tokenizer(text_cfg: Mapping[str, Any], folder: str, name: str | None) -> Any:
    if name is not None:  # a folder or a repository that has the tokenizer's files
        return open_clip.get_tokenizer(name)
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
    """open_clip warns that no weights were loaded, which here is what was asked for."""
    loggers = [logging.getLogger(), logging.getLogger("open_clip.factory")]  # of open_clip 3, of open_clip 4

    def keep(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def _trained(architecture: dict[str, Any], weights: Weights, tokenizer: str | None, *, named: bool) -> DualEncoder:
    """The encoder with its weights, for the images and captions of its training.

    Raises:
        ValueError: the weights are of another model, or nothing says for which grid of patches.
    """
    encoder = _from_architecture(architecture, tokenizer)
    model, own = encoder.model, encoder.model.state_dict()
    weights = without_common_prefix(weights, own.keys(), [name for name, _ in model.named_buffers()])
    text = weights.state.get("positional_embedding", weights.state.get("text.positional_embedding"))
    length, size = _context_length(architecture), _image_size(architecture)
    found = text_positions(model)
    if text is not None and found is not None and text.ndim == 2:
        length += len(text) - len(own[found[0]])
    grid = ImagePositions.of(model)
    positions = weights.state.get(grid.key) if grid is not None else None
    if grid is not None and positions is not None and positions.ndim == own[grid.key].ndim:
        square = grid.trained_size(positions)
        if positions.shape[-2] != own[grid.key].shape[-2]:
            if square is None:
                raise ValueError(
                    f"{weights.path} was trained on {grid.count(positions)} patches, which make no square, so that "
                    f"their grid cannot be known; pass a config with the image_size of its training, and image_size "
                    "(--model.image_size) for the size you want"
                )
            size = square
        elif not named and square is not None and grid.grid[0] != grid.grid[1]:
            rows, columns = grid.grid
            side = math.isqrt(grid.count(positions))
            raise ValueError(
                f"{weights.path} holds positions of {rows * columns} patches, either of {rows} x {columns}, as "
                f"{architecture['name']} has them, or of {side} x {side}: put an {FOLDER_CONFIG} with the image_size "
                "of its training next to it, or pass a config with that, and image_size (--model.image_size) for yours"
            )
    if (length, size) != (_context_length(architecture), _image_size(architecture)):
        encoder = _from_architecture(with_sizes(architecture, size, length), tokenizer)
    _load_weights(encoder, weights)
    return encoder


def _resized(
    encoder: DualEncoder, size: tuple[int, ...], length: int, tokenizer: str | None, source: str
) -> DualEncoder:
    """The encoder for another size of images, and captions of another length: its positions interpolated.

    Raises:
        ValueError: the image tower knows but one size.
    """
    architecture, model = encoder.architecture, encoder.model
    if (size, length) == (_image_size(architecture), _context_length(architecture)):
        return encoder
    if size != _image_size(architecture):
        _check_whole_patches(architecture, size)
    before = ImagePositions.of(model)
    if isinstance(model.visual, TimmModel) and size != _image_size(architecture):
        model.visual.set_input_size(size)  # which interpolates, too
    target = _from_architecture(with_sizes(architecture, size, length), tokenizer)
    state, changes = model.state_dict(), []
    after = ImagePositions.of(target.model)
    if before is not None and after is not None and before.grid != after.grid:
        changes.append(f"image positions from {_grid(before.grid)} to {_grid(after.grid)} patches")
        if not isinstance(model.visual, TimmModel):
            state[after.key] = interpolate_image(state[after.key], after.prefix, before.grid, after.grid)
    text = text_positions(model)
    if text is not None and length != _context_length(architecture):
        changes.append(f"text positions from {_context_length(architecture)} to {length} tokens")
        state[text[0]] = interpolate_text(state[text[0]], length, text[1])
    try:
        target.model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{encoder.name} cannot be given another size than {_image_size(architecture)}") from error
    target.check_towers()
    if changes:
        warnings.warn(f"{source} was made for another size; interpolated {', '.join(changes)}", stacklevel=4)
    return target


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _load_weights(encoder: DualEncoder, weights: Weights) -> None:
    own = encoder.model.state_dict()
    # What the model computes itself, such as masks, TorchScript archives hold as well.
    computed = {name for name, _ in encoder.model.named_buffers()} - own.keys()
    weights = replace(weights, state={name: x for name, x in weights.state.items() if name not in computed})
    if _shapes(encoder.model.state_dict()) == _shapes(weights.state):
        encoder.model.load_state_dict(weights.state)
    else:
        _convert_weights(encoder, weights)


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
            heads = {name.partition(".")[0] for name in weights.state}
            inner = {name.partition(".")[2] for name in weights.state}
            advice = "Pass the model the checkpoint was made with"
            if len(heads) == 1 and encoder.model.state_dict().keys() <= inner:
                advice = f"All names begin with {heads.pop()!r}: save the state_dict of that part alone"
            raise ValueError(
                f"the weights in {weights.path} do not fit {encoder.architecture['name']}: "
                f"{_misfit(own, found) or error}. {advice}"
            ) from error


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
