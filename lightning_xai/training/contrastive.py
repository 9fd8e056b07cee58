"""Contrastive fine-tuning of a dual encoder, with the recipe of the feature-pair paper as defaults."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_xai.data.batch import Batch
from lightning_xai.loss import global_contrastive_loss
from lightning_xai.metrics.retrieval import RetrievalMetric
from lightning_xai.models.dual_encoder import CHECKPOINT_KEY, DualEncoder
from lightning_xai.models.loading import load_dual_encoder
from lightning_xai.models.sharding import (
    gather_parameters,
    is_sharded,
    mend_optimizer_state,
    release_parameters,
    shard_encoder,
)

__all__ = ["ContrastiveFineTuning", "ContrastiveModule"]


class ContrastiveModule(L.LightningModule):
    """Train a dual encoder with the symmetric contrastive loss, negatives gathered over all ranks with gradient.

    The one signature of training options: subclasses decide which model is trained, and pass the options on.

    Logs `train/loss`, `train/accuracy`, `train/learning_rate` and `train/logit_scale` as the step was taken with them,
    and `train/samples_per_second`, all ranks together, from the start of the previous step to that of this one,
    loading included; the first step of an epoch and the one after a validation have none. In validation: `val/loss`,
    `val/accuracy` and recall at k in both directions. Validation counts all captions of an image as its positives; its
    loss is over fixed groups of images, so that it does not depend on the number of processes.

    Args:
        encoder: the model to train.
        initial_lr: learning rate of the first step.
        final_lr: learning rate of the last step; it rises (or falls) exponentially in between.
        weight_decay: AdamW's weight decay, on all parameters as in the paper.
        betas: AdamW's running averages.
        max_logit_scale: the learned factor on similarities is kept between 1 and this.
        recall_at: k of the validation's recall.
        val_group_size: images that are each other's negatives in the validation loss.
        gradient_checkpointing: keep only the inputs of the towers' blocks for the backward pass, and run each block
            again there: less memory for a third more computing, the same numbers.
        chunk_size: pairs that are embedded at a time in training, where a batch's activations do not fit in memory
            (GradCache). All pairs of the batch, over all ranks, stay each other's negatives; the gradient is the same,
            for a third more computing. Null embeds the whole batch at once. Where both are given, memory is that of a
            chunk with gradient checkpointing, and computing two thirds more.
        compile: run the towers of the training step through torch.compile; validation and attribution run them as
            they are. Checkpoints are the same with and without.

    Raises:
        ValueError: learning rates that are not positive, a bound or a chunk size below 1, or a model that an option
            does not suit: one with batch statistics cannot be run in chunks or again.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        encoder: DualEncoder,
        *,
        initial_lr: float = 1e-7,
        final_lr: float = 1e-5,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        max_logit_scale: float = 100.0,
        recall_at: Sequence[int] = (1, 5, 10),
        val_group_size: int = 64,
        gradient_checkpointing: bool = False,
        chunk_size: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        # Lightning warns of every module that has this hook, although data modules rarely have their own.
        warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device` in `LightningModule`")
        if not (initial_lr > 0 and final_lr > 0):
            raise ValueError(f"initial_lr and final_lr have to be positive; got {initial_lr} and {final_lr}")
        if max_logit_scale < 1:
            raise ValueError(f"max_logit_scale has to be at least 1; got {max_logit_scale}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size has to be at least 1, or null for no chunks; got {chunk_size}")
        if gradient_checkpointing or chunk_size is not None:
            _refuse_batch_statistics(encoder)
        for name, parameter in encoder.named_parameters():
            # SigLIP's bias cancels out in the softmax: without gradient, DDP would wait for it at the second step.
            if name.rpartition(".")[2] == "logit_bias":
                parameter.requires_grad_(False)
        self.encoder = encoder
        self.initial_lr = initial_lr
        self.final_lr = final_lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.max_logit_scale = max_logit_scale
        self.retrieval = RetrievalMetric(ks=recall_at, group_size=val_group_size)
        self._batch_started = 0.0
        self._last_step: float | None = None
        self.chunk_size = chunk_size
        self._compiled = compile
        if gradient_checkpointing:
            encoder.checkpoint_blocks()
        if compile:
            encoder.compile_towers()

    def configure_model(self) -> None:
        """Under `ModelParallelStrategy`, spread the encoder over all processes.

        Raises:
            ValueError: a strategy that also splits single layers, or that the options do not go with.
        """
        mesh = self.device_mesh
        if mesh is None or is_sharded(self.encoder):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "this model is sharded over whole processes, not within a layer: give ModelParallelStrategy "
                f"tensor_parallel_size: 1 and data_parallel_size: {mesh.size()}; got tensor_parallel_size "
                f"{mesh['tensor_parallel'].size()}"
            )
        if self._compiled:
            raise ValueError("compile does not go with ModelParallelStrategy: set compile to false, or take ddp")
        loops = (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.fit_loop.epoch_loop.val_loop)
        if any(loop.inference_mode for loop in loops):
            raise ValueError(
                "parameters that are gathered in inference mode cannot be trained: set inference_mode=False"
            )
        shard_encoder(self.encoder, mesh["data_parallel"])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Cut a training batch's captions after its longest one.

        Done on the host: finding the longest caption on the device would make the host wait for it.
        """
        if isinstance(batch, Batch) and self.trainer.training:
            batch = replace(batch, tokens=self.encoder.trim_tokens(batch.tokens).contiguous())
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

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

    def on_train_start(self) -> None:
        """Make the optimizer fit to go on, where it comes from a checkpoint."""
        mend_optimizer_state(self.encoder, self.trainer.optimizers[0])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Measure the time since the previous step began, loading this batch included."""
        now = time.perf_counter()
        self._last_step = now - self._batch_started if self._batch_started else None
        self._batch_started = now

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The contrastive loss of the global batch, the same on every rank.

        Raises:
            ValueError: the global batch is one pair, which has no negatives.
        """
        if len(batch.images) * self.trainer.world_size == 1:
            raise ValueError(
                "a batch of one pair has no negatives, so that loss and gradient are zero: raise --data.batch_size "
                "(with chunk_size, pairs that do not fit into memory at once still are one batch)"
            )
        # In float32, as the loss: half precision has no number as small as the bound that keeps zeros from being NaN.
        image, text = (
            normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
            for x in self.encoder(batch.images, batch.tokens, self.chunk_size)
        )
        scale = self.encoder.logit_scale.exp()
        loss, accuracy = global_contrastive_loss(image, text, scale, batch.valid)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", accuracy, prog_bar=True)
        self.log("train/logit_scale", scale.detach())
        # Logged here, not in on_train_batch_end: callbacks write checkpoints, with all that is logged by then, before
        # the module's turn comes, and the scheduler has already moved on to the next step's rate.
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        if self._last_step is not None:
            self.log("train/samples_per_second", len(batch.images) * self.trainer.world_size / self._last_step)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step and clamp the logit scale, so that the model is never seen with a scale out of bounds."""
        super().optimizer_step(*args, **kwargs)
        self.encoder.clamp_logit_scale(self.max_logit_scale)

    def on_train_epoch_end(self) -> None:
        """Stop the clock: validation does not count as training time."""
        self._batch_started = 0.0

    def on_validation_start(self) -> None:
        """Stop the clock where validation interrupts an epoch, and evaluate the same model on all ranks."""
        self._batch_started = 0.0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # In training each rank collects batch statistics of its own batches; here all take the first one's.
            for buffer in self.encoder.buffers():
                dist.broadcast(buffer, src=0)
        gather_parameters(self.encoder)

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Gather parameters that are spread over ranks."""
        gather_parameters(self.encoder)

    def on_validation_end(self) -> None:
        """Release the gathered parameters."""
        release_parameters(self.encoder)

    on_test_end = on_predict_end = on_validation_end

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed images and all their captions; the numbers are computed at the end of the epoch."""
        image, text = self(batch)
        self.retrieval.update(
            image, text, batch.index, batch.caption_image, batch.caption_index, self.encoder.logit_scale.exp()
        )

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`, or `test/...`."""
        split = "test" if self.trainer.testing else "val"
        results = self.retrieval.compute()
        self.retrieval.reset()
        results[f"{split}/loss"] = results.pop("contrastive_loss")
        results[f"{split}/accuracy"] = results.pop("accuracy")
        for name, value in results.items():
            # Reduced over the ranks by the metric: every rank holds the same number.
            self.log(name if "/" in name else f"{split}/{name}", value, prog_bar=name == f"{split}/loss")

    on_test_epoch_end = on_validation_epoch_end

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
        own = self.encoder.architecture
        differs = next((part for part in ("model_cfg", "preprocess_cfg") if found and found[part] != own[part]), None)
        if found is None or differs is not None:
            name = "no model of this project" if found is None else f"a {found['name']} of another configuration"
            raise ValueError(
                f"the checkpoint holds {name}, this run trains a {self.encoder.architecture['name']}: "
                f"{_difference(found, own, differs)}set model to what the checkpoint was made with"
            )


def _difference(found: Mapping[str, Any] | None, own: Mapping[str, Any], part: str | None) -> str:
    """The pixels that a checkpoint's model sees, where this one's sees others, and how to give them."""
    if found is None or part != "preprocess_cfg":
        return ""
    old, new = found[part], own[part]
    differing = [
        f"{key} was {old.get(key)} and is {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    return (
        f"it sees other pixels ({', '.join(differing)}); give the former ones as image_mean, image_std, interpolation, "
        "resize_mode or image_size of the model, or "
    )


def _refuse_batch_statistics(encoder: DualEncoder) -> None:
    found = next((name for name, child in encoder.model.named_modules() if isinstance(child, _BatchNorm)), None)
    if found is not None:
        raise ValueError(
            f"{encoder.name} has batch statistics ({found}), which differ between a chunk and the whole batch, and "
            "would be counted twice where layers are run again: set chunk_size to null and gradient_checkpointing to "
            "false, or take a model without BatchNorm, such as a ViT"
        )


class ContrastiveFineTuning(ContrastiveModule):
    """Load a dual encoder and fine-tune it, with the recipe of the feature-pair paper as defaults.

    Args:
        model: an open_clip name, the path of a JSON model config, a checkpoint of this project (`.ckpt`), an open_clip
            folder, `hf-hub:OWNER/NAME`, or `hf:FOLDER`, a folder of Hugging Face's transformers.
        pretrained: an open_clip tag, a checkpoint file, or null for random weights.
        image_size: (height, width) of images in pixels, or one number for both; null: that of the model.
        image_mean: mean of each channel, of pixel values in [0, 1]; null: that of the weights.
        image_std: standard deviation of each channel, likewise.
        interpolation: of resizing images, likewise: bicubic, bilinear or random.
        resize_mode: likewise: shortest (crop what sticks out), longest (pad) or squash (give the aspect ratio up).
        quick_gelu: whether the transformers compute with OpenAI's QuickGELU; null: as the weights were trained.
        options: see `ContrastiveModule`, which also lists what is logged.

    Raises:
        ValueError: unknown model or weights, or as `ContrastiveModule`.
    """

    # The parser of configs follows `options` to the signature that they are passed on to.
    def __init__(
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "openai",
        *,
        image_size: int | tuple[int, int] | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
        interpolation: str | None = None,
        resize_mode: str | None = None,
        quick_gelu: bool | None = None,
        **options: Any,
    ) -> None:
        encoder = load_dual_encoder(
            model,
            pretrained,
            image_size=image_size,
            image_mean=image_mean,
            image_std=image_std,
            interpolation=interpolation,
            resize_mode=resize_mode,
            quick_gelu=quick_gelu,
        )
        super().__init__(encoder, **options)
