"""Small dual encoders of transformers on disk, made of its own classes; importing it skips where it lacks."""

from __future__ import annotations

import json
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


def save_openai_tokenizer(folder: Path, length: int) -> None:
    """CLIP's tokenizer, from open_clip's vocabulary; padded with the mark of the end, as OpenAI's folders are."""
    simple = open_clip.SimpleTokenizer()
    named = {simple.decoder[49406]: "<|startoftext|>", simple.decoder[49407]: "<|endoftext|>"}
    vocabulary = {named.get(token, token): number for token, number in simple.encoder.items()}
    source = folder / "vocabulary"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(source, model_max_length=length)
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
