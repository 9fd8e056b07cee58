"""Low-rank adapters: what is trained, what is read back, and that everything sees the model that was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import random_pairs
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training_runs import Recorder, batches_of, task_of, trainer_in

from lightning_xai.attribution import METHODS
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.fingerprint import weights_fingerprint
from lightning_xai.training import ContrastiveFineTuning, Lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

ArchitectureFile = Callable[[str], Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "feature_pair": {"steps": 8, "rule": "midpoint"},
    "integrated_gradients": {"steps": 4},
    "kernel_shap": {"image_samples": 40, "text_samples": 40},
    "rise": {"image_masks": 4, "text_masks": 4},
    "banzhaf_pairs": {"image_samples": 64, "text_samples": 64},
}


def trained(task: ContrastiveFineTuning) -> list[str]:
    """Names of the parameters that learn, without the encoder's own prefix."""
    return [name for name, value in task.encoder.model.named_parameters() if value.requires_grad]


def with_random_adapters(task: ContrastiveFineTuning) -> ContrastiveFineTuning:
    """The task as after training: B is not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in task.encoder.named_parameters():
            if name.endswith("lora_B"):
                value.normal_(std=0.2, generator=generator)
    return task


def merged(task: ContrastiveFineTuning, path: Path) -> DualEncoder:
    """The encoder as it is read from the task's checkpoint."""
    checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return load_dual_encoder(path).eval()


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_new_adapters_leave_the_model_as_it_is_bit_for_bit(targets: Any, architecture_file: ArchitectureFile) -> None:
    plain = task_of(architecture_file("vit"))
    adapted = task_of(architecture_file("vit"), lora=Lora(targets=targets))
    images, tokens = random_pairs(plain.encoder)
    for expected, found in zip(plain.encoder(images, tokens), adapted.encoder(images, tokens), strict=True):
        assert torch.equal(expected, found)
    with torch.no_grad():  # torch's attention takes another way
        batch = plain.eval().encoder(images, tokens), adapted.eval().encoder(images, tokens)
    assert all(torch.equal(expected, found) for expected, found in zip(*batch, strict=True))
    assert weights_fingerprint(plain.encoder.model) == weights_fingerprint(adapted.encoder.model)
