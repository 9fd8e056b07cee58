"""The Trainer of a run: one folder for its files, and checkpoints that are written for all ranks or fail for all."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_xai.training.checkpoint_file import CheckpointWriteError
from lightning_xai.training.run_loggers import has_own_folder

__all__ = ["RunTrainer"]


class RunTrainer(Trainer):
    """Lightning's Trainer, whose files lie in one folder whatever loggers a run has."""

    @property
    def log_dir(self) -> str | None:
        """The folder of this start: that of TensorBoard's or CSV's logger, or else `default_root_dir`."""
        return super().log_dir if self.loggers and has_own_folder(self.loggers[0]) else str(self.default_root_dir)

    @override
    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Write a checkpoint; every rank has to call this.

        Raises:
            CheckpointWriteError: (on all ranks) one of them, mostly rank 0, could not write its part. That one raises
                its own error; the others would otherwise wait for it until the process group times out.
        """
        if self.model is None or not (dist.is_available() and dist.is_initialized()):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        failure: Exception | None = None
        with self.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
            checkpoint = self._checkpoint_connector.dump_checkpoint(weights_only)
            try:
                self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            except Exception as error:
                failure = error
            texts: list[str | None] = [None] * dist.get_world_size()
            # A barrier as well: no rank goes on before the file is there.
            dist.all_gather_object(texts, None if failure is None else str(failure) or type(failure).__name__)
        if failure is not None:
            raise failure
        for rank, text in enumerate(texts):
            if text is not None:
                raise CheckpointWriteError(f"rank {rank} could not save: {text}")
