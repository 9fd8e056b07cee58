"""Checkpoint files that are whole or not there: written beside their place and renamed, never unpickled."""

from __future__ import annotations

import os
import uuid
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

__all__ = ["AtomicCheckpointIO", "CheckpointWriteError", "damage", "put_in_place"]


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; what was in its place before is untouched."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a hidden file in the same folder, forces it to the disk, and renames it.

    Lightning's own way writes to the system's temporary folder first, which may lie on another disk: there the rename
    is a copy, and a job that is killed during it leaves half a file under the final name. Addresses of object stores
    (`s3://...`), which know no half-written objects, are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, all or nothing.

        Raises:
            CheckpointWriteError: it could not be written (a full disk, a folder without permission).
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own
            with suppress(OSError):  # what stopped the writing may stop this, too
                partial.unlink(missing_ok=True)
            raise CheckpointWriteError(
                f"checkpoint {target} could not be written ({error}); earlier checkpoints are untouched: make room or "
                "mend the permissions of the folder, and start the same command again"
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
        except Exception as error:  # the unpickler raises what it likes on damaged files
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {reason}); give another one"
            ) from error
        return checkpoint


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a file that is complete, so that it has its new name also after a power cut."""
    partial.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def damage(path: Path) -> str:
    """Why a checkpoint file is not as it was written; empty where it is whole. Reads all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return "" if broken is None else f"its part {broken} has a wrong checksum"
