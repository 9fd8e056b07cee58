"""Times fine-tuning through Trainer and ShardDataModule against plain PyTorch loops, in turn; keeps a table.

    python benchmarks/training.py                 # ViT-B-32, float32: some minutes on 2 idle cores
    python benchmarks/training.py --threads 1     # where a core is left for the worker, as beside a GPU
    python benchmarks/training.py --train DIR     # on prepared shards, instead of synthetic photographs
    python benchmarks/training.py --device cuda   # ViT-B-16 in bf16-mixed, 256 pairs a step, with FLOP utilisation
    python benchmarks/training.py --peer DIR      # against open_clip's own training command, see below

Random weights. All contestants train the same model on the same batches with the same optimizer, schedule and bound on
the logit scale (a test shows that they end with the same model). Each round runs every one of them for some steps,
and begins with another one than the round before. What else the machine does touches all alike: read the ratios, which
are medians over the rounds. Where other programs want the cores, rates are noise; what cores have worked for the
process that trains, workers not counted, is less so. The plain loops differ in what they are fed with:

* batches that lie in memory, text cut at the batch's last end-of-text token: what the model itself costs;
* the batches of the same DataLoader with as many workers: on a CPU, decoding takes from the cores that train;
* batches that lie in memory, text at its full 77 tokens, as open_clip's own training runs it.

`--peer DIR` times `fit` against `python -m open_clip_train.main` in place of these, on the same shards with a loader
each, as many workers, and AdamW. DIR holds the webdataset that it needs: `pip install --no-deps --target DIR
webdataset==0.2.86`. It runs text at 77 tokens and crops photos at random (its workers' time, which is not the
trainer's); its own log gives the time of a step.

The data wait is the share of our own steps that the trainer waits for the next batch. On CUDA, model FLOP utilisation
is the floating-point operations of one forward and backward pass (counted by torch.utils.flop_counter: matrix products,
convolutions and attention, no recomputation), divided by the step's time and by the device's peak.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kept_table import keep
from open_clip_training import OpenClipTraining, peer_options, write_shared_shards
from photo_shards import draw_photos, write_photo_shards
from scaling_formulas import GPUS

WARM = 3  # steps before the clock starts: a worker is two batches ahead, which would hide how fast it is
OURS, PLAIN, LOADED, PADDED = (
    "lightning_xai: Trainer, ShardDataModule",
    "plain loop, batches in memory",
    "plain loop, batches of the same DataLoader",
    "plain loop, batches in memory, text of 77 tokens",
)
FUSED, PEER = "lightning_xai, with `fused: true`", "open_clip's own command, `open_clip_train`"


@dataclass(frozen=True)
class Spent:
    """What steps took: wall time, and the time that cores worked for the process that trains (not for workers)."""

    seconds: float
    core_seconds: float

    def __sub__(self, begin: Spent) -> Spent:
        return Spent(self.seconds - begin.seconds, self.core_seconds - begin.core_seconds)


@dataclass
class Setting:
    """What all contestants share."""

    model: str
    device: str
    precision: str
    train: Path
    folder: Path
    batch_size: int
    workers: int
    steps: int
    peer: Path | None = None
    learning_rates: tuple[float, float] = (1e-7, 1e-5)
    warm: int = WARM

    @property
    def total(self) -> int:
        """Steps of one contestant in a round, those before the clock starts included."""
        return self.warm + self.steps

    def now(self) -> Spent:
        """What was spent since some moment in the past, once all that was asked of the device is done."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        return Spent(time.perf_counter(), time.process_time())


@dataclass
class Measured:
    """What a round of ours tells; shares are of the wall time of its steps."""

    spent: Spent = Spent(0.0, 0.0)
    waiting: float = 0.0
    callbacks: float = 0.0
    reading_cpu: float = 0.0


def data_module(setting: Setting) -> Any:
    """The shards, streamed."""
    from lightning_xai.data import ShardDataModule

    return ShardDataModule(train=setting.train, batch_size=setting.batch_size, num_workers=setting.workers)


def fit(module: Any, setting: Setting, batches: list[Any] | None = None) -> Measured:
    """Train through the Trainer, with its progress bar and TensorBoard, as a user does.

    Args:
        module: the task.
        setting: what it trains on.
        batches: taken in place of the shards' own, in turn.
    """
    import lightning as L
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.profilers import SimpleProfiler

    measured = Measured()

    class Clock(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            if arguments[-1] == setting.warm - 1:
                self.begin = setting.now()
            elif arguments[-1] == setting.total - 1:
                measured.spent = setting.now() - self.begin

    profiler = SimpleProfiler(dirpath=setting.folder, filename="profile")  # a file, not the terminal
    trainer = L.Trainer(
        accelerator="gpu" if setting.device == "cuda" else setting.device,
        devices=1,
        precision=setting.precision,  # type: ignore[arg-type] # Lightning lists them, this file passes one on
        max_epochs=1,
        limit_train_batches=setting.total,
        callbacks=[Clock()],
        profiler=profiler,
        default_root_dir=setting.folder,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    if batches is None:
        trainer.fit(module, data_module(setting))
    else:
        from torch.utils.data import DataLoader

        turns = [batches[number % len(batches)] for number in range(setting.total)]
        trainer.fit(module, DataLoader(turns, batch_size=None))  # type: ignore[arg-type] # any sequence is a data set
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    measured.reading_cpu = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    recorded = profiler.recorded_durations
    waits = recorded["[_TrainingEpochLoop].train_dataloader_next"][setting.warm : setting.total]
    measured.waiting = sum(waits) / measured.spent.seconds
    hooks = (times for name, times in recorded.items() if name.startswith("[Callback]") and "train_batch_" in name)
    measured.callbacks = sum(sum(times[setting.warm : setting.total]) for times in hooks) / measured.spent.seconds
    return measured


def plain_loop(encoder: Any, setting: Setting, batches: Iterable[Any], encode_text: Callable[[Any], Any]) -> Spent:
    """The loop that a reader would write; what its steps after the first `setting.warm` took."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    first, last = setting.learning_rates
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=first, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, (last / first) ** (1 / max(setting.total - 1, 1)))
    autocast = torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16-mixed")
    encoder.train()
    for number, batch in enumerate(batches):
        batch = batch.to(setting.device)
        with autocast:
            image = normalize(encoder.model.encode_image(batch.images), dim=1)
            text = normalize(encode_text(batch.tokens), dim=1)
            logits = encoder.logit_scale.exp() * image @ text.T
            own = torch.arange(len(logits), device=logits.device)
            loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
        with torch.no_grad():
            encoder.logit_scale.clamp_(0.0, math.log(100.0))
        if number == setting.warm - 1:
            begin = setting.now()
    return setting.now() - begin


class Contest:
    """The contestants on one model; each call runs one of them for a round and gives what it took."""

    def __init__(self, setting: Setting) -> None:
        import torch

        from lightning_xai.training import ContrastiveFineTuning

        torch.manual_seed(0)
        first, last = setting.learning_rates
        self.setting = setting
        self.module = ContrastiveFineTuning(setting.model, None, initial_lr=first, final_lr=last)
        self.encoder = self.module.encoder
        self.batches = list(self._loader())
        self.ours: list[Measured] = []
        self.runs: dict[str, Callable[[], Spent]] = {
            OURS: self._fit,
            PLAIN: lambda: self._plain(self.batches, self.encoder.encode_text),
            LOADED: lambda: self._plain(self._loader(), self.encoder.encode_text),
            PADDED: lambda: self._plain(self.batches, self.encoder.model.encode_text),
        }
        if setting.peer is not None:
            self.runs = {OURS: self._fit, FUSED: lambda: self._fit(fused=True), PEER: self._peer}

    def _loader(self) -> Iterable[Any]:
        """The batches of epoch 0, the very ones that a fit begins with."""
        data = data_module(self.setting)
        data.bind(self.encoder.image_transform, self.encoder.tokenizer)
        data.setup("fit")
        return islice(data.train_dataloader(), self.setting.total)

    def _peer(self) -> Spent:
        import torch

        setting = self.setting
        assert setting.peer is not None
        options = peer_options(
            setting.model, setting.device, setting.precision, setting.batch_size, setting.workers, setting.total
        )
        command = OpenClipTraining(setting.train, setting.peer, options)
        return Spent(*command.run(setting.folder, torch.get_num_threads(), setting.warm))

    def _fit(self, fused: bool = False) -> Spent:
        self.module.fused = fused
        self.ours.append(fit(self.module, self.setting))
        return self.ours[-1].spent

    def _plain(self, batches: Iterable[Any], encode_text: Callable[[Any], Any]) -> Spent:
        self.encoder.to(self.setting.device)  # the Trainer leaves it on the CPU
        return plain_loop(self.encoder, self.setting, batches, encode_text)

    def rounds(self, count: int) -> list[dict[str, Spent]]:
        """What each contestant took in each round."""
        names = list(self.runs)
        rounds = []
        for number in range(count):
            start = number % len(names)
            rounds.append({name: self.runs[name]() for name in names[start:] + names[:start]})
            told = {name: f"{spent.seconds:.2f} s, {spent.core_seconds:.2f}" for name, spent in rounds[-1].items()}
            print(f"round {number}, with core seconds: {told}", flush=True)
        return rounds

    def flops(self) -> float:
        """Floating-point operations of one forward and backward pass over a batch, text cut."""
        self.encoder.to(self.setting.device)
        return step_flops(self.encoder, self.batches[-1].to(self.setting.device))


def step_flops(encoder: Any, batch: Any) -> float:
    """Floating-point operations of one forward and backward pass over a batch, text cut."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        image, text = encoder.encode_image(batch.images), encoder.encode_text(batch.tokens)
        (image @ text.T).sum().backward()
    encoder.zero_grad()
    return float(counter.get_total_flops())


def rates_table(contest: Contest, rounds: list[dict[str, Spent]]) -> list[str]:
    """Samples per second of each contestant, and how many times ours is as fast, or takes as long of the cores."""
    samples = contest.setting.steps * contest.setting.batch_size
    lines = [
        "| | samples/s | rate of ours, divided by it | over the rounds | core-ms a sample | of ours, divided by it |",
        "|---|---|---|---|---|---|",
    ]
    for name in contest.runs:
        spent, ours = ([seconds[who] for seconds in rounds] for who in (name, OURS))
        rate = statistics.median(samples / one.seconds for one in spent)
        core = statistics.median(1e3 * one.core_seconds / samples for one in spent)
        ratios = [one.seconds / own.seconds for one, own in zip(spent, ours, strict=True)]
        cores = statistics.median(own.core_seconds / one.core_seconds for one, own in zip(spent, ours, strict=True))
        lines.append(
            f"| {name} | {rate:.2f} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} | "
            f"{core:.1f} | {cores:.3f} |"
        )
    return lines


def details(contest: Contest, rounds: list[dict[str, Spent]]) -> list[str]:
    """What the rates were measured on, and where the rest of our step goes."""
    setting, batches = contest.setting, contest.batches
    lengths = [int((batch.tokens != 0).sum(dim=1).max()) for batch in batches[setting.warm :]]
    waits, callbacks, cpu = (
        statistics.median(getattr(measured, name) for measured in contest.ours)
        for name in ("waiting", "callbacks", "reading_cpu")
    )
    pairs = setting.total * setting.batch_size
    load = os.getloadavg()
    return [
        f"{setting.batch_size} pairs a step, {setting.precision}, {setting.workers} worker(s), {len(rounds)} rounds of "
        f"{setting.steps} counted steps each; images of {_bytes_per_sample(setting):,.0f} bytes, captions cut to "
        f"{min(lengths)} to {max(lengths)} tokens by batch. Load average at the end: {load[0]:.1f} (1 minute), "
        f"{load[2]:.1f} (15 minutes), {os.cpu_count()} cores.",
        "",
        f"Data wait: {waits:.2%} of our step. Hooks of callbacks (progress bar, clock): {callbacks:.2%}. The workers "
        f"take at most {1e3 * cpu / pairs:.1f} ms of a core for each pair (what they read ahead counts, too).",
    ]


def _bytes_per_sample(setting: Setting) -> float:
    from lightning_xai.data import Manifest

    manifest = Manifest.load(setting.train)
    return manifest.bytes / manifest.samples


def utilisation(contest: Contest, rounds: list[dict[str, Spent]], peak: float | None) -> str:
    """Model FLOP utilisation of ours, in words.

    Args:
        contest: the contestants.
        rounds: what they took.
        peak: floating-point operations per second of the device, if known.
    """
    setting, flops = contest.setting, contest.flops()
    second = statistics.median(flops * setting.steps / spent[OURS].seconds for spent in rounds)
    told = f"{flops / setting.batch_size / 1e9:.1f} GFLOP a pair, {second / 1e12:.2f} TFLOP/s"
    return told + (f": {second / peak:.1%} of the device's peak of {peak / 1e12:.0f} TFLOP/s." if peak else ".")


def grounding_cost(setting: Setting) -> str:
    """What GroundingCallback adds to a validation epoch on this device, in words."""
    from attribution import measure_callback

    cost = measure_callback(setting.model, setting.device)
    return (
        f"A validation epoch (128 images, 256 captions, float32) takes {cost['plain']:.2f} s without and "
        f"{cost['measured']:.2f} s with GroundingCallback, tables and pictures included: {cost['ratio']:.2f} times as "
        "long."
    )


def peak_of(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by CUDA's name for it; None if it is not one that `scaling_formulas.GPUS` lists."""
    found = [gpu for gpu in GPUS.values() if all(part in name for part in gpu.cuda_name)]
    return found[0].flops if len(found) == 1 else None


def measure(setting: Setting, rounds: int, peak: float | None) -> str:
    """All measurements as Markdown."""
    contest = Contest(setting)
    spent = contest.rounds(rounds)
    lines = [*rates_table(contest, spent), "", *details(contest, spent), ""]
    lines.append(f"One forward and backward pass: {utilisation(contest, spent, peak)}")
    if setting.device == "cuda":
        return "\n".join([*lines, "", grounding_cost(setting)])
    lines += ["", "Not measured here, for want of a GPU: utilisation in bf16, and the cost of grounding on a GPU."]
    return "\n".join(lines)


def read_some(folder: Path, count: int) -> Iterator[Any]:
    """The first samples of prepared shards."""
    from lightning_xai.data import Manifest
    from lightning_xai.data.shard_reader import read_samples

    manifest = Manifest.load(folder)
    for _, sample in read_samples(folder, manifest, range(len(manifest.shards)), 0, min(count, manifest.samples)):
        yield sample


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="an open_clip name or a model config; ViT-B-32, on CUDA ViT-B-16")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="32-true, on CUDA bf16-mixed")
    parser.add_argument("--batch-size", type=int, help="16, on CUDA 256")
    parser.add_argument("--workers", type=int, help="1, on CUDA 12")
    parser.add_argument("--threads", type=int, help="CPU threads of the process that trains; torch's own number")
    parser.add_argument("--train", type=Path, help="a folder of prepared shards; without it, synthetic photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="counted steps of a contestant in a round: 4, on CUDA 30")
    parser.add_argument(
        "--peak-tflops", type=float, help="the device's dense peak; by default as benchmarks/scaling.py"
    )
    parser.add_argument(
        "--peer", type=Path, help="a folder with webdataset 0.2.86; runs open_clip's own command in turn"
    )
    options = parser.parse_args()
    options.cuda = options.device == "cuda"
    options.steps = options.steps or (30 if options.cuda else 4)
    options.batch_size = options.batch_size or (256 if options.cuda else 16)
    options.workers = options.workers or (12 if options.cuda else 1)
    return options


def write_train(options: argparse.Namespace, folder: Path) -> Path:
    """The folder of the shards to train on, which are written where they are not given."""
    # More than a round takes, so that workers are as busy in its last step as in its first.
    images = (WARM + options.steps + 4) * options.batch_size
    train = folder / "train"
    if options.peer is not None:
        samples = draw_photos(images, 0) if options.train is None else read_some(options.train, images)
        write_shared_shards(train, samples, -(-images // options.workers))
    elif options.train is not None:
        given: Path = options.train
        return given
    else:
        write_photo_shards(train, images)
    return train


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    options = read_arguments()
    warnings.filterwarnings("ignore")
    import torch

    cuda = options.cuda
    if cuda and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device is there, so nothing was measured")
    if options.threads:
        torch.set_num_threads(options.threads)
    peak = 1e12 * options.peak_tflops if options.peak_tflops else None
    if cuda and peak is None:
        peak = peak_of(torch.cuda.get_device_name())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setting = Setting(
            model=options.model or ("ViT-B-16" if cuda else "ViT-B-32"),
            device=options.device,
            precision=options.precision or ("bf16-mixed" if cuda else "32-true"),
            train=write_train(options, folder),
            folder=folder,
            batch_size=options.batch_size,
            workers=options.workers,
            steps=options.steps,
            peer=options.peer,
        )
        measured = measure(setting, options.rounds, peak)
    name = "training" if options.peer is None else "training-peer"
    name += f"-threads={options.threads}" if options.threads else ""
    keep(name, "Fine-tuning", options.device, measured, setting.model)


if __name__ == "__main__":
    main()
