"""A CLIP-like model with its tokenizer, its image transform, and towers that split into stem and tail."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_xai.data.image_transform import ImageTransform
from lightning_xai.data.sample import read_image
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer, UnsupportedTowerError, evaluating
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.models.towers import TextTower, checkpoint_blocks, image_at_layer_tower, text_at_layer_tower

CHECKPOINT_KEY = "dual_encoder"
"""Where a Lightning checkpoint of this project keeps the architecture, and the metadata key of exported weights."""
_STATE_PREFIX = "encoder.model."
# What only OpenAI's own state dicts hold beside the weights; all of OpenAI's models compute with QuickGELU.
_OPENAI_ONLY = frozenset({"input_resolution", "context_length", "vocab_size"})
# Takes the encoder as an argument, so that the copy of an encoder runs its own weights, compiled or not.
Tower = Callable[["DualEncoder", Tensor], Tensor]


class DualEncoder(TwoTowerEncoder):
    """An open_clip model that carries all that is needed to use it: tokenizer, image transform, architecture.

    Attributes:
        model: the open_clip model; its weights are the only parameters.
        tokenizer: captions -> token ids, characters -> tokens.
        image_transform: pixels and boxes -> what the image tower takes.
        architecture: name, model and preprocessing configuration; plain values, so that checkpoints can hold them.
    """

    def __init__(self, model: nn.Module, tokenizer: CaptionTokenizer, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        # open_clip's model classes share their methods, but no base class that has them.
        self.model: Any = model
        self.tokenizer = tokenizer
        self.image_transform = ImageTransform.from_open_clip(model)
        self.architecture = dict(architecture)
        try:
            self._text_tower: TextTower | None = TextTower(model)
        except UnsupportedTowerError:
            # Such a model trains as usual; what needs its text tower split says so when asked.
            self._text_tower = None
        self._towers: tuple[Tower, Tower] = (_embed_images, _embed_tokens)
        self.check_towers()

    @property
    def name(self) -> str:
        """open_clip's name of the architecture, or that of the model config."""
        return str(self.architecture["name"])

    @property
    def logit_scale(self) -> Tensor:
        """The learned logarithm of the factor on cosine similarities, a scalar parameter."""
        scale: Tensor = self.model.logit_scale
        if not hasattr(scale, "to_local"):
            return scale
        # A DTensor, since the encoder is sharded; every process has all of it.
        local: Tensor = scale.to_local()
        if local.requires_grad:
            local.register_hook(_mean_over_processes)  # type: ignore[no-untyped-call]
        return local

    @property
    def embedding_width(self) -> int:
        """K, the width of the shared space."""
        return int(self.architecture["model_cfg"]["embed_dim"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, height, width) of the images that the transform makes."""
        return (3, *self.image_transform.size)

    def black_image(self) -> Tensor:
        """Black pixels, normalised: [3, height, width]."""
        black = -torch.tensor(self.image_transform.mean) / torch.tensor(self.image_transform.std)
        return black[:, None, None].expand(self.image_shape)

    def read(self, path: Path) -> tuple[Tensor, tuple[int, int]]:
        """A JPEG, PNG or WebP file, upright, transformed: [3, height, width]; and its own (width, height)."""
        image = read_image(path.read_bytes(), str(path))
        return self.image_transform(image), image.size

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes of an image file, resized and cropped as its pixels are."""
        return self.image_transform.boxes(boxes, size)

    def pictures(self, images: Tensor) -> Tensor:
        """The images' pixels, no longer normalised."""
        return self.image_transform.denormalize(images)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, K], not normalised."""
        # CoCa normalises unless told not to.
        embedding: Tensor = self.model.encode_image(images, normalize=False)
        return embedding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, K], not normalised; only as many tokens are run as are needed."""
        if len(tokens) == 0:
            return self.logit_scale.new_zeros(0, self.embedding_width)
        return _embed_tokens(self, self.cut_tokens(tokens))

    def cut_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens [B, T] of [B, L] that this batch's embeddings depend on, where that can be told; else all.

        Finding them waits for the tokens' device, so that training cuts them while they are on the CPU.
        """
        return tokens if self._text_tower is None else self._text_tower.cut(tokens)

    def forward(self, images: Tensor, tokens: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Both embeddings of B pairs, each [B, K], not normalised: what a training step runs.

        Args:
            images: [B, 3, H, W].
            tokens: [B, T], all of which are run: what `cut_tokens` has left.
            chunk_size: pairs that are embedded at a time. Only their embeddings are kept, and each chunk is run again
                in the backward pass, with the same random numbers, so that the activations of one chunk are in memory
                at a time. For what depends on all of a batch's embeddings this is GradCache (Gao et al. 2021), and
                exact. None: all at once.
        """
        if chunk_size is None or len(images) <= chunk_size:
            return self._embed(images, tokens)
        chunks = zip(torch.split(images, chunk_size), torch.split(tokens, chunk_size), strict=True)
        parts = [checkpoint(self._embed, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat([image for image, _ in parts]), torch.cat([text for _, text in parts])

    def _embed(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        embed_images, embed_tokens = self._towers
        return embed_images(self, images), embed_tokens(self, tokens)

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of blocks for the backward pass, and run each block again there.

        Raises:
            UnsupportedTowerError: a tower cannot do so.
        """
        checkpoint_blocks(self.model)
        image, tokens = self.black_image()[None].to(self.logit_scale), self.tokenizer.encode(["a probe"])
        try:
            with evaluating(self):  # draws no random numbers
                self(image, tokens.to(image.device))
        except TypeError as error:  # blocks that take other arguments than open_clip 3.3 then gives them
            raise UnsupportedTowerError(
                f"{self._maker} cannot run the blocks of {self.name} with gradient checkpointing ({error}): set "
                "gradient_checkpointing to false; chunk_size saves more memory than it does"
            ) from error

    def compile_towers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let `forward` run compiled towers; all other methods run the modules as they are, whose hooks work."""
        embed_images = torch.compile(_embed_images, backend=backend)
        embed_tokens = torch.compile(_embed_tokens, backend=backend)

        def embed_any_length(encoder: DualEncoder, tokens: Tensor) -> Tensor:
            # Else the first batch would be compiled for captions of its own length alone.
            torch._dynamo.maybe_mark_dynamic(tokens, 1)
            return embed_tokens(encoder, tokens)

        self._towers = embed_images, embed_any_length

    def blocks(self) -> list[nn.Module]:
        """The blocks of both towers, image tower first; none of a tower that cannot be cut into blocks."""
        found: list[nn.Module] = []
        for cut in (self._image_at_layer, self._text_at_layer):
            with suppress(UnsupportedTowerError):
                found += [block for layer in cut(-1).layers if (block := cut(layer).block) is not None]
        return found

    def _image_at_layer(self, layer: int) -> TowerAtLayer:
        return image_at_layer_tower(self.model, layer)

    def _text_at_layer(self, layer: int) -> TextTowerAtLayer:
        return text_at_layer_tower(self.model, layer)

    def _own_embedding(self, tower: str, inputs: Tensor) -> Tensor:
        # open_clip's own words, not `encode_text`, which is checked by them too.
        encode = self.model.encode_image if tower == "image" else self.model.encode_text
        embedding: Tensor = encode(inputs, normalize=False)
        return embedding

    @property
    def _maker(self) -> str:
        return f"open_clip {open_clip.__version__}"

    def check_towers(self) -> None:
        """Refuse towers whose split is not the encoder itself: attributions would explain another model.

        Other layers than the last are checked when they are first split at.

        Raises:
            ValueError: `tail(stem(x))` or the end of the path is not the encoder's own output, or that is not finite or
                not of the shared space's width.
        """
        self._checked.clear()
        for tower, cut in (("image", self.image_at_layer), ("text", self.text_at_layer)):
            # A tower that cannot be split trains as usual; whoever asks for the split is told.
            with suppress(UnsupportedTowerError):
                cut()
                continue
            self._probe(tower)


def _mean_over_processes(gradient: Tensor) -> Tensor:
    """Of gradients that should be equal: where they differ in the last digit, the processes would drift apart."""
    mean = gradient / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def _embed_images(encoder: DualEncoder, images: Tensor) -> Tensor:
    return encoder.encode_image(images)


def _embed_tokens(encoder: DualEncoder, tokens: Tensor) -> Tensor:
    if encoder._text_tower is not None:
        return encoder._text_tower.encode(tokens)
    embedding: Tensor = encoder.model.encode_text(tokens, normalize=False)
    return embedding


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
        weights = _read_weights(path)
        if weights.architecture is None:
            raise ValueError(f"{path} names no architecture, so it is no checkpoint of this project; name the model")
        if pretrained is not None and not Path(pretrained).is_file():
            # A tag is often nothing but a default, and would take the place of the checkpoint's weights unseen.
            raise ValueError(
                f"{path} brings its own weights: set pretrained to null; got {str(pretrained)!r}, which is no file"
            )
        architecture = weights.architecture
    else:
        architecture = _from_json(path) if path.suffix == ".json" else _built_in(str(model))
    if pretrained is not None:
        encoder = _with_weights(architecture, str(pretrained))
    else:
        encoder = _from_architecture(architecture)
        if weights is not None:
            _load_weights(encoder, weights)
    return encoder.to(device)


@dataclass(frozen=True)
class _Weights:
    """A state dict of an open_clip model read from a file, and the architecture the file names, if any."""

    path: Path
    state: dict[str, Tensor]
    architecture: dict[str, Any] | None


def _built_in(name: str) -> dict[str, Any]:
    cleaned = name.replace("/", "-")
    config = open_clip.get_model_config(cleaned) if cleaned in open_clip.list_models() else None
    if config is None:
        close = difflib.get_close_matches(cleaned, open_clip.list_models(), n=5, cutoff=0.4)
        raise ValueError(
            f"unknown model {name!r}; did you mean {', '.join(close) or 'one of open_clip.list_models()'}? "
            "A path of a JSON model config or of a .ckpt file works as well"
        )
    return {"name": cleaned, "model_cfg": config, "preprocess_cfg": {}}


def _from_json(path: Path) -> dict[str, Any]:
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


def _with_weights(architecture: dict[str, Any], pretrained: str) -> DualEncoder:
    tags, name = _tags(architecture), architecture["name"]
    if not Path(pretrained).is_file():
        if pretrained in tags:
            return _from_tag(name, pretrained)
        raise ValueError(
            f"pretrained {pretrained!r} is neither a file nor a tag of {name}; tags: {', '.join(tags) or 'none'}"
        )
    weights = _read_weights(Path(pretrained))
    if weights.architecture is not None:
        # Same shapes do not mean the same function (QuickGELU), so the file's own word counts.
        difference = _difference(architecture["model_cfg"], weights.architecture["model_cfg"]) - {"quick_gelu"}
        if difference:
            raise ValueError(
                f"{pretrained} holds a {weights.architecture['name']}, not a {name}: they differ in "
                f"{', '.join(sorted(difference))}; pass the model it was made with, or other weights"
            )
        architecture = weights.architecture
    elif weights.state.keys() >= _OPENAI_ONLY:
        architecture = _with_quick_gelu(architecture)
        weights = replace(weights, state={key: x for key, x in weights.state.items() if key not in _OPENAI_ONLY})
    encoder = _from_architecture(architecture)
    _load_weights(encoder, weights)
    return encoder


def _tags(architecture: Mapping[str, Any]) -> list[str]:
    """The tags open_clip has weights for, none for an architecture that only shares a name with one of open_clip's."""
    name = architecture["name"]
    known = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if known is None or _difference(known, architecture["model_cfg"]) - {"quick_gelu"}:
        return []
    return list(open_clip.list_pretrained_tags_by_model(name))


def _difference(first: Any, second: Any, at: str = "") -> set[str]:
    """Names of the settings that two nested configurations do not share; a setting of null is none.

    Example:
        >>> _difference({"a": 1, "b": {"c": (2, 3)}}, {"b": {"c": [2, 4]}, "d": None}) == {"a", "b.c"}
        True
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = first.keys() | second.keys()
        return set().union(*(_difference(first.get(k), second.get(k), f"{at}.{k}".lstrip(".")) for k in keys))
    plain = [list(x) if isinstance(x, tuple) else x for x in (first, second)]
    return set() if plain[0] == plain[1] else {at}


def _from_tag(name: str, tag: str) -> DualEncoder:
    architecture = tag_architecture(name, tag)
    quick_gelu = architecture["model_cfg"].get("quick_gelu", False)
    model = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick_gelu)
    return _assemble(model, open_clip.get_tokenizer(name), architecture)


def tag_architecture(name: str, tag: str) -> dict[str, Any]:
    """The architecture that open_clip's weights `tag` of model `name` were trained in, with the right activation.

    Raises:
        ValueError: open_clip knows no such model.

    Example:
        >>> [tag_architecture("ViT-B-16", tag)["name"] for tag in ("openai", "datacomp_xl_s13b_b90k")]
        ['ViT-B-16-quickgelu', 'ViT-B-16']
    """
    architecture = _built_in(name)
    quick_gelu = open_clip.get_pretrained_cfg(architecture["name"], tag).get("quick_gelu", False)
    return _with_quick_gelu(architecture) if quick_gelu else architecture


def _with_quick_gelu(architecture: Mapping[str, Any]) -> dict[str, Any]:
    name, model_cfg = architecture["name"], {**architecture["model_cfg"], "quick_gelu": True}
    # Whoever loads an export by the recorded name gets the activation too.
    known = open_clip.get_model_config(f"{name}-quickgelu") == model_cfg
    return {**architecture, "name": f"{name}-quickgelu" if known else name, "model_cfg": model_cfg}


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


def _read_weights(path: Path) -> _Weights:
    """Read a state dict without unpickling anything but tensors and plain values.

    Raises:
        ValueError: the file is missing, broken, or holds other objects.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    state, recorded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"checkpoint {path} holds no state dict (names and tensors); save the model's state_dict alone"
        )
    if not state:
        raise ValueError(f"checkpoint {path} holds no weights")
    return _Weights(path, state, None if recorded is None else _check_architecture(recorded, path))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            recorded = (opened.metadata() or {}).get(CHECKPOINT_KEY)
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is no readable safetensors file: {error}") from error
    try:
        return state, None if recorded is None else json.loads(recorded)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} has broken JSON in its metadata {CHECKPOINT_KEY!r}: {error}") from error


def _read_pickle(path: Path) -> tuple[Any, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle raises whatever its bytes happen to ask for
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"checkpoint {path} cannot be read as plain tensors ({reason}); it is broken, or holds Python objects, "
            "which are never loaded: save its state_dict alone"
        ) from error
    if not isinstance(checkpoint, dict):
        return checkpoint, None
    recorded, state = checkpoint.get(CHECKPOINT_KEY), checkpoint.get("state_dict", checkpoint)
    if isinstance(state, dict):
        prefix, only = ("module.", "") if recorded is None else (_STATE_PREFIX, _STATE_PREFIX)
        state = {str(key).removeprefix(prefix): value for key, value in state.items() if str(key).startswith(only)}
    return state, recorded


def _check_architecture(recorded: Any, path: Path) -> dict[str, Any]:
    source = f"the architecture recorded in {path}"
    parts = {"name": str, "model_cfg": dict, "preprocess_cfg": dict}
    if not isinstance(recorded, dict) or any(not isinstance(recorded.get(key), kind) for key, kind in parts.items()):
        raise ValueError(f"{source} is broken, expected {', '.join(parts)}; write the file again with this project")
    _check_config(recorded["model_cfg"], source)
    return recorded


def _load_weights(encoder: DualEncoder, weights: _Weights) -> None:
    if _shapes(encoder.model.state_dict()) == _shapes(weights.state):
        encoder.model.load_state_dict(weights.state)
    else:
        _convert_weights(encoder, weights)
    try:
        encoder.check_towers()
    except ValueError as error:
        raise ValueError(f"checkpoint {weights.path} does not work: {error}") from error


def _convert_weights(encoder: DualEncoder, weights: _Weights) -> None:
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
    """What keeps a file's tensors from being a model's, a few of each kind, by their names and shapes.

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
        save_file(state, path, metadata={CHECKPOINT_KEY: json.dumps(encoder.architecture)})
    else:
        torch.save(state, path)
    path.with_suffix(".json").write_text(
        json.dumps(encoder.architecture["model_cfg"], indent=2) + "\n", encoding="utf-8"
    )
