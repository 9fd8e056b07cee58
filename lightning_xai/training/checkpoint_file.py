"""Checkpoint files that are complete or absent, and never unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_xai.atomic_file import replaced_at_once

__all__ = ["AtomicCheckpointIO", "CheckpointWriteError", "NonFiniteStateError", "damage"]


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the file that it should replace is untouched.

    Attributes:
        on_all_ranks: raised on every rank, so that one message is enough.
    """

    on_all_ranks = True


class NonFiniteStateError(CheckpointWriteError):
    """A state that is not finite was to be saved."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a hidden file in the same folder, flushes it to the disk, and renames it.

    Lightning writes to the system's temporary folder first, which may be on another disk: there the rename is a copy,
    and a job that is killed during it leaves half a file under the final name. Addresses of object stores (`s3://...`),
    which have no half-written objects, are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, all or nothing.

        Raises:
            CheckpointWriteError: it could not be written (a full disk, a folder without permission).
            NonFiniteStateError: weights or the optimizer's averages are NaN or infinite.
        """
        if spoiled := _not_finite(checkpoint):
            raise NonFiniteStateError(
                f"{spoiled} is not finite, so {path} is not written, and earlier checkpoints are untouched: lower the "
                "learning rate or clip gradients (--trainer.gradient_clip_val), and go on from an earlier checkpoint"
            )
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replaced_at_once(Path(path), durable=True) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise CheckpointWriteError(
                f"checkpoint {path} could not be written ({error}); earlier checkpoints are untouched: make room or "
                "fix the permissions of the folder, and start the same command again"
            ) from error

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain values only, whatever `weights_only` says.

        Raises:
            ValueError: it is damaged, or holds objects that would have to be unpickled.
        """
        try:
            checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # on damaged files the unpickler raises errors of any type
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {reason}); give another one"
            ) from error
        return checkpoint


def _not_finite(checkpoint: dict[str, Any]) -> str:
    """Name of a tensor of the state that no training can go on from; empty if there is none."""
    state = dict(checkpoint.get("state_dict") or {})
    for optimizer in checkpoint.get("optimizer_states") or []:
        for number, values in optimizer.get("state", {}).items():
            if isinstance(values, dict):
                state |= {f"{name} of parameter {number} in the optimizer": value for name, value in values.items()}
    for name, value in state.items():
        # -inf alone is what masks hold.
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not (value < torch.inf).all():
            return str(name)
    return ""


def damage(path: Path) -> str:
    """Reason why a checkpoint file is not as it was written; empty if it is intact. Reads all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return "" if broken is None else f"its part {broken} has a wrong checksum"
