"""What callbacks that measure a model in validation have in common: when, which model, and who looks at the numbers."""

from __future__ import annotations

import math
from collections.abc import Collection

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.training.schedule import ends_training

__all__ = ["check_monitors", "find_encoder", "is_due", "is_fitting"]


def is_fitting(trainer: L.Trainer) -> bool:
    """True in `fit`, its validations included."""
    return trainer.state.fn == TrainerFn.FITTING


def is_due(trainer: L.Trainer, every_n_epochs: int) -> bool:
    """True if a validation or test that starts, but not the check before training, is to be measured.

    That is those of each n-th epoch, one that is there because training ends, and all outside of training.
    """
    due = (trainer.current_epoch + 1) % every_n_epochs == 0
    return due or not is_fitting(trainer) or _ends_off_schedule(trainer)


def find_encoder(module: L.LightningModule, callback: str) -> DualEncoder:
    """The `DualEncoder` of a module: its attribute `encoder`, or any among its modules.

    Args:
        module: the module.
        callback: who asks, for the message.

    Raises:
        ValueError: there is none.
    """
    candidates = [getattr(module, "encoder", None), *module.modules()]
    found = next((candidate for candidate in candidates if isinstance(candidate, DualEncoder)), None)
    if found is None:
        raise ValueError(
            f"{callback} found no DualEncoder in {type(module).__name__}: keep one as `self.encoder`, "
            "made by lightning_xai.models.load_dual_encoder"
        )
    return found


def check_monitors(trainer: L.Trainer, names: Collection[str], callback: str, every_n_epochs: int) -> None:
    """Refuse callbacks that look at a number in epochs in which it is not measured.

    A checkpoint would otherwise compare epochs by numbers that are missing, or are those of an earlier epoch.

    Args:
        trainer: whose callbacks are checked.
        names: what is logged, as `val/rho`.
        callback: who logs it, for the message.
        every_n_epochs: how often.

    Raises:
        ValueError: there is such a callback.
    """
    for each in (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks):
        monitor = str(getattr(each, "monitor", None))
        looks_every = getattr(each, "every_n_epochs", 1)
        if monitor not in names or not looks_every:
            continue
        if math.lcm(looks_every, trainer.check_val_every_n_epoch or 1) % every_n_epochs:
            raise ValueError(
                f"{type(each).__name__} looks at {monitor} every {looks_every} epochs, {callback} "
                f"measures it every {every_n_epochs}: give both the same every_n_epochs, or set "
                f"Trainer(check_val_every_n_epoch={every_n_epochs})"
            )


def _ends_off_schedule(trainer: L.Trainer) -> bool:
    """True if this validation is there because training ends: within an epoch, or after one without a validation."""
    regular = trainer.is_last_batch and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
    return ends_training(trainer) and not regular
