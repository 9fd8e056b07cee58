"""The trainer of short tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


def quiet_trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    """One epoch on one CPU process; it shows nothing, and writes only what its callbacks write."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**(defaults | options))
