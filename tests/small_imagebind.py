"""A small ImageBind with random weights, of the package's own class; importing it skips where that lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_xai.models.imagebind import _package

pytest.importorskip("transformers", reason="needs the extra [imagebind]")
try:
    package = _package()
except ImportError as error:
    pytest.skip(f"needs the extra [imagebind]: {error}", allow_module_level=True)

CAPTIONS = ["a dog barks", "two loud bells ring in the rain"]
SIZES: dict[str, Any] = {
    "out_embed_dim": 12,
    "vision_embed_dim": 32, "vision_num_blocks": 3, "vision_num_heads": 2, "kernel_size": (2, 56, 56),
    "text_embed_dim": 16, "text_num_blocks": 3, "text_num_heads": 2,
    "audio_embed_dim": 24, "audio_num_blocks": 3, "audio_num_heads": 2, "audio_kernel_size": 40, "audio_stride": 30,
    "depth_embed_dim": 8, "depth_kernel_size": 112, "depth_num_blocks": 1, "depth_num_heads": 1,
    "thermal_embed_dim": 8, "thermal_kernel_size": 112, "thermal_num_blocks": 1, "thermal_num_heads": 1,
    "imu_embed_dim": 8, "imu_num_blocks": 1, "imu_num_heads": 1,
}  # fmt: skip
"""Images have 4 x 4 patches, spectrograms 3 x 6, which overlap as in the published model."""


def small_imagebind() -> Any:
    """A model with random weights, large enough that attributions are no rounding."""
    torch.manual_seed(0)
    model = package.ImageBindModel(**SIZES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            elif not name.endswith("log_logit_scale"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model
