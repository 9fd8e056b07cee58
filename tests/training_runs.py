"""Short trainings on batches that are made by hand, and what a run does at each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from quiet_trainer import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_xai.data import Batch, Manifest
from lightning_xai.data.batch import Record, TrainingCollate
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.training import ContrastiveFineTuning


def task_of(config: str | Path, **options: Any) -> ContrastiveFineTuning:
    """A task with the small random model of a config, the same one each time."""
    torch.manual_seed(0)
    return ContrastiveFineTuning(str(config), None, **({"initial_lr": 1e-3, "final_lr": 1e-2} | options))


def trainer_in(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    steps = {"num_sanity_val_steps": 0, "use_distributed_sampler": False, "log_every_n_steps": 1}
    return quiet_trainer(folder, *callbacks, **(steps | {"inference_mode": False} | options))


def records_of(folder: Path, count: int) -> list[Record]:
    manifest = Manifest.load(folder)
    return list(read_samples(folder, manifest, range(len(manifest.shards)), 0, count))


def loader_of(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type] # a list is a data set


def batches_of(task: ContrastiveFineTuning, folder: Path, count: int, size: int) -> DataLoader[Batch]:
    """Training batches of consecutive samples."""
    collate = TrainingCollate(task.encoder.image_transform, task.encoder.tokenizer)
    records = records_of(folder, count * size)
    return loader_of([collate(records[start : start + size]) for start in range(0, count * size, size)])


def whole(gradient: Tensor) -> Tensor:
    """A copy of a gradient, put together where it is spread over processes."""
    full = getattr(gradient, "full_tensor", None)
    together: Tensor = gradient if full is None else full()
    return together.clone()


class Recorder(Callback):
    """What a run does at each optimizer step and logs at each batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []
        self.optimizer: Any = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append({name: whole(p.grad) for name, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
