"""Measures what gamma and rho add to a validation epoch and to `test`, on photos with five captions; keeps a table.

    python benchmarks/callback.py                           # 1,000 images, about half an hour on one core
    python benchmarks/callback.py --images 160 --rounds 1   # less to wait for; what is done once counts for more
    python benchmarks/callback.py --data coco               # shards of `prepare coco`

ViT-B-32 with random weights, float32, one thread and a worker that reads. The plain epoch decodes, embeds images and
captions, and computes loss and recall. The others add GroundingCallback at the last blocks (`--inputs` also as it is by
default, with 500 phrases read at the inputs), or are AttributionEvaluation with the metric grounding; tables and
pictures count. The epochs take turns, `--rounds` times over the same images, so that what is done once in an epoch
counts once a round; `--images` are shared among the rounds, `--data` is read whole in each. Seconds of the CPU are
those of the process that computes, without the worker: they depend less on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from kept_table import keep
from lightning.pytorch.callbacks import Callback
from photo_shards import write_captioned_photo_shards


@dataclass(frozen=True)
class Cost:
    """Seconds of an epoch.

    Attributes:
        wall: from the call of the trainer to its end.
        cpu: likewise, of the CPU, in the process that computes.
        once: the part of `cpu` before the first batch and after the last.
        phrases: that were measured.
    """

    wall: float = 0.0
    cpu: float = 0.0
    once: float = 0.0
    phrases: int = 0

    def __add__(self, other: Cost) -> Cost:
        """The cost of both epochs."""
        return Cost(*(own + more for own, more in zip(astuple(self), astuple(other), strict=True)))


class _Batches(Callback):
    """The CPU's seconds from the first batch to the last; has to come first among callbacks."""

    seconds = 0.0

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.process_time()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.process_time() - self._began

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end


class Bench:
    """A model, and shards that it is evaluated on."""

    def __init__(self, model: str, device: str, shards: Path, batch_size: int) -> None:
        from lightning_xai.training import ContrastiveFineTuning

        self.model, self.device, self.shards, self.batch_size = model, device, shards, batch_size
        self.task = ContrastiveFineTuning(model, None)

    def plain(self, batches: int | None = None) -> Cost:
        """An epoch of embedding and scoring alone."""
        return self._run("validate", self.task, [], batches)

    def callback(self, batches: int | None = None, **options: Any) -> Cost:
        """The same with GroundingCallback."""
        from lightning_xai.training import GroundingCallback

        return self._run("validate", self.task, [GroundingCallback(**options)], batches)

    def evaluation(self, batches: int | None = None) -> Cost:
        """`test` of gamma and rho by feature-pair attribution."""
        from lightning_xai.evaluation import AttributionEvaluation

        with tempfile.TemporaryDirectory() as out:
            task = AttributionEvaluation(self.model, None, out=Path(out), metrics=["grounding"])
            task.encoder = self.task.encoder
            return self._run("test", task, [], batches)

    def _run(self, verb: str, task: L.LightningModule, callbacks: list[Callback], batches: int | None) -> Cost:
        from lightning_xai.data import ShardDataModule

        clock = _Batches()
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="auto" if self.device == "cuda" else self.device,
                devices=1,
                inference_mode=False,
                callbacks=[clock, *callbacks],
                limit_val_batches=batches,
                limit_test_batches=batches,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            data = ShardDataModule(val=self.shards, test=self.shards, eval_batch_size=self.batch_size, num_workers=1)
            wall, cpu = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):  # its tables are long
                getattr(trainer, verb)(task, data, verbose=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            cpu = time.process_time() - cpu
            wall = time.perf_counter() - wall
        counts = {name: int(value) for name, value in trainer.callback_metrics.items() if name.endswith("_targets")}
        return Cost(wall, cpu, cpu - clock.seconds, counts.get("val/grounding_targets", 0))


def table(bench: Bench, images: int, rounds: int, *, inputs: bool = False) -> str:
    """All measurements as Markdown; `images` are those of a round."""
    plain = f"plain epoch, {images:,} images" + (f" in each of {rounds} rounds" if rounds > 1 else "")
    runs = {
        plain: bench.plain,
        "with GroundingCallback at the last blocks": lambda batches=None: bench.callback(batches, input_phrases=0),
        "`test` of gamma and rho": bench.evaluation,
    }
    if inputs:
        runs["with GroundingCallback as it is by default"] = bench.callback
    for run in runs.values():
        run(1)  # imports, and the first call of each kernel
    costs = dict.fromkeys(runs, Cost())
    for number in range(rounds):
        for name, run in runs.items():
            cost = run()
            costs[name] += cost
            print(f"round {number + 1}: {name}: {cost}", file=sys.stderr, flush=True)
    lines = [
        "| | seconds | of plain | CPU seconds | of plain | of these before and after the batches |",
        "|---|---|---|---|---|---|",
    ]
    base = costs[plain]
    for name, cost in costs.items():
        cells = (cost.wall, cost.wall / base.wall, cost.cpu, cost.cpu / base.cpu, cost.once)
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    phrases = max(cost.phrases for cost in costs.values()) // rounds
    lines += ["", f"{phrases:,} phrases have a box that can be measured."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name or a model config")
    parser.add_argument("--images", type=int, default=1000, help="images, in all rounds together")
    parser.add_argument("--rounds", type=int, default=2, help="turns that the epochs take")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a batch")
    parser.add_argument(
        "--data", type=Path, help="a folder of shards with captions and boxes, in place of drawn images"
    )
    parser.add_argument("--inputs", action="store_true", help="also with phrases that are read at the inputs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shards = options.data or Path(name) / "photos"
        if options.data is None:
            write_captioned_photo_shards(shards, options.images // options.rounds)
        from lightning_xai.data import Manifest

        images = Manifest.load(shards).samples
        bench = Bench(options.model, options.device, shards, options.batch_size)
        measured = table(bench, images, options.rounds, inputs=options.inputs)
    keep("callback", "Gamma and rho in an epoch", options.device, measured, options.model)


if __name__ == "__main__":
    main()
