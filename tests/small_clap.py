"""A small CLAP with random weights on disk, made of transformers' own classes; importing it skips where they lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [audio]")
transformers = pytest.importorskip("transformers", reason="needs the extra [audio]")

CAPTIONS = ["a dog barks", "two loud bells ring in the rain"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
RATE = 1000
FRAMES, BANDS, STRIPS = 63, 16, 2
# The tower interpolates 63 frames to 64 and folds them into two strips of 32 frames by 16 bands: a square of 32.
AUDIO: dict[str, Any] = {
    "spec_size": 32, "num_mel_bins": BANDS, "patch_size": 4, "patch_stride": (4, 4), "window_size": 2,
    "patch_embeds_hidden_size": 8, "depths": (2, 2), "num_attention_heads": (2, 4), "num_hidden_layers": 2,
    "hidden_size": 16,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 20,
}  # fmt: skip
EXTRACTOR: dict[str, Any] = {
    "feature_size": BANDS, "sampling_rate": RATE, "hop_length": 16, "max_length_s": 1, "fft_window_size": 64,
    "frequency_min": 0, "frequency_max": 500,
}  # fmt: skip
FUSED = {"enable_fusion": True, "fusion_type": "aff_2d"}


def save_clap(folder: Path, *, fused: bool = False, **audio: Any) -> Path:
    """A CLAP with random weights in a folder, as `save_pretrained` writes it."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()} | {"b"})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    names = [f"{name}_token" for name in ("bos", "pad", "eos", "unk")]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True))
    ).save_pretrained(folder)
    config = transformers.ClapConfig(
        text_config=TEXT | {"vocab_size": len(vocabulary)},
        audio_config=AUDIO | (FUSED if fused else {}) | audio,
        projection_dim=6,
        projection_hidden_act="gelu",  # smooth, so that quadrature converges fast
    )
    torch.manual_seed(0)
    model = transformers.ClapModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            elif not name.startswith("logit_scale"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        norm = model.audio_model.audio_encoder.batch_norm
        norm.running_mean.copy_(torch.randn(BANDS, generator=generator) * 5 - 40)
        norm.running_var.copy_(torch.rand(BANDS, generator=generator) * 200 + 300)
    model.save_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor(**EXTRACTOR, truncation="fusion" if fused else "rand_trunc")
    extractor.save_pretrained(folder)
    return folder


def tone(hertz: float, start: float = 0.0, stop: float = 1.0) -> np.ndarray:
    """One second of which a part sounds."""
    time = np.arange(RATE) / RATE
    wave: np.ndarray = np.sin(2 * np.pi * hertz * time) * ((time >= start) & (time < stop))
    return wave
