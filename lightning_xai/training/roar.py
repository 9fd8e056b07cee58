"""Retraining a model on data that a heat map degraded: the part of ROAR+ that costs time.

M2IB paper, section 4.4: if a method finds what matters, a model that is fine-tuned on images (captions) without it
cannot learn, and its loss on a validation set of original data is high. One run, called a cell here, is one method, one
modality and one seed.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.training.contrastive import ContrastiveModule

__all__ = ["NonFiniteLossError", "RoarRetraining", "retrain"]

_TALKATIVE = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
_NO_NEWS = (
    ".*isinstance.treespec, LeafSpec",  # torch on Lightning
    "The '.*_dataloader' does not have many workers",  # the data sets of cells are small
    "GPU available but not used",  # the user's choice
)


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite, so that the cell has no result."""


class RoarRetraining(ContrastiveModule):
    """Fine-tune a model with the loss it was pretrained with, at a constant rate, and keep its validation losses.

    Args:
        encoder: the base model; it is trained, so hand over a copy.
        cell: the cell's name, for messages.
        lr: learning rate of AdamW.
        weight_decay: of AdamW, on all parameters.
        betas: AdamW's running averages.
        max_logit_scale: the learned factor on similarities is kept between 1 and this.
        val_group_size: images that are each other's negatives in the validation loss.

    Attributes:
        curve: validation losses in nats: before training, and after each epoch.

    Raises:
        ValueError: a learning rate that is not positive, or a bound below 1.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        cell: str,
        lr: float = 1e-5,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        max_logit_scale: float = 100.0,
        val_group_size: int = 64,
    ) -> None:
        super().__init__(
            encoder,
            initial_lr=lr,
            final_lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            max_logit_scale=max_logit_scale,
            recall_at=(1,),
            val_group_size=val_group_size,
        )
        self.cell = cell
        self.curve: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The contrastive loss of a batch.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        loss = super().training_step(batch, batch_idx)
        self._check(loss, f"the training loss of epoch {self.current_epoch}, batch {batch_idx}")
        return loss

    def on_validation_epoch_end(self) -> None:
        """Add to the curve.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        loss = torch.tensor(self.retrieval.compute()["contrastive_loss"], dtype=torch.float64)
        self._check(loss, f"the validation loss after {len(self.curve)} epochs")
        self.curve.append(loss.item())
        super().on_validation_epoch_end()

    def _check(self, loss: Tensor, name: str) -> None:
        if not loss.isfinite():
            raise NonFiniteLossError(
                f"cell {self.cell}: {name} is {loss.item()}; lower the learning rate ({self.initial_lr}), or use "
                "precision 32-true, and run it again"
            )


def retrain(  # noqa: PLR0913 - the signature is the configuration
    encoder: DualEncoder,
    train: Path,
    validation: Path,
    *,
    cell: str,
    seed: int,
    epochs: int = 5,
    batch_size: int = 64,
    eval_batch_size: int = 256,
    lr: float = 1e-5,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    max_logit_scale: float = 100.0,
    val_group_size: int = 64,
    precision: str = "32-true",
    num_workers: int = 0,
) -> list[float]:
    """Run one cell: fine-tune a copy of a model and measure it.

    The result depends on the arguments alone: not on what ran before in this process, nor on global random numbers
    (which are left seeded).

    Args:
        encoder: the base model, on the device to train on; it stays as it is.
        train: folder of shards to train on.
        validation: folder of shards to measure on.
        cell: the cell's name, for messages.
        seed: of the order of the samples, and of all that a model draws.
        epochs: passes over the training data.
        batch_size: images in a training batch, each other's negatives.
        eval_batch_size: images in an evaluation batch; changes no number.
        lr: see `RoarRetraining`, as the next four.
        weight_decay: of AdamW.
        betas: of AdamW.
        max_logit_scale: upper bound of the factor on similarities.
        val_group_size: images that are each other's negatives in the validation loss.
        precision: of Lightning's Trainer.
        num_workers: processes that read and decode.

    Returns:
        `epochs + 1` validation losses in nats: before training, and after each epoch.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite.
        ValueError: an option outside its range, or fewer samples than a batch.
    """
    if epochs < 1:
        raise ValueError(f"epochs has to be at least 1; got {epochs}")
    L.seed_everything(seed, verbose=False)
    module = RoarRetraining(
        # Weights are copied, the tokenizer's large tables are not.
        copy.deepcopy(encoder, {id(encoder.tokenizer): encoder.tokenizer}),
        cell=cell,
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        max_logit_scale=max_logit_scale,
        val_group_size=val_group_size,
    )
    module.train()  # the trainer leaves modes as they are
    data = ShardDataModule(
        train=train,
        val=validation,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        num_workers=num_workers,
        seed=seed,
        max_fault_fraction=0.0,
    )
    with _quiet(), _deterministic_only_here():
        _trainer(next(encoder.parameters()).device, epochs, precision).fit(module, datamodule=data)
    if len(module.curve) != epochs + 1:
        raise RuntimeError(f"cell {cell} stopped after {len(module.curve) - 1} of {epochs} epochs; run it again")
    return module.curve


def _trainer(device: torch.device, epochs: int, precision: str) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.index is None or device.type != "cuda" else [device.index],
        # A cell is one process wherever it runs: nothing of Slurm's tasks and signals is Lightning's business here.
        plugins=[LightningEnvironment()],
        max_epochs=epochs,
        precision=precision,  # type: ignore[arg-type]  # a literal of many words; Lightning checks it
        deterministic="warn",
        num_sanity_val_steps=-1,  # the whole validation set, before training
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _deterministic_only_here() -> Iterator[None]:
    """On leaving, what a deterministic trainer sets for the whole process is as before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Lightning does not say for each cell anew what the trainer is and has."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _NO_NEWS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
