"""`verify`: see whether prepared shards are whole, every byte and every image."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape

from lightning_xai.cores import usable_cores

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there.


@dataclass
class Verify:
    """Read sets of shards once as a whole, and report which of them are corrupt.

    Compares sizes and SHA-256 with the manifest, decodes every record and image, and looks for records without their
    image or text, for keys that come twice, and for wrong counts. Ends with status 1 where anything is wrong.

    A prepared set, or all the sets in a folder:
      python -m lightning_xai verify data/coco/train data/coco/val
      python -m lightning_xai verify data/coco
    After copying to another machine:
      python -m lightning_xai verify data/coco --quick

    Attributes:
        sets: folders of shards, or folders of such; or addresses and commands as the data module takes them.
        quick: compare sizes and SHA-256 only, without decoding.
        workers: processes that read; by default as many as there are CPU cores that the command may use.
        retries: how often a shard from elsewhere is opened again where its stream breaks off.
    """

    sets: list[str]
    quick: bool = False
    workers: int | None = None
    retries: int = 3

    def __call__(self) -> None:
        """Check them, with a progress bar.

        Raises:
            ValueError: something is wrong with one of them; the message names the shards.
        """
        workers = usable_cores() if self.workers is None else self.workers
        if workers < 0:
            raise ValueError(f"workers has to be at least 0; got {workers}")
        found = [_verify(place, self, workers) for given in self.sets for place in _sets_in(given)]
        wrong = [message for _, _, message in found if message]
        if wrong:
            raise ValueError("\n".join(wrong))
        samples, shards = sum(size for size, _, _ in found), sum(size for _, size, _ in found)
        how = "; sizes and SHA-256 only, --quick decodes nothing" if self.quick else ""
        print(f"ok: {samples:,} samples in {shards:,} shards{how}")  # noqa: T201 - this is what was asked


def _sets_in(given: str) -> list[str]:
    """A set itself, or the sets in a folder that is none."""
    from pathlib import Path

    from lightning_xai.data.shards import MANIFEST_NAME

    folder = Path(given)
    if (folder / MANIFEST_NAME).exists():
        return [given]
    return sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST_NAME}")) or [given]


def _verify(place: str, options: Verify, workers: int) -> tuple[int, int, str]:
    """Check one set, and show the faults of its shards.

    Returns:
        The number of its samples and shards, and what is wrong with it.
    """
    from lightning_xai.data.excluded import shard_table, worst_shards
    from lightning_xai.data.shard_store import open_store
    from lightning_xai.data.shards import Manifest, ShardError, progress_bar
    from lightning_xai.data.verification import Verification, read_reports

    store = open_store(place, options.retries)
    try:
        manifest = Manifest.read(store)
    except ShardError as error:
        return 0, 0, str(error)
    verification = Verification(manifest)
    # Workers start here, before the bar, whose thread must not be forked.
    reports = read_reports(store, manifest, quick=options.quick, workers=workers)
    with progress_bar(True) as bar:
        task = bar.add_task(escape(str(store)), total=manifest.samples)
        for report in reports:
            verification.add(report)
            bar.advance(task, report.entry.samples)
    if not options.quick:
        verification.compare()
    if manifest.photos is not None:
        print(f"{store}: {manifest.photos}")  # noqa: T201 - this is what was asked
    counts = verification.counts
    wrong = ""
    if counts:
        more = verification.findings - len(verification.messages)
        lines = [f"{store}:", shard_table(counts), *verification.messages, *([f"and {more:,} more"] if more else [])]
        print("\n".join(lines))  # noqa: T201 - this is what was asked
        faults = "fault" if counts.total() == 1 else "faults"
        wrong = (
            f"{store}: {counts.total():,} {faults} in {worst_shards(counts)}. Copy these shards again from where they "
            "are whole, or prepare the data again"
        )
    return manifest.samples, len(manifest.shards), wrong
