"""Print at the start what a run will do, and refuse what cannot work before any time is spent on it."""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.sample import Sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.models.image_transform import ImageTransform
from lightning_xai.training.schedule import accumulated, planned_steps

__all__ = ["Preflight", "check_allocation", "slurm_job", "started_by_srun"]

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_PHOTOS = 100  # that are looked at for what the crop hides


class Preflight(Callback):
    """Prints, before training, how many samples make a step and how many steps make a run, and what is cropped.

    The global batch is what the contrastive loss sees: all processes' samples are negatives of each other.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print it."""
        text = describe(trainer, pl_module)
        if trainer.is_global_zero:
            # Shown before hours of computing.
            print("\n".join(filter(None, [text, describe_crop(trainer, pl_module, "train")])), flush=True)  # noqa: T201

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print how many photos are cropped, if any."""
        text = describe_crop(trainer, pl_module, "test") if trainer.is_global_zero else ""
        if text:
            print(text, flush=True)  # noqa: T201


def describe_crop(trainer: L.Trainer, module: L.LightningModule, split: str) -> str:
    """Say of how many of a split's first photos the model's crop hides more than a fifth; empty where of none."""
    data = getattr(trainer, "datamodule", None)
    transform = getattr(getattr(module, "encoder", None), "image_transform", None)
    if not isinstance(data, ShardDataModule) or not isinstance(transform, ImageTransform):
        return ""
    store, manifest = data.stores[split], data.manifest(split)
    if store is None:
        return ""
    count = min(_PHOTOS, manifest.samples)
    found = read_samples(store, manifest, range(len(manifest.shards)), 0, count)
    sizes = [record.size for _, record in found if isinstance(record, Sample)]
    cropped = sum(transform.geometry(size).is_cropped for size in sizes)
    if not cropped:
        return ""
    return (
        f"photos: the model's crop hides more than a fifth of {cropped} of the first {len(sizes)} of {split}; "
        "--model.fit letterbox shows them whole"
    )


def describe(trainer: L.Trainer, module: L.LightningModule) -> str:
    """Describe what will be trained, on which devices, in which steps."""
    trainer.fit_loop.setup_data()  # for the number of batches; Lightning does so later, and only once
    world_size = trainer.world_size
    device = trainer.strategy.root_device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    lines = [
        f"{parameters / 1e6:.1f} M parameters in {trainer.precision} on {world_size} x {where}"
        + (f" ({trainer.num_nodes} nodes)" if trainer.num_nodes > 1 else "")
    ]
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if isinstance(size, int):
        line = f"batch: {size:,} on each device, {size * world_size:,} in all, which are each other's negatives"
        chunk = getattr(module, "chunk_size", None)
        if chunk:
            line += f"; encoded {chunk} at a time"
        lines.append(line + _accumulation(trainer, size * world_size))
    total, batches = planned_steps(trainer), trainer.num_training_batches
    if total != math.inf:
        each = ""
        if batches != math.inf:
            each = f"{_in_turn(math.ceil(batches / number) for number in _accumulated(trainer))} an epoch, "
        if trainer.max_epochs not in (None, -1):
            each += f"{trainer.max_epochs:,} epoch{'s' * (trainer.max_epochs != 1)}, "
        lines.append(f"steps: {each}{int(total):,} in all")
    return "\n".join(lines)


def _accumulated(trainer: L.Trainer) -> list[int]:
    """How many batches make a step, at the start and wherever that changes in the run."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # Lightning leaves it undeclared
    starts = {0}.union(*(each.epochs for each in callbacks if isinstance(each, GradientAccumulationScheduler)))
    most = math.inf if trainer.max_epochs in (None, -1) else max(trainer.max_epochs, 1)
    return [accumulated(trainer, epoch) for epoch in sorted(starts) if epoch < most]


def _accumulation(trainer: L.Trainer, samples: int) -> str:
    """What makes a step, of batches of so many samples; empty where each batch does."""
    batches = trainer.num_training_batches
    # An epoch's last batch always ends a step.
    sizes = [int(min(number, batches)) for number in _accumulated(trainer)]
    if max(sizes) == 1:
        return ""
    text = f"; {_in_turn(sizes)} batches ({_in_turn(size * samples for size in sizes)} samples) make a step"
    rests = [0 if batches == math.inf else int(batches) % size for size in sizes]
    if any(rests):
        ends = [rest or size for rest, size in zip(rests, sizes, strict=True)]
        text += f", {_in_turn(ends)} ({_in_turn(end * samples for end in ends)} samples) the last one of an epoch"
    return text


def _in_turn(numbers: Iterable[int]) -> str:
    """Numbers that hold one after the other in a run.

    >>> _in_turn([1000, 1000]), _in_turn([2, 1])
    ('1,000', '2, then 1')
    """
    return ", then ".join(f"{number:,}" for number, _ in itertools.groupby(numbers))


def check_allocation(devices: Any, num_nodes: Any, accelerator: Any = "auto") -> None:
    """Compare what a run needs with what Slurm has allocated; does nothing outside of Slurm and under torchrun.

    Sets `SLURM_NTASKS_PER_NODE`, which Lightning asks for, to what srun has started: it is missing where the job was
    submitted with other options, and stale where a step is smaller than its job.

    Args:
        devices: the trainer's, as configured: a number (or its text), a list, `"auto"`.
        num_nodes: the trainer's.
        accelerator: the trainer's, as configured.

    Raises:
        ValueError: a job of several tasks was started without srun, the numbers do not fit, GPUs would be idle, tasks
            would have none, or the first node's name cannot be resolved.
    """
    if "SLURM_JOB_ID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    tasks = int(os.environ.get("SLURM_NTASKS", nodes))
    if not started_by_srun():
        # In the shell of an interactive allocation, Lightning starts the processes of this node by itself.
        if max(tasks, nodes) > 1 and (not _is_interactive() or int(num_nodes) > 1):
            raise ValueError(
                f"Slurm has allocated {max(tasks, nodes)} tasks on {nodes} node(s), but this process was started "
                "without srun: the others are missing, and it would wait for them in vain. Put srun in front, `srun "
                "python -m lightning_xai ...` (slurm/fit.sbatch does), or ask for one task: --nodes=1 --ntasks=1"
            )
        return
    spread = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or ""
    each = re.sub(r"\(x\d+\)", "", spread) or os.environ.get("SLURM_NTASKS_PER_NODE") or str(tasks // nodes)
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    here, wanted = int(each) if each.isdecimal() else None, _count(devices)
    trains_on_gpus = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    conflicts = {
        f"Slurm has started {tasks} tasks on {nodes} nodes with {each} a node: ask for --nodes=N and "
        "--ntasks-per-node=DEVICES, not for --ntasks": here is None or here * nodes != tasks,
        f"trainer.devices={devices}, but Slurm has started {each} task(s) on each node, and every task takes one "
        f"device: submit with --ntasks-per-node={wanted}, or set --trainer.devices={each}": (
            None not in (wanted, here) and wanted != here
        ),
        f"trainer.num_nodes={num_nodes}, but the job has {nodes} node(s): submit with --nodes={num_nodes}, or set "
        f"--trainer.num_nodes={nodes}": int(num_nodes) != nodes,
        f"Slurm has given this node {gpus} GPU(s) and started {each} task(s) on it, and every task takes one: "
        f"submit with --ntasks-per-node={gpus}, or with --gpus-per-node={each}": (
            trains_on_gpus and gpus.isdecimal() and here is not None and 0 < int(gpus) != here
        ),
    }
    for message, wrong in conflicts.items():
        if wrong:
            raise ValueError(message)
    os.environ["SLURM_NTASKS_PER_NODE"] = each
    address = os.environ.get("MASTER_ADDR")
    if address:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            raise ValueError(
                f"MASTER_ADDR={address} cannot be resolved on {socket.gethostname()} ({error}): set it to the first "
                "node's name or address as the other nodes know it"
            ) from error


def slurm_job() -> str | None:
    """This Slurm job's number, `12` or `12_3` in an array, which it keeps when it is requeued; None outside of a job.

    An interactive allocation is none, as for Lightning: it cannot be requeued.
    """
    if not {"SLURM_JOB_ID", "SLURM_NTASKS"} <= os.environ.keys():
        return None
    if _is_interactive():
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def started_by_srun() -> bool:
    """True if srun has started this process as one of its tasks, in a batch job or in an interactive allocation.

    Of the one task that is the shell of an interactive allocation, it is false.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    # The highest numbers are no steps of srun: batch scripts, and the shells of newer versions of salloc.
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP:
        return False
    return not _is_interactive() or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def _is_interactive() -> bool:
    """True in allocations of `salloc` and `srun --pty bash`, by the names that Lightning goes by, too."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def _count(devices: Any) -> int | None:
    """Number of devices that a setting names; None for `"auto"` and all."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdecimal() else None
