"""open_clip's own training command, `python -m open_clip_train.main`, as a contestant of `training.py`.

Its loader takes captions from `.txt` members, which `write_shared_shards` adds; `fit` reads past them, so that both
train on the same files. It needs a webdataset of at most 0.2.86: newer ones give its loader entries without a name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from webdataset.writer import TarWriter

from lightning_xai.data import Manifest, Sample
from lightning_xai.data.sample import encode_sample
from lightning_xai.data.shards import ShardEntry, hash_rest

__all__ = ["OpenClipTraining", "step_seconds", "write_shared_shards"]

_STEP = re.compile(r"Train Epoch: \d+ \[.*Batch \(t\): \S+ (\S+)/s,")
_PRECISIONS = {"32-true": "fp32", "bf16-mixed": "amp_bf16"}
_ERROR_LINES = 15


def write_shared_shards(folder: Path, samples: Iterable[Sample], samples_per_shard: int) -> Manifest:
    """Shards with the first caption of each sample once more, as a `.txt` member."""
    folder.mkdir(parents=True)
    entries: list[ShardEntry] = []
    captions = 0
    rest = iter(samples)
    while group := list(islice(rest, samples_per_shard)):
        path = folder / f"shard-{len(entries):06d}.tar"
        with path.open("w+b") as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                for sample in group:
                    tar.write({"__key__": sample.key, **encode_sample(sample), "txt": sample.captions[0].encode()})
            size = file.tell()
            file.seek(0)
            entries.append(ShardEntry(path.name, len(group), size, hash_rest(file)))
        captions += sum(len(sample.captions) for sample in group)
    manifest = Manifest("shared", tuple(entries), (), {}, captions)  # training reads no regions
    manifest.save(folder)
    return manifest


def step_seconds(lines: Iterable[str], batch_size: int) -> Iterator[float]:
    """The time of each step, from open_clip's log at `--log-every-n-steps 1`.

    >>> line = "INFO | Train Epoch: 0 [ 16/112 (14%)] Data (t): 0.1 Batch (t): 2.1, 8.00000/s, 8.00000/s/gpu LR: 0.1"
    >>> list(step_seconds(["Start epoch 0", line], 16))
    [2.0]
    """
    for line in lines:
        if (found := _STEP.search(line)) is not None:
            yield batch_size / float(found[1])


class OpenClipTraining:
    """The command, on the shards, model, batch and precision of a contest.

    Args:
        shards: folder that `write_shared_shards` has filled.
        packages: folder with the webdataset that it needs.
        options: its further options, by name.
    """

    def __init__(self, shards: Path, packages: Path, options: Mapping[str, object]) -> None:
        self._packages = packages
        self._batch_size = int(str(options["batch-size"]))
        files = "::".join(str(path) for path in sorted(shards.glob("*.tar")))
        given = {"train-data": files, "dataset-type": "webdataset", "epochs": 1, "log-every-n-steps": 1, "logs": "none"}
        self._arguments = [part for name, value in {**given, **options}.items() for part in (f"--{name}", str(value))]

    def run(self, folder: Path, threads: int, warm: int) -> tuple[float, float]:
        """Train once.

        Args:
            folder: where it may write.
            threads: of the process that trains.
            warm: steps that are not counted.

        Returns:
            Seconds that the other steps took, and seconds that cores worked in them for the process that trains.

        Raises:
            RuntimeError: it failed; the message has the end of its output.
        """
        paths = [str(self._packages.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
        output: list[str] = []
        steps: list[tuple[float, float]] = []
        with subprocess.Popen(
            [sys.executable, "-m", "open_clip_train.main", *self._arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)
                steps += ((seconds, _core_seconds(process.pid)) for seconds in step_seconds([line], self._batch_size))
        if process.returncode or len(steps) <= warm:
            raise RuntimeError(f"open_clip_train ended with {process.returncode}:\n{''.join(output[-_ERROR_LINES:])}")
        return sum(seconds for seconds, _ in steps[warm:]), steps[-1][1] - steps[warm - 1][1]


def peer_options(
    model: str, device: str, precision: str, batch_size: int, workers: int, steps: int
) -> dict[str, object]:
    """Options of the command for a contest: AdamW as `fit` has it, at a constant rate."""
    return {
        "model": model,
        "device": device,
        "precision": _PRECISIONS[precision],
        "batch-size": batch_size,
        "workers": workers,
        "train-num-samples": steps * batch_size,
        "lr": 1e-5,
        "wd": 1e-4,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "lr-scheduler": "const",
        "warmup": 1,
        "save-frequency": 0,
    }


def _core_seconds(process: int) -> float:
    """Seconds that cores have worked for a process, without its children; Linux only."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
