"""Contrastive fine-tuning of a dual encoder, with the recipe of the feature-pair paper as defaults."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.data.batch import Batch
from lightning_xai.metrics.retrieval import RetrievalMetric
from lightning_xai.models.dual_encoder import CHECKPOINT_KEY, DualEncoder, load_dual_encoder
from lightning_xai.models.loss import contrastive_loss, gather_features

__all__ = ["ContrastiveFineTuning", "ContrastiveModule"]


class ContrastiveModule(L.LightningModule):
    """Trains the dual encoder it is given; `ContrastiveFineTuning` says how, and loads one.

    Args:
        encoder: the model.
        initial_lr: see `ContrastiveFineTuning`, as all the following.
        final_lr: learning rate of the last step.
        weight_decay: AdamW's weight decay.
        betas: AdamW's running averages.
        max_logit_scale: upper bound of the learned factor on similarities.
        recall_at: k of the validation's recall.
        val_group_size: images that are each other's negatives in the validation loss.

    Raises:
        ValueError: learning rates that are not positive, or a bound below 1.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        initial_lr: float,
        final_lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        max_logit_scale: float,
        recall_at: Sequence[int],
        val_group_size: int,
    ) -> None:
        super().__init__()
        if not (initial_lr > 0 and final_lr > 0):
            raise ValueError(f"initial_lr and final_lr have to be positive; got {initial_lr} and {final_lr}")
        if max_logit_scale < 1:
            raise ValueError(f"max_logit_scale has to be at least 1; got {max_logit_scale}")
        self.encoder = encoder
        self.initial_lr = initial_lr
        self.final_lr = final_lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.max_logit_scale = max_logit_scale
        self.retrieval = RetrievalMetric(ks=recall_at, group_size=val_group_size)
        self._batch_started = 0.0
        self._last_step: float | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings of a batch's images [B, K] and captions [C, K]."""
        return (
            normalize(self.encoder.encode_image(batch.images), dim=1),
            normalize(self.encoder.encode_text(batch.tokens), dim=1),
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning rate that changes by the same factor at every step from first to last."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.initial_lr, betas=self.betas, weight_decay=self.weight_decay
        )
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the learning rate rises over the whole run, so give the trainer max_epochs or max_steps")
        ratio, last = self.final_lr / self.initial_lr, max(int(steps) - 1, 1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: ratio ** (min(step, last) / last))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Take the time that passed since the step before began, loading this batch included."""
        now = time.perf_counter()
        self._last_step = now - self._batch_started if self._batch_started else None
        self._batch_started = now

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The contrastive loss of the global batch, the same on every rank."""
        image, text = self(batch)
        image, text, valid = gather_features(image, text, batch.valid)
        scale = self.encoder.logit_scale.exp()
        loss, accuracy = contrastive_loss(image, text, scale, valid)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", accuracy, prog_bar=True)
        self.log("train/logit_scale", scale.detach())
        # All of it here: a checkpoint is written in a callback's on_train_batch_end, before the module's, and holds
        # what was logged by then; and the scheduler has moved on to the next step's rate when the batch ends.
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self._last_step is not None:
            self.log("train/samples_per_second", len(batch.images) * self.trainer.world_size / self._last_step)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and clamp the logit scale: whoever looks at the model after a step sees it clamped."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.encoder.logit_scale.clamp_(0.0, math.log(self.max_logit_scale))

    def on_train_epoch_end(self) -> None:
        """Stop the clock: validation is no training time."""
        self._batch_started = 0.0

    def on_validation_start(self) -> None:
        """Stop the clock where validation interrupts an epoch, and evaluate one and the same model on all ranks."""
        self._batch_started = 0.0
        self._share_buffers()

    def on_test_start(self) -> None:
        """Evaluate one and the same model on all ranks."""
        self._share_buffers()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed images and all their captions; the numbers are computed at the end of the epoch."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As `validation_step`."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`."""
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/...`."""
        self._log_retrieval("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Unit-length embeddings: `image` [B, K] by `keys`, and `text` [C, K] by `captions` and `caption_image`."""
        image, text = self(batch)
        return {
            "keys": batch.keys,
            "valid": batch.valid,
            "image": image,
            "captions": batch.captions,
            "caption_image": batch.caption_image,
            "text": text,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep architecture and activation with the weights, so that they can never be loaded into another function."""
        checkpoint[CHECKPOINT_KEY] = self.encoder.architecture

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture."""
        found = checkpoint.get(CHECKPOINT_KEY)
        if found is None or found["model_cfg"] != self.encoder.architecture["model_cfg"]:
            name = "no model of this project" if found is None else f"a {found['name']} of another configuration"
            raise ValueError(
                f"the checkpoint holds {name}, this run trains a {self.encoder.architecture['name']}: "
                "set model to what the checkpoint was made with"
            )

    def _share_buffers(self) -> None:
        """Give all ranks the first one's batch statistics; in training each rank has followed its own batches."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for buffer in self.encoder.buffers():
                dist.broadcast(buffer, src=0)

    def _evaluate(self, batch: Batch) -> None:
        image, text = self(batch)
        self.retrieval.update(
            image, text, batch.index, batch.caption_image, batch.caption_index, self.encoder.logit_scale.exp()
        )

    def _log_retrieval(self, split: str) -> None:
        results = self.retrieval.compute()
        self.retrieval.reset()
        results[f"{split}/loss"] = results.pop("contrastive_loss")
        results[f"{split}/accuracy"] = results.pop("accuracy")
        for name, value in results.items():
            # Every rank holds the same number already.
            self.log(name if "/" in name else f"{split}/{name}", value, prog_bar=name == f"{split}/loss")


class ContrastiveFineTuning(ContrastiveModule):
    """Train a dual encoder with the symmetric contrastive loss, negatives gathered over all ranks with gradient.

    Logs `train/loss`, `train/accuracy`, `train/learning_rate` and `train/logit_scale` as the step was taken with them,
    and `train/samples_per_second`, all ranks together, from the beginning of the step before to that of this one,
    loading included; the first step of an epoch and the one after a validation have none. In validation: `val/loss`,
    `val/accuracy` and recall at k in both directions. Validation counts all captions of an image as its own; its loss
    is over fixed groups of images, so that it does not depend on the number of processes.

    Args:
        model: an open_clip name, the path of a JSON model config, or a checkpoint of this project (`.ckpt`).
        pretrained: an open_clip tag, a checkpoint file, or null for random weights.
        initial_lr: learning rate of the first step.
        final_lr: learning rate of the last step; it rises (or falls) exponentially in between.
        weight_decay: AdamW's weight decay, on all parameters as in the paper.
        betas: AdamW's running averages.
        max_logit_scale: the learned factor on similarities is kept between 1 and this.
        recall_at: k of the validation's recall.
        val_group_size: images that are each other's negatives in the validation loss.

    Raises:
        ValueError: unknown model or weights, learning rates that are not positive.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "openai",
        *,
        initial_lr: float = 1e-7,
        final_lr: float = 1e-5,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        max_logit_scale: float = 100.0,
        recall_at: Sequence[int] = (1, 5, 10),
        val_group_size: int = 64,
    ) -> None:
        super().__init__(
            load_dual_encoder(model, pretrained),
            initial_lr=initial_lr,
            final_lr=final_lr,
            weight_decay=weight_decay,
            betas=betas,
            max_logit_scale=max_logit_scale,
            recall_at=recall_at,
            val_group_size=val_group_size,
        )
