"""A CLIP-like model with its tokenizer, its image transform, and towers that split into stem and tail."""

from __future__ import annotations

import difflib
import json
import logging
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_xai.data.image_transform import ImageTransform
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.towers import (
    Split,
    TextTower,
    TextTransformerSplit,
    UnsupportedTowerError,
    split_image_tower,
    split_text_tower,
)

CHECKPOINT_KEY = "dual_encoder"
"""Where a Lightning checkpoint of this project keeps the architecture, and the metadata key of exported weights."""
_STATE_PREFIX = "encoder.model."


class DualEncoder(nn.Module):
    """An open_clip model that carries all that is needed to use it: tokenizer, image transform, architecture.

    Attributes:
        model: the open_clip model; its weights are the only parameters.
        tokenizer: captions -> token ids, characters -> tokens.
        image_transform: pixels and boxes -> what the image tower takes.
        architecture: name, model and preprocessing configuration; plain values, so that checkpoints can hold them.
    """

    def __init__(self, model: nn.Module, tokenizer: CaptionTokenizer, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_transform = ImageTransform.from_open_clip(model)
        self.architecture = dict(architecture)
        try:
            self._text_tower: TextTower | None = TextTower(model)
        except UnsupportedTowerError:
            # Such a model trains as usual; what needs its text tower split says so when asked.
            self._text_tower = None
        self._check_towers()

    @property
    def logit_scale(self) -> Tensor:
        """The learned logarithm of the factor on cosine similarities, a scalar parameter."""
        scale: Tensor = self.model.logit_scale
        return scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, K], not normalised."""
        embedding: Tensor = self.model.encode_image(images)
        return embedding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised; only as many tokens are run as are needed."""
        if len(tokens) == 0:
            return self.logit_scale.new_zeros(0, self.architecture["model_cfg"]["embed_dim"])
        if self._text_tower is not None:
            return self._text_tower.encode(tokens)
        embedding: Tensor = self.model.encode_text(tokens)
        return embedding

    def split_image(self, layer: int = -1) -> Split:
        """The image tower, cut at the input of block `layer` (0 is the first; ResNets have stages 1 to 4).

        Raises:
            ValueError: no such layer, or a tower of a kind that cannot be split yet.
        """
        return split_image_tower(self.model, layer)

    def split_text(self, layer: int = -1) -> TextTransformerSplit:
        """The text tower, cut at the input of block `layer`.

        Raises:
            ValueError: no such layer, or a tower of a kind that cannot be split yet.
        """
        return split_text_tower(self.model, layer)

    @torch.no_grad()
    def _check_towers(self) -> None:
        """tail(stem(x)) and the path's end have to be the encoder's own output, or attributions would explain another model."""
        weight = next(self.model.parameters())
        with _evaluation(self.model):
            height, width = self.image_transform.size
            generator = torch.Generator().manual_seed(0)
            image = torch.randn(1, 3, height, width, generator=generator).to(weight)
            tokens = self.tokenizer.encode(["a probe of two towers"]).to(weight.device)
            for tower, inputs, own in (
                ("image", image, self.model.encode_image),
                ("text", tokens, self.model.encode_text),
            ):
                try:
                    split: Split = self.split_image() if tower == "image" else self.split_text()
                except UnsupportedTowerError:
                    continue
                pool = split.pool_positions(tokens) if isinstance(split, TextTransformerSplit) else None
                hidden = split.stem(inputs)
                ends = torch.ones(1, 1, hidden[0, 0].numel() if hidden.ndim == 4 else hidden.shape[1]).to(hidden)
                rebuilt = {
                    "tail(stem(x))": split.tail(hidden, pool),
                    "path(1)": split.path(hidden, torch.zeros_like(hidden), pool)(ends)[:, 0],
                }
                self._compare(tower, own(inputs), rebuilt)

    def _compare(self, tower: str, expected: Tensor, rebuilt: Mapping[str, Tensor]) -> None:
        if not expected.isfinite().all():
            raise ValueError(f"the {tower} tower's output is not finite: its weights hold NaN or infinity")
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        for name, embedding in rebuilt.items():
            error = (embedding - expected).norm() / expected.norm()
            if not error <= tolerance:
                raise ValueError(
                    f"{name} of the {tower} tower differs from the encoder's own output by {float(error):.1e} (relative); "
                    f"open_clip {open_clip.__version__} is not laid out as this release expects"
                )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def load_dual_encoder(
    model: str | Path, pretrained: str | Path | None = None, device: str | torch.device = "cpu"
) -> DualEncoder:
    """Load any open_clip model, with weights from a tag, from a file, or random.

    Args:
        model: an open_clip name (`"ViT-B-16"`), the path of a JSON model config, or the path of a Lightning checkpoint
            of this project, which knows its architecture.
        pretrained: None (random weights, or those of the Lightning checkpoint given as `model`), an open_clip tag
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
    if path.suffix == ".ckpt":
        weights = _read_weights(path if pretrained is None else Path(pretrained))
        architecture = _read_weights(path).architecture
        if architecture is None:
            raise ValueError(f"{path} names no architecture, so it is no checkpoint of this project; give model and pretrained")
        encoder = _from_architecture(architecture)
        _load_weights(encoder, weights)
    else:
        architecture = _from_json(path) if path.suffix == ".json" else _built_in(str(model))
        encoder = _with_weights(architecture, None if pretrained is None else str(pretrained))
    return encoder.to(device)


class _Weights:
    """A state dict of an open_clip model read from a file, and the architecture the file names, if any."""

    def __init__(self, path: Path, state: dict[str, Tensor], architecture: Mapping[str, Any] | None) -> None:
        self.path, self.state, self.architecture = path, state, architecture


def _built_in(name: str) -> dict[str, Any]:
    name = name.replace("/", "-")
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=5, cutoff=0.4)
        raise ValueError(
            f"unknown model {name!r}; did you mean {', '.join(close) or 'one of open_clip.list_models()'}? "
            "A path of a JSON model config or of a .ckpt file works as well"
        )
    return {"name": name, "model_cfg": config, "preprocess_cfg": {}}


def _from_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"model config {path} cannot be read ({error.strerror}); give the path of a JSON file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"model config {path} is broken JSON: {error}") from error
    model_cfg = config.get("model_cfg", config) if isinstance(config, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
    if missing:
        raise ValueError(f"model config {path} lacks {', '.join(missing)}; see open_clip's model_configs for examples")
    return {"name": path.stem, "model_cfg": model_cfg, "preprocess_cfg": config.get("preprocess_cfg", {})}


def _with_weights(architecture: dict[str, Any], pretrained: str | None) -> DualEncoder:
    if pretrained is None:
        return _from_architecture(architecture)
    name = architecture["name"]
    tags = open_clip.list_pretrained_tags_by_model(name) if name in open_clip.list_models() else []
    if pretrained in tags and not Path(pretrained).is_file():
        return _from_tag(architecture, pretrained)
    if not Path(pretrained).is_file():
        raise ValueError(
            f"pretrained {pretrained!r} is neither a file nor a tag of {name}; tags: {', '.join(tags) or 'none'}"
        )
    weights = _read_weights(Path(pretrained))
    if weights.architecture is not None:
        # Same shapes do not mean the same function (QuickGELU), so the file's own word counts.
        if weights.architecture["model_cfg"] != architecture["model_cfg"]:
            difference = _difference(architecture["model_cfg"], weights.architecture["model_cfg"])
            if difference != {"quick_gelu"}:
                raise ValueError(
                    f"{pretrained} holds a {weights.architecture['name']}, not a {name}: they differ in "
                    f"{', '.join(sorted(difference))}; pass model={weights.architecture['name']!r} or other weights"
                )
        architecture = dict(weights.architecture)
    encoder = _from_architecture(architecture)
    _load_weights(encoder, weights)
    return encoder


def _difference(first: Any, second: Any, at: str = "") -> set[str]:
    """Names of the settings that two nested configurations do not share."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = first.keys() | second.keys()
        return set().union(*(_difference(first.get(k), second.get(k), f"{at}.{k}".lstrip(".")) for k in keys))
    plain = [list(x) if isinstance(x, tuple) else x for x in (first, second)]
    return set() if plain[0] == plain[1] else {at}


def _from_tag(architecture: dict[str, Any], tag: str) -> DualEncoder:
    name = architecture["name"]
    quick_gelu = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    model = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu)
    if quick_gelu:
        architecture["model_cfg"]["quick_gelu"] = True
    return _assemble(model, open_clip.get_tokenizer(name), architecture)


def _from_architecture(architecture: Mapping[str, Any]) -> DualEncoder:
    """A randomly initialised encoder of a given architecture."""
    name, model_cfg = architecture["name"], architecture["model_cfg"]
    text_cfg = model_cfg["text_cfg"]
    with tempfile.TemporaryDirectory() as folder, _quiet_open_clip():
        # open_clip reads a configuration by name from its registry or from a folder; the folder keeps the registry clean.
        config = {"model_cfg": model_cfg, "preprocess_cfg": architecture.get("preprocess_cfg", {})}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        try:
            model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
        except (TypeError, KeyError, AssertionError, RuntimeError) as error:
            raise ValueError(f"open_clip cannot build the model config {name!r}: {error}") from error
        if text_cfg.get("hf_tokenizer_name"):
            tokenizer: Any = HFTokenizer(
                text_cfg["hf_tokenizer_name"],
                context_length=text_cfg.get("context_length", 77),
                **text_cfg.get("tokenizer_kwargs", {}),
            )
        else:
            tokenizer = open_clip.get_tokenizer(name if name in open_clip.list_models() else f"local-dir:{folder}")
    return _assemble(model, tokenizer, architecture)


def _assemble(model: nn.Module, tokenizer: Any, architecture: Mapping[str, Any]) -> DualEncoder:
    preprocess = {k: list(v) if isinstance(v, tuple) else v for k, v in model.visual.preprocess_cfg.items()}
    return DualEncoder(model, CaptionTokenizer(tokenizer), {**architecture, "preprocess_cfg": preprocess})


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip warns on the root logger that no weights were loaded, which here is what was asked for."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addFilter(keep)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        root.removeFilter(keep)


def _read_weights(path: Path) -> _Weights:
    """Read a state dict without unpickling anything but tensors and plain values.

    Raises:
        ValueError: the file is missing, broken, or holds other objects.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {path} is no readable safetensors file: {error}") from error
        recorded = metadata.get(CHECKPOINT_KEY)
        return _Weights(path, state, json.loads(recorded) if recorded else None)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read as plain tensors ({str(error).splitlines()[0]}); "
            "it is broken, or holds Python objects, which are never loaded: save its state_dict alone"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"checkpoint {path} holds a {type(checkpoint).__name__}, expected a state dict")
    architecture = checkpoint.get(CHECKPOINT_KEY)
    state = checkpoint.get("state_dict", checkpoint)
    if architecture is not None:
        state = {key.removeprefix(_STATE_PREFIX): value for key, value in state.items() if key.startswith(_STATE_PREFIX)}
    else:
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return _Weights(path, state, architecture)


def _load_weights(encoder: DualEncoder, weights: _Weights) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # open_clip's own loader converts the older layouts of state dicts; it reads files only.
        file = Path(folder) / "state.pt"
        torch.save(weights.state, file)
        try:
            open_clip.load_checkpoint(encoder.model, str(file), strict=True)
        except (RuntimeError, KeyError, AttributeError, StopIteration) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the weights in {weights.path} do not fit {encoder.architecture['name']}: {reason}... "
                "Pass the model the checkpoint was made with"
            ) from error
    encoder._check_towers()


def save_open_clip(encoder: DualEncoder, path: Path) -> None:
    """Write weights that `open_clip.create_model(name, pretrained=path)` loads.

    A `.safetensors` file also carries the architecture in its metadata; beside either kind lies `<stem>.json`, the
    model config, so that models that open_clip has no name for can be built as well.

    Raises:
        ValueError: a suffix other than `.safetensors` or `.pt`.
    """
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"export writes .safetensors or .pt, not {path.suffix or 'a file without suffix'}: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.model.state_dict().items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path, metadata={CHECKPOINT_KEY: json.dumps(encoder.architecture)})
    else:
        torch.save(state, path)
    path.with_suffix(".json").write_text(json.dumps(encoder.architecture["model_cfg"], indent=2) + "\n")
