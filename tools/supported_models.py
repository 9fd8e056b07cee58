"""Prints which of open_clip's models can be explained, at which layers, by which methods, and how they train.

    python tools/supported_models.py            # the table of docs/reference/supported-models.md
    python tools/supported_models.py --write    # put it there

Every model is made small in depth and width, with random weights, and nothing is downloaded. Names that then differ in
nothing but size and activation are one family, and the first of them is surveyed for all:

- both towers are taken at the input of every block, which compares them with the model's own output;
- every method of METHODS explains two pairs, or refuses with an UnsupportedTowerError;
- one training step is taken, and a second time with gradient checkpointing, where gradients have to be the same.

`tests/models/test_all_models.py` does the same, and compares the result with the page.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_xai.attribution import METHODS, AttributionMethod, ConstantMapWarning
from lightning_xai.loss import global_contrastive_loss
from lightning_xai.models import DualEncoder, UnsupportedTowerError, load_dual_encoder
from lightning_xai.models.at_layer import TowerAtLayer
from lightning_xai.training.contrastive import ContrastiveModule

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "supported-models.md"
BEGIN, END = "<!-- printed by tools/supported_models.py -->", "<!-- end -->"

# Names that are not built, and why.
EXCLUDED: dict[str, str] = {}

# NaFlex towers have no names in open_clip, but come as model configs that name a tower of timm.
NAFLEX: dict[str, dict[str, Any]] = {
    f"{tower} (config)": {
        "embed_dim": 768,
        "vision_cfg": {"timm_model_name": tower, "timm_pool": pool, "timm_proj": proj, "image_size": 256},
        "text_cfg": {"context_length": 64, "pool_type": "last", "no_causal_mask": True},
        "custom_text": True,
    }
    for tower, pool, proj in (
        ("naflexvit_base_patch16_siglip", "map", "none"),
        ("naflexvit_so400m_patch16_siglip", "map", "none"),
        ("naflexvit_base_patch16_gap", "avg", "linear"),
        ("naflexvit_base_patch16_par_gap", "avg", "linear"),
        ("naflexvit_base_patch16_parfac_gap", "avg", "linear"),
    )
}

HEIGHT, WIDTH = 64, 96  # of images; a grid of 4 x 6 patches
DIM, HEADS, DEPTH = 32, 2, 3
TOKENS, VOCABULARY = 12, 49408  # the vocabulary of open_clip's own tokenizer

_VIT = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0}
_VITAMIN = VitCfg(
    embed_dim=(8, 8, DIM),
    depths=(1, 1, 1),
    stem_width=8,
    conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)


def _mobile_clip_stem() -> dict[str, Any]:
    stem = partial(ConvStem, channels=(8, 8, DIM), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0)
    return _VIT | {"embed_layer": partial(HybridEmbed, stem(act_layer=nn.GELU), proj=False)}


# timm's names -> what makes its towers small; the first that fits counts.
TIMM: dict[str, Callable[[], dict[str, Any]]] = {
    "convnext_*": lambda: {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, DIM)},
    "fastvit_mci[34]": lambda: {"layers": (1,) * 5, "embed_dims": (8, 8, 8, 32, 32)},
    "fastvit_*": lambda: {"layers": (1,) * 4, "embed_dims": (8, 8, 8, 32)},
    "swin_*": lambda: {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (2,) * 4},
    "vitamin_*": lambda: _VIT | {"embed_cfg": _VITAMIN},
    "vit_base_mci_*": _mobile_clip_stem,
    "vit_pe_core_*": lambda: _VIT | {"attn_pool_num_heads": HEADS, "attn_pool_mlp_ratio": 2.0},
    "naflexvit_*": lambda: _VIT,
    "vit_*": lambda: _VIT,
    "eva*": lambda: _VIT,
}

# Names of Hugging Face's models -> their type, and what makes it small.
_TOKENS = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 0}
_ROBERTA = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": DIM}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-*": ("roberta", _ROBERTA | _TOKENS),
    "xlm-roberta-*": ("xlm-roberta", _ROBERTA | _TOKENS),
    "google/mt5-*": (
        "mt5",
        _TOKENS | {"d_model": DIM, "d_kv": 8, "d_ff": DIM, "num_layers": DEPTH, "num_heads": HEADS},
    ),
    "facebook/nllb-*": (
        "m2m_100",
        _TOKENS | {
            "d_model": DIM, "encoder_layers": DEPTH, "encoder_attention_heads": HEADS, "encoder_ffn_dim": DIM,
            "decoder_layers": 1, "decoder_attention_heads": HEADS, "decoder_ffn_dim": DIM,
        },
    ),
}  # fmt: skip

# Few steps and samples: the question is whether a method serves a model.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "banzhaf_pairs": {"image_samples": 64, "text_samples": 40},
    "feature_pair": {"steps": 2},
    "integrated_gradients": {"steps": 2},
    "kernel_shap": {"image_samples": 40, "text_samples": 20},
    "m2ib": {"steps": 2, "samples": 2},
    "nib": {"steps": 2},
    "rise": {"image_masks": 4, "text_masks": 4},
}


def names() -> list[str]:
    """All that is to be built: open_clip's names but the excluded ones, and the configs of NaFlex towers."""
    return [*(name for name in open_clip.list_models() if name not in EXCLUDED), *NAFLEX]


@dataclass(frozen=True)
class Small:
    """A model made small.

    Attributes:
        model_cfg: open_clip's config of it.
        trunk: what timm is given besides, to make its tower small.
        text: type and settings of a text tower of Hugging Face; None for open_clip's own.
    """

    model_cfg: dict[str, Any]
    trunk: dict[str, Any] = field(default_factory=dict)
    text: tuple[str, dict[str, Any]] | None = None


def shrunk(name: str, *, own_images: bool = False) -> Small:
    """The model of a name, small in depth and width, but for the vocabulary; for small images, or its own."""
    config: dict[str, Any] = copy.deepcopy(NAFLEX.get(name) or open_clip.get_model_config(name))
    vision, text, captions = config["vision_cfg"], config["text_cfg"], config.get("multimodal_cfg")
    if not own_images:  # open_clip's ResNet takes square ones only
        vision["image_size"] = HEIGHT if isinstance(vision.get("layers"), list) else [HEIGHT, WIDTH]
    trunk: dict[str, Any] = {}
    if "timm_model_name" in vision:
        trunk = _first(TIMM, vision["timm_model_name"])()
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8}
    else:
        vision |= {"layers": DEPTH, "width": DIM, "head_width": DIM // HEADS, "mlp_ratio": 2.0}
    text["context_length"] = TOKENS
    # open_clip's own tokenizer is part of its package.
    text.pop("hf_tokenizer_name", None)
    text.pop("tokenizer_kwargs", None)
    own_text = "hf_model_name" not in text
    if own_text:
        text |= {"vocab_size": VOCABULARY, "width": DIM, "heads": HEADS, "layers": DEPTH, "mlp_ratio": 2.0}
    if "eos_id" in text:
        text["eos_id"] = VOCABULARY - 1
    if captions is not None:  # of CoCa, which are never written here
        captions |= {"width": DIM, "heads": HEADS, "layers": 1, "context_length": TOKENS, "vocab_size": VOCABULARY}
        for part in (vision, captions):
            part["attn_pooler_heads"] = HEADS
    hugging_face = None if own_text else _first(HUGGING_FACE, text["hf_model_name"])
    return Small({**config, "embed_dim": DIM}, trunk, hugging_face)


def _first(table: Mapping[str, Any], name: str) -> Any:
    for pattern, value in table.items():
        if fnmatch(name, pattern):
            return value
    raise ValueError(f"nothing says how {name} is made small: add its pattern to {Path(__file__).name}")


def build(name: str, *, own_images: bool = False) -> DualEncoder:
    """The encoder of a name, small, with random weights; for small images, or its own."""
    small = shrunk(name, own_images=own_images)
    with tempfile.TemporaryDirectory() as folder, _small_towers_of_timm(small.trunk):
        config = small.model_cfg
        if small.text is not None:
            from transformers import AutoConfig

            kind, settings = small.text
            AutoConfig.for_model(kind, **settings).save_pretrained(folder)
            config = {**config, "text_cfg": config["text_cfg"] | {"hf_model_name": folder}}
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        torch.manual_seed(0)
        encoder = load_dual_encoder(path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            if parameter.ndim > 1:  # as initialised, some towers hardly depend on their input
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return encoder.eval()


@contextmanager
def _small_towers_of_timm(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, timm is given more settings than open_clip gives it."""
    create = timm.create_model
    timm.create_model = lambda *args, **kwargs: create(*args, **{**kwargs, **settings})
    try:
        yield
    finally:
        timm.create_model = create


def families() -> dict[str, list[str]]:
    """The first name of each family -> all names of it, both in open_clip's order."""
    found: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for name in names():
        found.setdefault(first.setdefault(_family(name, build(name, own_images=True)), name), []).append(name)
    return found


def _family(name: str, encoder: DualEncoder) -> str:
    """What a small model has in common with others of its family: parameters, the modules that hold them, settings."""
    small = shrunk(name)
    parameters = [(key, value.ndim) for key, value in encoder.model.state_dict().items()]
    holders = [type(module).__name__ for module in encoder.modules() if list(module.parameters(recurse=False))]
    config = copy.deepcopy(small.model_cfg)
    for part, ignored in (
        (config, ("quick_gelu", "init_logit_bias")),
        (config["text_cfg"], ("act_kwargs", "norm_kwargs", "hf_model_name")),
        (
            config["vision_cfg"],
            ("timm_model_name", "timm_drop_path", "timm_drop", "timm_model_pretrained", "patch_size"),
        ),
    ):
        for key in ignored:
            part.pop(key, None)
    if config["text_cfg"].get("no_causal_mask") is False:  # open_clip's default
        del config["text_cfg"]["no_causal_mask"]
    return json.dumps([parameters, holders, config, small.text], sort_keys=True)


@dataclass(frozen=True)
class Survey:
    """What works with a model.

    Attributes:
        towers: the classes of image and text tower.
        places: what the image tower passes on: tokens, or feature maps, which have a layer after the last block, too.
        layers: the image and the text tower's, at which they can be taken, in words.
        refusals: the methods that raise an UnsupportedTowerError -> its message.
        checkpointing: "yes", or why it does not train with gradient checkpointing.
    """

    towers: tuple[str, str]
    places: str
    layers: tuple[str, str]
    refusals: dict[str, str]
    checkpointing: str


def survey(name: str) -> Survey:
    """What works with the model of a name, made small.

    Raises:
        AssertionError: a tower gets no gradient, or others with checkpointing.
        Exception: whatever a layer, a method or a training step raises that is no UnsupportedTowerError.
    """
    encoder = build(name)
    takes: tuple[Callable[[int], TowerAtLayer], ...] = (encoder.image_at_layer, encoder.text_at_layer)
    images, text = (_layers(take) for take in takes)
    refusals = {}
    for method in METHODS:
        refusal = _refusal(encoder, method)
        if refusal is not None:
            refusals[method] = refusal
    places = "feature maps" if encoder.image_at_layer().is_feature_map else "tokens"
    return Survey(_towers(encoder), places, (images, text), refusals, _training(name))


def _towers(encoder: DualEncoder) -> tuple[str, str]:
    visual, text = encoder.model.visual, getattr(encoder.model, "text", encoder.model)
    image = f"timm's {type(visual.trunk).__name__}" if hasattr(visual, "trunk") else type(visual).__name__
    if hasattr(text, "config"):
        return image, f"Hugging Face's {text.config.model_type}"
    return image, "TextTransformer"


def _layers(take: Callable[[int], TowerAtLayer]) -> str:
    last = take(-1)
    able = 0
    layers = [*last.layers, *([last.layers.stop] if last.is_feature_map else [])]
    for layer in layers:
        with suppress(UnsupportedTowerError):
            take(layer)
            able += 1
    return "all" if able == len(layers) else f"{able} of {len(layers)}"


def _pairs(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, *encoder.image_shape, generator=torch.Generator().manual_seed(1))
    return images, encoder.tokenizer.encode(["a dog on a red mat", "two cats"])


def _refusal(encoder: DualEncoder, method: str) -> str | None:
    """The words in which a method refuses a model; None where it explains it."""
    make: Any = METHODS[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantMapWarning)
        try:
            made: AttributionMethod = make(encoder, **METHOD_OPTIONS.get(method, {}))
            made.attribute(*_pairs(encoder))
        except UnsupportedTowerError as error:
            return str(error)
    return None


def _training(name: str) -> str:
    """Take a step, and one with gradient checkpointing from the same weights: "yes", or why there is no such."""
    gradients = _step(ContrastiveModule(build(name)))
    try:
        module = ContrastiveModule(build(name), gradient_checkpointing=True)
    except UnsupportedTowerError as error:
        return str(error)
    except ValueError as error:
        if "batch statistics" not in str(error):
            raise
        return "batch statistics"
    again = _step(module)
    assert again.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-3, atol=1e-6)
    return "yes"


def _step(module: ContrastiveModule) -> dict[str, Tensor]:
    """The gradients of one step of training, by the names of the parameters."""
    encoder = module.encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    images, tokens = _pairs(encoder)
    torch.manual_seed(3)  # of dropout
    image, text = (normalize(x, dim=1) for x in encoder(images, encoder.trim_tokens(tokens)))
    loss, _ = global_contrastive_loss(image, text, encoder.logit_scale.exp(), torch.ones(len(images), dtype=torch.bool))
    torch.autograd.backward(loss)
    optimizer.step()
    encoder.clamp_logit_scale(module.max_logit_scale)
    gradients = {key: p.grad for key, p in encoder.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for tower in (True, False):
        assert any(gradient.any() for key, gradient in gradients.items() if key.startswith("model.visual.") is tower)
    return gradients


HEADER = (
    "| Image tower | Text tower | Models | Layers | Methods | Gradient checkpointing |",
    "|---|---|---|---|---|---|",
)


def row(members: Sequence[str], found: Survey) -> str:
    """The table's row of a family."""
    layers = "all" if set(found.layers) == {"all"} else f"image {found.layers[0]}, text {found.layers[1]}"
    methods = "all" if not found.refusals else f"all but {', '.join(f'`{name}`' for name in found.refusals)}"
    cells = (
        f"{found.towers[0]} ({found.places})",
        found.towers[1],
        ", ".join(f"`{name}`" for name in members),
        layers,
        methods,
        found.checkpointing if found.checkpointing in ("yes", "batch statistics") else "no",
    )
    return f"| {' | '.join(cells)} |"


def reasons(surveys: Iterable[Survey]) -> list[str]:
    """Why methods, and gradient checkpointing, refuse a model: each sentence once."""
    found: dict[str, None] = {}
    for each in surveys:
        found |= {f"- `{method}`: {message}.": None for method, message in each.refusals.items()}
        if each.checkpointing not in ("yes", "batch statistics"):
            found[f"- Gradient checkpointing: {each.checkpointing}."] = None
    return list(found)


def page() -> str:
    """Table, reasons and exclusions."""
    surveys = {first: (members, survey(first)) for first, members in families().items()}
    excluded = [f"- `{name}`: {reason}." for name, reason in EXCLUDED.items()] or ["- none"]
    lines = [
        *HEADER,
        *(row(members, found) for members, found in surveys.values()),
        "",
        "What refuses says why:",
        "",
        *reasons(found for _, found in surveys.values()),
        "",
        "Names of open_clip that are not in the table, and why:",
        "",
        *excluded,
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into its page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write it to {PAGE.relative_to(PAGE.parents[2])}")
    options = parser.parse_args()
    table = f"{BEGIN}\n{page()}\n{END}"
    if not options.write:
        print(table)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + table + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
