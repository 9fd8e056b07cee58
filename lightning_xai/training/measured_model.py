"""Say and record which model an evaluation measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import msgspec
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_xai.atomic_file import write_json
from lightning_xai.training.run_folder import RunModel

__all__ = ["MeasuredModel", "describe_measured"]


class MeasuredModel(Callback):
    """Prints which checkpoint `validate`, `test` or `predict` takes, and writes it to `model.json` next to the results.

    Args:
        model: the checkpoint.
    """

    def __init__(self, model: RunModel) -> None:
        self.model = model

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say it before anything is computed."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on all ranks: they agree on it
        if trainer.is_global_zero:
            print(f"Model: {self.model}", flush=True)  # noqa: T201 - which model the numbers are about
            write_json(folder / "model.json", msgspec.to_builtins(self.model))


def describe_measured(trainer: L.Trainer) -> dict[str, Any]:
    """The `checkpoint` that an evaluation measures, for the description of a model; empty where it takes none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = next((each.model for each in callbacks if isinstance(each, MeasuredModel)), None)
    if known is not None:
        return {"checkpoint": msgspec.to_builtins(known)}
    path = None if trainer.state.fn == TrainerFn.FITTING else trainer.ckpt_path
    return {"checkpoint": {"path": str(path), "choice": "file"}} if path else {}
