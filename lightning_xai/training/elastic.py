"""Go on with a training run on another number of processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L

from lightning_xai.data.datamodule import Redealt, ShardDataModule
from lightning_xai.training.schedule import accumulated, steps_of_epochs

__all__ = ["go_on_elastically"]


def go_on_elastically(trainer: L.Trainer, checkpoint: dict[str, Any]) -> str | None:
    """Make a checkpoint fit the number of processes that go on from it, before Lightning takes up its loops.

    The data module deals out the rest of the epoch again. The batches that were done count as so many of the new size
    that the epoch's length stays that of all others, and a schedule that is a function of the step goes on at the
    same share of the run.

    Args:
        trainer: its data module has taken up its own state.
        checkpoint: as Lightning has loaded it; changed in place.

    Returns:
        What has changed, as a sentence; None where the number of processes is the same.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ShardDataModule):
        return None
    loop = checkpoint["loops"]["fit_loop"]
    progress, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    over = progress["is_last_batch"]
    change = data.deal_again(over, partial(accumulated, trainer))
    if change is None:
        return None
    loop["state_dict"].pop("combined_loader", None)  # the former position, which the data module has made the new one
    shift = change.passed - progress["current"]["ready"]
    progress["current"] = {name: count + shift for name, count in progress["current"].items()}
    if not over and change.passed == change.batches:  # as at the end of an epoch
        progress["is_last_batch"] = True
        # Counted after the hook in which it was saved, as `completed` is: else two batches are logged as one step.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += (
            progress["total"]["processed"] - progress["total"]["completed"]
        )
        for counts in (progress["current"], progress["total"]):
            counts["completed"] = counts["processed"]
        for counts in epochs.values():
            counts["processed"] += 1
    return f"{_describe(change, over)}{_move_schedules(trainer, checkpoint, change)}."


def _move_schedules(trainer: L.Trainer, checkpoint: dict[str, Any], change: Redealt) -> str:
    """Move schedules to the same share of a run whose epochs have another number of steps; says so."""
    accumulate = accumulated(trainer, change.epoch)
    before, now = (-(-batches // accumulate) for batches in (change.batches_before, change.batches))
    done, step = (  # where it is, moved or not
        steps_of_epochs(trainer, batches, range(change.epoch)) + -(-within // accumulate)
        for batches, within in ((change.batches_before, change.given), (change.batches, change.passed))
    )
    if (before, done) == (now, step) or trainer.max_steps != -1:  # a run of so many steps keeps them
        return ""
    moved = kept = 0
    for state in checkpoint["lr_schedulers"]:
        if state.get("last_epoch") not in (done, checkpoint["global_step"]):
            continue  # it does not count steps
        if "lr_lambdas" in state:
            state |= {"last_epoch": step, "_step_count": step + 1}
            moved += 1
        else:  # computed from the rate before, step by step
            kept += 1
    text = f"; an epoch has {now:,} steps in place of {before:,}"
    text += f", the learning rate's schedule goes on at step {step:,} of these" if moved else ""
    return text + (", and a schedule of the learning rate goes on with the steps that were done" if kept else "")


def _describe(change: Redealt, over: bool) -> str:
    shapes = [
        f"{ranks} process{'es' if ranks > 1 else ''} with batches of {size} ({ranks * size} in all)"
        for ranks, size in (change.now, change.was)
    ]
    left = change.batches - change.passed
    if over:
        where = f"from epoch {change.epoch + 2} on"
    elif left == 0:
        where = f"from epoch {change.epoch + 2} on: what is left of epoch {change.epoch + 1} fills no step"
    else:
        where = (
            f"in epoch {change.epoch + 1}, after {change.given:,} batches: {left:,} of the new size remain, and no "
            "sample comes twice"
        )
    return f"Going on with {shapes[0]} in place of {shapes[1]}, {where}"
