"""Retraining a model on degraded data: the expensive part of ROAR+ (M2IB paper, section 4.4).

If a method finds what matters, a model that is fine-tuned on images (captions) without it cannot learn, and its loss on
a validation set of original data is high.
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
from lightning_xai.results.trials import Retraining
from lightning_xai.training.contrastive import ContrastiveModule
from lightning_xai.training.nonfinite import NonFiniteLossError

__all__ = ["RoarRetraining", "process_as_before", "retrain"]

_IGNORED = (
    ".*isinstance.treespec, LeafSpec",  # a deprecation of torch, in Lightning's code
    "The '.*_dataloader' does not have many workers",  # the data sets of trials are small
    "GPU available but not used",  # the user's choice
)


class RoarRetraining(ContrastiveModule):
    """Fine-tune a model with the loss it was pretrained with, at a constant rate, and keep its validation losses.

    Args:
        encoder: the base model; it is trained, so pass a copy.
        options: of the training.
        name: of the trial, for messages.

    Attributes:
        curve: validation losses in nats: before training, and after each epoch.

    Raises:
        ValueError: a learning rate that is not positive, or a bound below 1.
    """

    def __init__(self, encoder: DualEncoder, options: Retraining, name: str) -> None:
        super().__init__(
            encoder,
            initial_lr=options.lr,
            final_lr=options.lr,
            weight_decay=options.weight_decay,
            betas=options.betas,
            fused=True,
            max_logit_scale=options.max_logit_scale,
            recall_at=(1,),
            val_group_size=options.val_group_size,
        )
        self.trial = name
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
                f"trial {self.trial}: {name} is {loss.item()}; lower the learning rate ({self.initial_lr}), or use "
                "precision 32-true, and run it again"
            )


def retrain(
    encoder: DualEncoder, train: Path, validation: Path, options: Retraining, *, name: str, seed: int
) -> list[float]:
    """Run one trial: fine-tune a copy of a model and measure it.

    The result depends on the arguments alone: not on what ran before in this process, nor on global random numbers
    (which are left seeded).

    Args:
        encoder: the base model, on the device to train on; it stays as it is.
        train: folder of shards to train on.
        validation: folder of shards to measure on.
        options: of the training.
        name: of the trial, for messages.
        seed: of the order of the samples, and of all that a model draws.

    Returns:
        `epochs + 1` validation losses in nats: before training, and after each epoch.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite.
        ValueError: an option outside its range, or fewer samples than a batch.
    """
    if options.epochs < 1:
        raise ValueError(f"epochs has to be at least 1; got {options.epochs}")
    L.seed_everything(seed, verbose=False)
    # The weights are copied, the tokenizer's large tables are not.
    model = copy.deepcopy(encoder, {id(encoder.tokenizer): encoder.tokenizer})
    module = RoarRetraining(model, options, name)
    module.train()  # the trainer keeps modes as they are
    data = ShardDataModule(
        train=train,
        val=validation,
        batch_size=options.batch_size,
        eval_batch_size=options.eval_batch_size,
        num_workers=options.num_workers,
        seed=seed,
        max_fault_fraction=0.0,
    )
    with process_as_before():
        _trainer(next(encoder.parameters()).device, options).fit(module, datamodule=data)
    if len(module.curve) != options.epochs + 1:
        done = len(module.curve) - 1
        raise RuntimeError(f"trial {name} stopped after {done} of {options.epochs} epochs; run it again")
    return module.curve


def _trainer(device: torch.device, options: Retraining) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.index is None or device.type != "cuda" else [device.index],
        # A trial is one process wherever it runs: Lightning must not act on Slurm's tasks and signals.
        plugins=[LightningEnvironment()],
        max_epochs=options.epochs,
        precision=options.precision,  # type: ignore[arg-type]  # a literal of many words; Lightning checks it
        deterministic="warn",
        num_sanity_val_steps=-1,  # the whole validation set, before training
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def process_as_before() -> Iterator[None]:
    """Restore on leaving what a deterministic trainer sets for the whole process, and keep it quiet inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, disabled = torch.backends.cudnn.benchmark, logging.root.manager.disable
    # Lightning would describe the trainer again for each trial.
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            for message in _IGNORED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logging.disable(disabled)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
