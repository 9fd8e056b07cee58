"""Times training steps with each objective against the plain one, in turn, and their peak memory; keeps a table.

    python benchmarks/objectives.py --coco DIR     # ViT-B-32, 32 pairs a step: about seven minutes on 2 idle cores
    python benchmarks/objectives.py --train DIR    # on prepared shards with regions

DIR holds COCO's `annotations/` and `train2017/`. Random weights, float32. A step is that of the Trainer: forward pass,
terms, backward pass, AdamW, logging; loading is not part of it. Every round takes one step with each list of objectives
on the same batch, and begins with another list than the round before. What else the machine does touches all alike:
read the ratios to the plain step of the same round, whose medians are listed. Where other programs want the cores, core
time (what cores worked for the process) is less noisy than wall time. Peak memory (resident set, torch, weights and
AdamW's averages included) is that of two steps in a separate process for each list.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from attribution import peak_gigabytes
from kept_table import keep

PLAIN = "`Softmax`"
OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {
    PLAIN: {"Softmax": {}},
    "`Sigmoid`": {"Sigmoid": {}},
    "`HardNegativeText`": {"HardNegativeText": {"swap_objects": True}},
    "`Softmax`, `Grounding`": {"Softmax": {}, "Grounding": {}},
    "`Softmax`, `PhraseRegion`": {"Softmax": {}, "PhraseRegion": {}},
    "`Softmax`, `PhrasePatch`": {"Softmax": {}, "PhrasePatch": {}},
    "`Softmax`, `Grounding` at the inputs": {"Softmax": {}, "Grounding": {"image_layer": 0, "text_layer": 0}},
}
"""Heading of a row -> objectives by class, with their options."""


def task_of(model: str, headings: list[str]) -> tuple[Any, dict[str, list[Any]]]:
    """A random model that is ready for every list of objectives, and these."""
    import torch

    from lightning_xai.training import ContrastiveFineTuning, objectives

    torch.manual_seed(0)
    task = ContrastiveFineTuning(model, None)
    lists = {
        heading: [getattr(objectives, name)(**options) for name, options in OBJECTIVES[heading].items()]
        for heading in headings
    }
    for chosen in lists.values():
        for objective in chosen:
            objective.prepare(task.encoder)
    return task, lists


def training_batches(task: Any, lists: dict[str, list[Any]], train: Path, size: int, count: int) -> list[Any]:
    """The first batches that a fit on the shards sees, with all that any objective needs."""
    from lightning.pytorch.callbacks import Callback

    from lightning_xai.data import ShardDataModule

    found: list[Any] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            found.append(batch)

    # Data modules ask for what batches have to hold.
    task.objectives = tuple(objective for chosen in lists.values() for objective in chosen)
    data = ShardDataModule(train=train, batch_size=size, num_workers=0)
    for epoch in range(count):
        if len(found) < count:
            fit(task, data, Keep(), limit_train_batches=count - len(found), max_epochs=1 + epoch)
    return found


def fit(task: Any, data: Any, callback: Any, **options: Any) -> None:
    """Train without files."""
    import lightning as L

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=[callback], **quiet, **options
    )
    trainer.fit(task, data)


def steps(task: Any, order: list[tuple[str, Any]], lists: dict[str, list[Any]]) -> list[tuple[str, float, float]]:
    """Take a step for each (heading, batch); heading, seconds and core seconds of each."""
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data import DataLoader

    taken: list[tuple[str, float, float]] = []

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.objectives = tuple(lists[order[batch_idx][0]])
            self.begin = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, *arguments: Any) -> None:
            end = time.perf_counter(), time.process_time()
            heading = order[arguments[-1]][0]
            taken.append((heading, end[0] - self.begin[0], end[1] - self.begin[1]))

    loader: Any = DataLoader([batch for _, batch in order], batch_size=None)  # type: ignore[arg-type]
    fit(task, loader, Clock(), max_epochs=1)
    return taken


def rounds(model: str, train: Path, size: int, count: int, headings: list[str]) -> list[dict[str, tuple[float, float]]]:
    """Seconds and core seconds of a step, by heading, in each round; a round before them does not count."""
    task, lists = task_of(model, headings)
    batches = training_batches(task, lists, train, size, min(count, 4))
    order = []
    for number in range(-1, count):
        start = number % len(headings)
        order += [(heading, batches[number % len(batches)]) for heading in headings[start:] + headings[:start]]
    taken = steps(task, order, lists)[len(headings) :]
    width = len(headings)
    return [
        {heading: (wall, core) for heading, wall, core in taken[start : start + width]}
        for start in range(0, len(taken), width)
    ]


def peak(model: str, train: Path, size: int, heading: str) -> float:
    """Peak memory in gigabytes of a process that takes two steps, the second of which has AdamW's averages."""
    command = [sys.executable, __file__, "--model", model, "--train", str(train), "--batch-size", str(size)]
    output = subprocess.run([*command, "--peak-of", heading], check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(output.strip().splitlines()[-1]))


def table(taken: list[dict[str, tuple[float, float]]], peaks: dict[str, float] | None = None) -> list[str]:
    """A row for each list of objectives."""
    lines = [
        "| objectives | step [s] | plain steps | over the rounds | core time, plain steps | peak [GB] | plain peaks |",
        "|---|---|---|---|---|---|---|",
    ]
    for heading in taken[0]:
        ratios = [step[heading][0] / step[PLAIN][0] for step in taken]
        core = statistics.median(step[heading][1] / step[PLAIN][1] for step in taken)
        seconds = statistics.median(step[heading][0] for step in taken)
        lines.append(
            f"| {heading} | {seconds:.2f} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} | "
            f"{core:.3f} | " + (f"{peaks[heading]:.2f} | {peaks[heading] / peaks[PLAIN]:.3f} |" if peaks else "| |")
        )
    return lines


def details(model: str, train: Path, size: int, count: int) -> str:
    """What the steps were taken on."""
    task, lists = task_of(model, ["`Softmax`, `Grounding`"])
    batches = training_batches(task, lists, train, size, min(count, 4))
    tokens = [batch.tokens.shape[1] for batch in batches]
    phrases = [int((batch.phrases.reason == 0).sum()) for batch in batches]
    load = os.getloadavg()
    return (
        f"{size} pairs a step, {count} rounds; captions cut to {min(tokens)} to {max(tokens)} tokens by batch, "
        f"{min(phrases)} to {max(phrases)} phrases with a box. Load average at the end: {load[0]:.1f} (1 minute), "
        f"{load[2]:.1f} (15 minutes), {os.cpu_count()} cores."
    )


def prepare(coco: Path, out: Path) -> Path:
    """COCO's training images as shards."""
    from lightning_xai import cli

    files = {"images": coco / "train2017", "split": "train2017"}
    files |= {kind: coco / f"annotations/{kind}_train2017.json" for kind in ("captions", "instances")}
    cli.main(["prepare", "coco", *(f"--{name}={path}" for name, path in files.items()), f"--out={out}"])
    return out


def known_headings() -> list[str]:
    """The rows whose objectives there are."""
    from lightning_xai.training import objectives

    return [heading for heading, chosen in OBJECTIVES.items() if all(hasattr(objectives, name) for name in chosen)]


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, help="a folder with COCO's annotations/ and train2017/")
    parser.add_argument("--train", type=Path, help="a folder of prepared shards with regions, in its place")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name or a model config")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if (options.coco is None) == (options.train is None):
        parser.error("give either --coco or --train: phrases and boxes come from there")
    model, size = options.model, options.batch_size
    if options.peak_of:
        task, lists = task_of(model, [options.peak_of])
        batches = training_batches(task, lists, options.train, size, 1)
        steps(task, [(options.peak_of, batch) for batch in batches * 2], lists)
        print(json.dumps(peak_gigabytes()))
        return
    with tempfile.TemporaryDirectory() as folder:
        train = options.train or prepare(options.coco, Path(folder, "train"))
        headings = known_headings()
        # In a process of its own, whose memory is free again when peaks are measured.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            taken = pool.apply(rounds, (model, train, size, options.rounds, headings))
        print("\n".join(table(taken)), file=sys.stderr, flush=True)  # peaks take as long again
        peaks = {}
        for heading in headings:
            peaks[heading] = peak(model, train, size, heading)
            print(f"peak of {heading}: {peaks[heading]:.2f} GB", file=sys.stderr, flush=True)
        measured = [*table(taken, peaks), "", details(model, train, size, options.rounds)]
    keep("objectives", "Steps with each objective", "cpu", "\n".join(measured), model)


if __name__ == "__main__":
    main()
