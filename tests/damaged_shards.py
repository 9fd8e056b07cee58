"""Shards that are really damaged, in every way that is told apart, and a model that reads what is left."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from captioned_shards import TRANSFORM, make_shards
from lightning.pytorch import LightningModule

from lightning_xai.data.batch import Batch
from lightning_xai.data.excluded import ExcludedByShard
from lightning_xai.data.spans import CaptionTokenizer

Members = list[tuple[str, bytes]]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.tar"


def damage_image(folder: Path, shard: int, record: int) -> None:
    """Flip bits in the middle of a JPEG's header, where it says how it is coded."""
    path = shard_path(folder, shard)
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
        begin = images[record].offset_data
    data = bytearray(path.read_bytes())
    for position in range(begin + 2, begin + 300):
        data[position] ^= 0xFF
    path.write_bytes(data)


def drop_json(folder: Path, shard: int, record: int) -> None:
    """Remove the .json member of a record; the manifest knows the new file."""

    def change(members: Members) -> Members:
        gone = [name for name, _ in members if name.endswith(".json")][record]
        return [member for member in members if member[0] != gone]

    rewrite(folder, shard, change)


def duplicate_key(folder: Path, shard: int, first: int, second: int) -> None:
    """Give a record the key of another one, not its neighbour; the manifest knows the new file."""

    def change(members: Members) -> Members:
        keys = list(dict.fromkeys(name.partition(".")[0] for name, _ in members))
        parts = [(name.partition("."), data) for name, data in members]
        new = {keys[second]: keys[first]}
        return [(f"{new.get(key, key)}.{extension}", data) for (key, _, extension), data in parts]

    rewrite(folder, shard, change)


def truncate(folder: Path, shard: int, records: int) -> None:
    """Leave so many records whole and nothing of what follows; the file keeps its size, as after a failed copy."""
    path = shard_path(folder, shard)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        names = [member for member in tar]
    begin = names[2 * records].offset + 100  # in the middle of the next header
    path.write_bytes(whole[:begin].ljust(len(whole), b"\0"))


def rewrite(folder: Path, shard: int, change: Callable[[Members], Members]) -> None:
    """Write a shard anew with other members, and its size and hash into the manifest."""
    path = shard_path(folder, shard)
    with tarfile.open(path) as tar:
        members = [(member.name, read(tar, member)) for member in tar]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(entry for entry in manifest["shards"] if entry["name"] == path.name)
    entry |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def make_damaged(folder: Path) -> Path:
    """60 samples in 6 shards of 10, all but the first damaged; the last is still there, for a test to delete."""
    make_shards(folder, 60)
    damage_image(folder, 1, 3)
    drop_json(folder, 2, 5)
    duplicate_key(folder, 3, 2, 7)
    truncate(folder, 4, 6)
    return folder


DAMAGE: ExcludedByShard = Counter(
    {
        ("shard-000001.tar", "corrupt image"): 1,
        ("shard-000002.tar", "member without its pair"): 1,
        ("shard-000003.tar", "duplicate key"): 1,
        ("shard-000004.tar", "unreadable shard"): 4,
        ("shard-000005.tar", "missing shard"): 10,
    }
)
"""What is wrong with `make_damaged`'s shards once the last is deleted."""


class Reader(LightningModule):
    """Looks at every batch, and learns a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        tokenizer = CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))
        self.encoder = SimpleNamespace(image_transform=TRANSFORM, tokenizer=tokenizer)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/mean", batch.images.mean(), batch_size=len(batch.images), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/mean", batch.images.mean(), batch_size=len(batch.images), sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        return batch.keys

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
