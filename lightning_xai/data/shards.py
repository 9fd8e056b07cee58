"""Shards: a data set as plain tar files with a manifest, written once and streamed from any position.

A folder holds `shard-000000.tar`, `shard-000001.tar`, ... and `manifest.json`, which lists each shard with its number
of samples, bytes and SHA-256. The same samples give the same bytes, so that two machines can compare hashes.
Shards may come from anywhere; `shard_reader` is what opens them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TypeAlias

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from webdataset.writer import TarWriter

from lightning_xai.data.excluded import MISSING_SHARD, WRONG_SIZE, Fault
from lightning_xai.data.photo_size import PhotoSize, shrink_all
from lightning_xai.data.sample import RecordError, Sample, encode_sample, is_text, parse_json
from lightning_xai.data.shard_store import Place, ShardStore, open_store

if TYPE_CHECKING:
    from lightning_xai.data.phrases import Transform

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
_EXCLUDED_KEY = "left_out"  # as version 1 of the file calls it: shards that are prepared stay readable

_SHARD_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*\.tar")  # commands take a leading "-" for an option
_LOGGED_RECORDS = 10
_SHOWN_FAULTS = 10
_CHUNK = 1 << 20

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]

_log = logging.getLogger(__name__)


class ShardError(ValueError):
    """A folder of shards that cannot be written or used; the message names the file, what is wrong and the remedy."""


class ShardsExistError(ShardError):
    """The folder to write already holds something."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it.

    Attributes:
        name: file name inside the manifest's folder; letters, digits, `.`, `_` and `-` only, not beginning
            with `-`, ending in `.tar`.
        samples: records in the shard, at least one.
        bytes: size of the file.
        sha256: hash of the file, 64 lower-case hexadecimal digits.

    Raises:
        ShardError: the name could leave the folder or be taken for a command.
    """

    name: str
    samples: Annotated[int, msgspec.Meta(ge=1)]
    bytes: _Count
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

    def __post_init__(self) -> None:
        if not _SHARD_NAME.fullmatch(self.name):
            raise ShardError(
                f"shard name {self.name!r} is not allowed (letters, digits, '.', '_', '-', not beginning with '-', "
                "ending in '.tar', in the manifest's own folder); do not use this manifest unless you know where it "
                "comes from"
            )


@dataclass(frozen=True)
class ResizedPhotos:
    """The photos of a set that was prepared with a short side.

    Attributes:
        short_side: pixels of the shorter side of every photo but the smaller ones.
        jpeg_quality: of the JPEG files that the resized ones are.
        smaller: photos whose shorter side is below it; they are stored as the source has them.
    """

    short_side: Annotated[int, msgspec.Meta(ge=1)]
    jpeg_quality: Annotated[int, msgspec.Meta(ge=1, le=100)]
    smaller: _Count = 0

    def check(self, transform: Transform, where: str) -> None:
        """Refuse a model of larger images than the photos are stored as.

        Raises:
            ValueError: its transform would enlarge them; the message begins with `where` they are.
        """
        side = self.short_side
        needed = round(side * max(transform.geometry((side, side)).scale))
        if needed > side:
            raise ValueError(
                f"{where} holds photos resized to a short side of {side} pixels, and the model's images are resized to "
                f"{needed}: prepare the data with --short_side {needed} or more, or without it"
            )

    def __str__(self) -> str:
        kept = f"; {self.smaller:,} smaller ones as they were" if self.smaller else ""
        return f"photos resized to a short side of {self.short_side} pixels, JPEG quality {self.jpeg_quality}{kept}"


class Manifest(msgspec.Struct, frozen=True, rename={"excluded": _EXCLUDED_KEY}):
    """The content of a folder of shards.

    Attributes:
        name: the data set and split, for people (`"coco-val2017"`).
        shards: in the order in which they were written; a sample's global index counts through them.
        labels: every region label that occurs, sorted.
        excluded: reason -> records of the source that were not written.
        captions: number of captions over all samples.
        masks: number of regions with a mask over all samples.
        photos: how photos were resized; None: they are as the source has them.
        version: version of the manifest's own schema.

    Raises:
        ShardError: no shard, one twice, or labels that are not sorted.
    """

    name: str
    shards: tuple[ShardEntry, ...]
    labels: tuple[str, ...]
    excluded: Mapping[str, _Count]
    captions: _Count
    masks: _Count = 0
    photos: ResizedPhotos | None = None
    version: int = MANIFEST_VERSION

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.shards]
        if not names:
            raise ShardError("no shard is listed")
        if len(set(names)) != len(names):
            raise ShardError("a shard is listed twice")
        if list(self.labels) != sorted(set(self.labels)):
            raise ShardError("'labels' are not sorted texts")
        if not all(map(is_text, (self.name, *self.labels, *self.excluded))):
            raise ShardError("a name, label or reason holds half a character (surrogates not allowed)")

    @property
    def samples(self) -> int:
        """Number of samples over all shards."""
        return sum(entry.samples for entry in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(entry.bytes for entry in self.shards)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for the content of all shards, in their order."""
        return hashlib.sha256("\n".join(entry.sha256 for entry in self.shards).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, place: Place) -> Manifest:
        """`read` a manifest, and check that each shard is there with the size that the manifest states.

        What a store does not know before a shard is read is not checked.

        Raises:
            ShardError: of `read`; or shards are missing or of another size, of which it names the first ten.
        """
        store = open_store(place)
        manifest = cls.read(store)
        refuse_faults(store, manifest, [find_file_fault(store, entry) for entry in manifest.shards])
        return manifest

    @classmethod
    def read(cls, place: Place) -> Manifest:
        """Read and check `manifest.json` alone; `place` as `open_store` takes it.

        Raises:
            ShardError: it is missing or cannot be read; broken JSON, another schema version, a field that is missing
                or of the wrong type, a shard name that leaves the folder.
        """
        store = open_store(place)
        path = store.locate(MANIFEST_NAME)
        try:
            with store.open(MANIFEST_NAME) as stream:
                return parse_json(stream.read(), cls, MANIFEST_VERSION)
        except FileNotFoundError as error:
            raise ShardError(
                f"{path}: not found; check the path, or make the shards with `python -m lightning_xai prepare`"
            ) from error
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error}); check the path, and your access to it") from error
        except ValueError as error:
            raise ShardError(f"{path}: {error}; restore the file or prepare the shards again") from error

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json`; the same manifest gives the same bytes."""
        record = msgspec.to_builtins(self) | {"samples": self.samples}
        # Shards without masks and resized photos keep their manifest's bytes.
        for name in ("masks", "photos"):
            if not record[name]:
                del record[name]
        text = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    def order(self, seed: int, epoch: int) -> list[int]:
        """The permutation of the shards for an epoch; the same wherever seed and epoch are the same (both >= 0)."""
        return [int(shard) for shard in np.random.default_rng((seed, epoch)).permutation(len(self.shards))]


def refuse_faults(store: ShardStore, manifest: Manifest, faults: Iterable[Fault | None]) -> None:
    """Refuse a store of which shards have faults; None is no fault.

    Raises:
        ShardError: there are some; it names the first ten.
    """
    found = sorted(fault.message for fault in faults if fault is not None)
    if found:
        more = f"; and {len(found) - _SHOWN_FAULTS:,} more" if len(found) > _SHOWN_FAULTS else ""
        raise ShardError(
            f"{store}: {len(found):,} of {len(manifest.shards):,} shards are not as {MANIFEST_NAME} says: "
            f"{'; '.join(found[:_SHOWN_FAULTS])}{more}. Copy them again, or prepare the shards again"
        )


def find_file_fault(store: ShardStore, entry: ShardEntry) -> Fault | None:
    """The fault of a shard's file that shows at once: it is missing, or has another size than the manifest states."""
    try:
        size = store.size(entry.name)
    except FileNotFoundError:
        return Fault(-1, MISSING_SHARD, f"{entry.name} is missing")
    if size is not None and size != entry.bytes:
        return Fault(-1, WRONG_SIZE, f"{entry.name} has {size:,} bytes, not {entry.bytes:,}")
    return None


def describe(manifest: Manifest) -> str:
    r"""A manifest as a few lines to read.

    >>> entry = ShardEntry("shard-000000.tar", samples=40, bytes=1_500_000, sha256="0" * 64)
    >>> print(describe(Manifest("pets", (entry,), ("cat", "dog"), {"empty caption": 3}, captions=200)))
    pets
      samples          40
      captions        200
      labels            2
      shards            1
      bytes         1.5 MB
      excluded          3
        empty caption  3
    """
    size = f"{manifest.bytes / 1e6:.1f} MB" if manifest.bytes < 1e9 else f"{manifest.bytes / 1e9:.2f} GB"
    rows = [
        ("samples", f"{manifest.samples:,}"),
        ("captions", f"{manifest.captions:,}"),
        ("labels", f"{len(manifest.labels):,}"),
        *([("masks", f"{manifest.masks:,}")] if manifest.masks else []),
        ("shards", f"{len(manifest.shards):,}"),
    ]
    lines = [manifest.name, *(f"  {title:<8}{value:>11}" for title, value in rows), f"  {'bytes':<8}{size:>12}"]
    if manifest.photos is not None:
        lines.append(f"  {manifest.photos}")
    lines.append(f"  {'excluded':<8}{sum(manifest.excluded.values()):>11,}")
    width = max(map(len, manifest.excluded), default=0)
    ranked = sorted(manifest.excluded.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"    {reason:<{width}}  {count:,}" for reason, count in ranked]
    return "\n".join(lines)


def write_shards(  # noqa: PLR0913 - what `prepare` and its sources decide
    samples: Iterable[Sample],
    out: Path,
    *,
    name: str,
    samples_per_shard: int = 1000,
    excluded: Counter[str] | None = None,
    progress: bool = True,
    overwrite: bool = False,
    total: int | None = None,
    photo_size: PhotoSize | None = None,
) -> Manifest:
    """Write samples as shards and a manifest into the folder `out`, all or nothing.

    Everything is built in a hidden folder next to `out`, which is renamed at the end: a run that fails or is killed
    leaves no half-made `out`.

    Args:
        samples: the data set in its order; one sample is held at a time, or with `photo_size` a few for each core.
        out: folder to make; missing parents are made as well.
        name: the data set and split, for people.
        samples_per_shard: size of all shards but the last.
        excluded: reason -> count, filled by the source while it is iterated. A sample that breaks the contract (a
            `RecordError` of `encode_sample`) is added to it as `"broken record"` and logged, and the rest goes on; so
            is, as `"corrupt image"`, a photo that cannot be decoded to be resized.
        progress: show a progress bar on stderr.
        overwrite: replace a folder that already holds shards. Any other folder that is not empty is never touched.
        total: expected number of samples, for the progress bar's remaining time.
        photo_size: make photos smaller, see `lightning_xai.data.photo_size`; None: their files go in as they are.

    Raises:
        ShardsExistError: `out` is there and not empty.
        ShardError: two samples have the same key, or not one sample could be written.
        ValueError: `samples_per_shard` is below one.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard has to be at least 1; got {samples_per_shard}")
    out = out.resolve()
    _check_target(out, overwrite)
    excluded = Counter() if excluded is None else excluded
    unfinished = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir(parents=True)
    content = _Content()
    shards: list[ShardEntry] = []
    try:
        with progress_bar(progress) as bar:
            tracked = bar.track(samples, total=total, description=escape(name))
            records = _encoded(tracked if photo_size is None else shrink_all(tracked, photo_size), excluded, content)
            for first in records:
                group = chain([first], islice(records, samples_per_shard - 1))
                shards.append(_write_shard(unfinished / f"shard-{len(shards):06d}.tar", group))
        if not shards:
            raise ShardError(f"{out}: no sample to write for {name!r}; excluded: {dict(excluded) or 'nothing'}")
        manifest = Manifest(
            name=name,
            shards=tuple(shards),
            labels=tuple(sorted(content.labels)),
            excluded={reason: count for reason, count in sorted(excluded.items()) if count},
            captions=content.captions,
            masks=content.masks,
            photos=content.resized(photo_size),
        )
        manifest.save(unfinished)
        _publish(unfinished, out, overwrite)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def hash_rest(stream: BinaryIO) -> str:
    """The SHA-256, in hexadecimal digits, of the bytes that a stream still has."""
    digest = hashlib.sha256()
    for chunk in iter(partial(stream.read, _CHUNK), b""):
        digest.update(chunk)
    return digest.hexdigest()


def _write_shard(path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardEntry:
    """Write keys with their members as one shard."""
    samples = 0
    with path.open("w+b") as file:
        # Time and owner are fixed so that the same samples give the same bytes. The members are bytes already
        # (encoder=False). The GNU format holds keys of more than 100 characters, which webdataset's default does not.
        with TarWriter(file, encoder=False, mtime=0, user="nobody", group="nobody", format="GNU_FORMAT") as tar:
            for key, members in records:
                tar.write({"__key__": key, **members})
                samples += 1
        size = file.tell()
        file.seek(0)
        return ShardEntry(path.name, samples, size, hash_rest(file))


@dataclass
class _Content:
    """Sums over the samples that were written."""

    keys: set[str] = field(default_factory=set)
    captions: int = 0
    labels: set[str] = field(default_factory=set)
    masks: int = 0
    short_sides: Counter[int] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        self.keys.add(sample.key)
        self.captions += len(sample.captions)
        self.labels.update(region.label for region in sample.regions)
        self.masks += sum(region.mask is not None for region in sample.regions)
        self.short_sides[min(sample.size)] += 1

    def resized(self, photo_size: PhotoSize | None) -> ResizedPhotos | None:
        if photo_size is None:
            return None
        smaller = sum(count for side, count in self.short_sides.items() if side < photo_size.short_side)
        return ResizedPhotos(photo_size.short_side, photo_size.jpeg_quality, smaller)


def _encoded(
    samples: Iterable[Sample | RecordError], excluded: Counter[str], content: _Content
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Key and members of each sample that keeps the contract; the others are counted, and the first logged."""
    logged = 0
    for sample in samples:
        try:
            if isinstance(sample, RecordError):
                raise sample
            members = encode_sample(sample)
        except RecordError as error:
            excluded[error.kind] += 1
            if (logged := logged + 1) <= _LOGGED_RECORDS:
                _log.warning("excluded: %s", error)
            continue
        if sample.key in content.keys:
            raise ShardError(
                f"key {sample.key!r} comes twice (now from {sample.source or 'an unnamed source'}); keys have to "
                "be unique in a data set: remove the duplicate from the source or make its keys distinct"
            )
        content.add(sample)
        yield sample.key, members


def progress_bar(enabled: bool) -> Progress:
    """A bar on stderr with the count and the time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ShardsExistError(f"{out}: is a file; choose another folder for the shards")
    if (out / MANIFEST_NAME).is_file():
        if not overwrite:
            raise ShardsExistError(f"{out}: already holds shards; choose another folder, or overwrite them")
    elif any(out.iterdir()):
        raise ShardsExistError(f"{out}: is not empty and holds no shards of this project; choose another folder")


def _publish(unfinished: Path, out: Path, overwrite: bool) -> None:
    """Give the finished folder its name; old shards that it replaces come back if that fails."""
    _check_target(out, overwrite)  # another process may have been faster
    retired = out.parent / f".{out.name}.retired-{uuid.uuid4().hex[:8]}"
    replaces = overwrite and (out / MANIFEST_NAME).is_file()
    try:
        if replaces:
            out.rename(retired)
        elif out.exists():
            out.rmdir()  # refuses if it is no longer empty
        unfinished.rename(out)
    except OSError as error:
        if retired.exists() and not out.exists():
            retired.rename(out)
        raise ShardsExistError(f"{out}: could not be put in place ({error}); run again") from error
    shutil.rmtree(retired, ignore_errors=True)
