"""Checks whether a folder of shards holds what its manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lightning_xai.data.faults import WRONG_CHECKSUM, Fault
from lightning_xai.data.shards import ShardEntry

__all__ = ["find_wrong_checksums"]

_BLOCK = 1 << 20


def find_wrong_checksums(folder: Path, shards: Iterable[ShardEntry]) -> list[Fault]:
    """The shards whose content has another SHA-256 than the manifest states."""
    return [fault for entry in shards if (fault := _find_wrong_checksum(folder / entry.name, entry)) is not None]


def _find_wrong_checksum(path: Path, entry: ShardEntry) -> Fault | None:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() == entry.sha256:
        return None
    message = f"{entry.name} has the SHA-256 {digest.hexdigest()[:16]}..., not {entry.sha256[:16]}..."
    return Fault(-1, WRONG_CHECKSUM, message)
