"""Checks whether a folder of shards holds what its manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lightning_xai.data.faults import UNREADABLE_SHARD, WRONG_CHECKSUM, Fault
from lightning_xai.data.shard_store import ShardStore
from lightning_xai.data.shards import ShardEntry

__all__ = ["find_wrong_checksums"]

_BLOCK = 1 << 20


def find_wrong_checksums(store: ShardStore, shards: Iterable[ShardEntry]) -> list[Fault]:
    """The shards that cannot be read, or whose content has another SHA-256 than the manifest states."""
    return [fault for entry in shards if (fault := _find_wrong_checksum(store, entry)) is not None]


def _find_wrong_checksum(store: ShardStore, entry: ShardEntry) -> Fault | None:
    digest = hashlib.sha256()
    try:
        with store.open(entry.name, entry.bytes) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return Fault(-1, UNREADABLE_SHARD, f"{entry.name} cannot be read ({error})")
    if digest.hexdigest() == entry.sha256:
        return None
    message = f"{entry.name} has the SHA-256 {digest.hexdigest()[:16]}..., not {entry.sha256[:16]}..."
    return Fault(-1, WRONG_CHECKSUM, message)
