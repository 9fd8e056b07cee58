"""Small dual encoders of transformers on disk, made of its own classes; importing it skips where it lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from lightning_xai.models import DualEncoder

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [hf]")
transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")

CAPTIONS = ["two red rings and a blue square", "a dog", "the small green star is left of it"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
}  # fmt: skip
PIXELS: dict[str, Any] = {"image_size": 32, "patch_size": 8}


def save_clip(encoder: DualEncoder, folder: Path) -> Path:
    """An open_clip ViT as the `CLIPModel` of equal weights, in a folder as OpenAI's."""
    cfg = encoder.architecture["model_cfg"]
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    activation = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    config = transformers.CLIPConfig(
        projection_dim=cfg["embed_dim"],
        vision_config={
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "hidden_act": activation,
            "num_attention_heads": vision["width"] // vision["head_width"], "num_hidden_layers": vision["layers"],
            "image_size": vision["image_size"], "patch_size": vision["patch_size"],
        },
        text_config={
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "hidden_act": activation,
            "num_attention_heads": text["heads"], "num_hidden_layers": text["layers"], "eos_token_id": 49407,
            "bos_token_id": 49406, "pad_token_id": 49407, "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
        },
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    own = encoder.model.state_dict()
    state = {
        "logit_scale": own["logit_scale"],
        "visual_projection.weight": own["visual.proj"].T,
        "text_projection.weight": own["text_projection"].T,
        "vision_model.embeddings.class_embedding": own["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": own["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": own["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": own["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": own["positional_embedding"],
    }
    for part in ("weight", "bias"):
        state[f"vision_model.pre_layrnorm.{part}"] = own[f"visual.ln_pre.{part}"]
        state[f"vision_model.post_layernorm.{part}"] = own[f"visual.ln_post.{part}"]
        state[f"text_model.final_layer_norm.{part}"] = own[f"ln_final.{part}"]
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        for layer in range(cfg["vision_cfg" if prefix else "text_cfg"]["layers"]):
            state |= _block(f"{tower}.encoder.layers.{layer}.", own, f"{prefix}transformer.resblocks.{layer}.")
    # transformers 4 had one module more around the towers' lists in some classes; the names of its state say so.
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("position_ids") for key in missing.missing_keys)
    model.save_pretrained(folder)
    size = vision["image_size"]
    save_processor(folder, "CLIPImageProcessor", size={"shortest_edge": size}, crop_size=size)
    save_openai_tokenizer(folder, text["context_length"])
    return folder


def _block(to: str, own: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    state = {}
    for part in ("weight", "bias"):
        for name, value in zip("qkv", own[f"{source}attn.in_proj_{part}"].chunk(3), strict=True):
            state[f"{to}self_attn.{name}_proj.{part}"] = value
        for name, old in {
            "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        }.items():  # fmt: skip
            state[f"{to}{name}.{part}"] = own[f"{source}{old}.{part}"]
    return state


def save_siglip(encoder: DualEncoder, folder: Path) -> Path:
    """An open_clip SigLIP, with timm's image tower, as the `SiglipModel` of equal weights."""
    cfg, own = encoder.architecture["model_cfg"], encoder.model.state_dict()
    trunk, text = encoder.model.visual.trunk, cfg["text_cfg"]
    size, patch = encoder.image_transform.size[0], trunk.patch_embed.patch_size[0]
    config = transformers.SiglipConfig(
        vision_config={
            "hidden_size": trunk.embed_dim, "intermediate_size": 4 * trunk.embed_dim, "hidden_act": "gelu",
            "num_attention_heads": trunk.attn_pool.num_heads, "num_hidden_layers": len(trunk.blocks),
            "image_size": size, "patch_size": patch,
        },
        text_config={
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "hidden_act": "gelu",
            "num_attention_heads": text["heads"], "num_hidden_layers": text["layers"], "layer_norm_eps": 1e-5,
            "vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"],
            "projection_size": cfg["embed_dim"], "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0,
        },
    )  # fmt: skip
    model = transformers.SiglipModel(config)
    state = {
        "logit_scale": own["logit_scale"].reshape(1),
        "logit_bias": own["logit_bias"].reshape(1),
        "vision_model.embeddings.position_embedding.weight": own["visual.trunk.pos_embed"][0],
        "vision_model.head.probe": own["visual.trunk.attn_pool.latent"],
        "text_model.embeddings.token_embedding.weight": own["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": own["text.positional_embedding"],
    }
    pool = "visual.trunk.attn_pool."
    for part in ("weight", "bias"):
        state[f"vision_model.head.attention.in_proj_{part}"] = torch.cat(
            [own[f"{pool}q.{part}"], own[f"{pool}kv.{part}"]]
        )
        for name, old in {
            "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
            "vision_model.post_layernorm": "visual.trunk.norm", "vision_model.head.attention.out_proj": f"{pool}proj",
            "vision_model.head.layernorm": f"{pool}norm", "vision_model.head.mlp.fc1": f"{pool}mlp.fc1",
            "vision_model.head.mlp.fc2": f"{pool}mlp.fc2", "text_model.final_layer_norm": "text.ln_final",
            "text_model.head": "text.text_projection",
        }.items():  # fmt: skip
            state[f"{name}.{part}"] = own[f"{old}.{part}"]
        for layer in range(len(trunk.blocks)):
            to, source = f"vision_model.encoder.layers.{layer}.", f"visual.trunk.blocks.{layer}."
            for name, value in zip("qkv", own[f"{source}attn.qkv.{part}"].chunk(3), strict=True):
                state[f"{to}self_attn.{name}_proj.{part}"] = value
            for name, old in {
                "self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2",
                "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
            }.items():  # fmt: skip
                state[f"{to}{name}.{part}"] = own[f"{source}{old}.{part}"]
    for layer in range(text["layers"]):
        state |= _block(f"text_model.encoder.layers.{layer}.", own, f"text.transformer.resblocks.{layer}.")
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("position_ids") for key in missing.missing_keys)
    model.save_pretrained(folder)
    save_processor(folder, "SiglipImageProcessor", size={"height": size, "width": size})
    save_openai_tokenizer(folder, text["context_length"], padding="!")  # whose number is 0, as open_clip pads
    return folder


def save_openai_tokenizer(folder: Path, length: int, padding: str = "<|endoftext|>") -> None:
    """CLIP's tokenizer, from open_clip's vocabulary; padded with the mark of the end, as OpenAI's folders are."""
    simple = open_clip.SimpleTokenizer()
    named = {simple.decoder[49406]: "<|startoftext|>", simple.decoder[49407]: "<|endoftext|>"}
    vocabulary = {named.get(token, token): number for token, number in simple.encoder.items()}
    source = folder / "vocabulary"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(source, model_max_length=length, pad_token=padding)
    tokenizer.save_pretrained(folder)


def save_word_tokenizer(folder: Path, length: int, *, padding: str = "<pad>") -> int:
    """A tokenizer with one token for each word of the captions; returns the size of its vocabulary."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()} | {"b"})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": padding}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **named).save_pretrained(
        folder
    )
    return len(vocabulary)


def save_letter_tokenizer(folder: Path, length: int) -> int:
    """SigLIP 2's own tokenizer class, with one token for each letter; transformers takes no other with that model."""
    letters = sorted({letter for caption in CAPTIONS for letter in caption if letter != " "} | {"▁"})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])}
    transformers.Siglip2Tokenizer(
        vocab=vocabulary, merges=[], model_max_length=length, padding_side="right"
    ).save_pretrained(folder)
    return len(vocabulary)


def save_siglip_tokenizer(folder: Path, length: int) -> int:
    """SigLIP's own tokenizer class, which reads a sentencepiece model and cleans captions."""
    trainer = pytest.importorskip("sentencepiece", reason="needs the extra [hf]").SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(CAPTIONS * 20), model_prefix=str(folder / "spiece"), vocab_size=60, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = transformers.SiglipTokenizer(vocab_file=str(folder / "spiece.model"), model_max_length=length)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_processor(folder: Path, kind: str, **settings: Any) -> None:
    getattr(transformers, kind)(**settings).save_pretrained(folder)


def randomise(model: nn.Module) -> None:
    """Replace what initialisation leaves small, at zero or at one, where mistakes would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
            elif not name.startswith(("logit", "temperature")):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)


_TEXT = {**WIDTHS, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_SMOOTH = {"hidden_act": "gelu"}  # so that quadrature converges fast
_SQUASH = {"size": {"height": 32, "width": 32}}
_CROP = {"size": {"shortest_edge": 32}, "crop_size": 32}


def _vision_text(vocabulary: int) -> Any:
    vision = transformers.ViTConfig(**WIDTHS, **PIXELS, **_SMOOTH)
    text = transformers.BertConfig(**_TEXT, **_SMOOTH, vocab_size=vocabulary)
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)


def _two(kind: str, text: dict[str, Any], vision: dict[str, Any], **both: Any) -> Any:
    def build(vocabulary: int) -> Any:
        config = getattr(transformers, kind)
        return config(text_config={**text, "vocab_size": vocabulary}, vision_config=vision, **both)

    return build


_ALIGN_VISION: dict[str, Any] = {
    "in_channels": [32, 8, 12], "out_channels": [8, 12, 16], "kernel_sizes": [3, 3, 3], "strides": [1, 2, 2],
    "num_block_repeats": [1, 1, 1], "expand_ratios": [1, 4, 4], "depthwise_padding": [], "width_coefficient": 1.0,
    "depth_coefficient": 1.0, "depth_divisor": 4, "hidden_dim": 16, "hidden_act": "swish",
}  # fmt: skip
# Class of the model -> its configuration for a vocabulary, its image processor, and the tokenizer's padding.
MODELS: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "CLIPModel": (
        _two("CLIPConfig", _TEXT | _SMOOTH, WIDTHS | PIXELS | _SMOOTH, projection_dim=24),
        "CLIPImageProcessor", _CROP, "<pad>",
    ),
    "SiglipModel": (
        _two("SiglipConfig", _TEXT | {"max_position_embeddings": 16, "projection_size": 32}, WIDTHS | PIXELS),
        "SiglipImageProcessor", _SQUASH, "</s>",
    ),
    "Siglip2Model": (
        _two(
            "Siglip2Config", _TEXT | {"max_position_embeddings": 40, "projection_size": 32},
            WIDTHS | {"patch_size": 8, "num_patches": 16},
        ),
        "Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 16}, "<pad>",
    ),
    "ChineseCLIPModel": (
        _two("ChineseCLIPConfig", _TEXT | _SMOOTH, WIDTHS | PIXELS | _SMOOTH, projection_dim=24),
        "ChineseCLIPImageProcessor", _SQUASH | {"do_center_crop": False}, "<pad>",
    ),
    "AltCLIPModel": (
        _two("AltCLIPConfig", _TEXT | _SMOOTH | {"project_dim": 20}, WIDTHS | PIXELS | _SMOOTH, projection_dim=24),
        "CLIPImageProcessor", _CROP, "<pad>",
    ),
    "MetaClip2Model": (
        _two("MetaClip2Config", _TEXT | _SMOOTH, WIDTHS | PIXELS | _SMOOTH, projection_dim=24),
        "CLIPImageProcessor", _CROP, "<pad>",
    ),
    "AlignModel": (
        _two("AlignConfig", _TEXT | _SMOOTH, _ALIGN_VISION, projection_dim=16),
        "EfficientNetImageProcessor",
        {"size": {"height": 38, "width": 38}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
        "<pad>",
    ),
    "VisionTextDualEncoderModel": (_vision_text, "ViTImageProcessor", _SQUASH, "<pad>"),
}  # fmt: skip


def save_small(kind: str, folder: Path, save_tokenizer: Callable[[Path, int], int] | None = None) -> Path:
    """A small model of a class with random weights, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config, processor, pixels, padding = MODELS[kind]
    own = kind == "Siglip2Model" and hasattr(transformers, "Siglip2Tokenizer")
    if own:
        vocabulary = save_letter_tokenizer(folder, 40)
    elif save_tokenizer is not None:
        vocabulary = save_tokenizer(folder, 18)
    else:
        vocabulary = save_word_tokenizer(folder, 18, padding=padding)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config(vocabulary))
    randomise(model)
    model.eval().save_pretrained(folder)
    save_processor(folder, processor, **pixels)
    return folder
