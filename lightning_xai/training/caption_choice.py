"""Measures, while a model learns, whether it prefers an image's own caption to a slightly wrong one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.data.batch import Batch
from lightning_xai.evaluation.method_run import from_first, gather_to_first

__all__ = ["CaptionChoiceCallback"]


@dataclass
class _Waiting:
    """Wrong captions of an evaluation on this rank, with what they are compared with, until its end."""

    image: list[Tensor] = field(default_factory=list)  # [N, K] each
    true: list[Tensor] = field(default_factory=list)  # [N], similarities of the true captions
    tokens: list[Tensor] = field(default_factory=list)  # [N, L], of the wrong ones
    excluded: int = 0


class CaptionChoiceCallback(Callback):
    """The share of wrong captions that are less similar to their image than the true one, after each epoch.

    Asks about the wrong captions of the validation's own batches: the hard negatives that shards hold and, with the
    data module's `swap_objects`, those made by `object_swaps`. A tie is a miss; chance is 0.5. Logs
    `val/caption_choice`, `val/caption_choice_targets` (how many wrong captions) and `val/caption_choice_excluded` (how
    many that the tokenizer cannot tell from the true one), the same on any number of processes.

    Args:
        every_n_epochs: measure in the validations of each n-th epoch, and before training.
        internal_batch_size: wrong captions embedded at a time.
    """

    def __init__(self, *, every_n_epochs: int = 1, internal_batch_size: int = 256) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "internal_batch_size": internal_batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} has to be at least 1; got {value}")
        self.every_n_epochs = every_n_epochs
        self.internal_batch_size = internal_batch_size
        self._waiting: _Waiting | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a measurement, in epochs that are measured."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking:
            due = trainer.num_sanity_val_steps == math.inf  # as GroundingCallback makes it: a whole validation
        else:
            due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._waiting = _Waiting() if due else None

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep a batch's wrong captions.

        They are embedded after the last batch: other callbacks listen to the model while it runs on a batch.
        """
        if self._waiting is None or not isinstance(batch, Batch) or not batch.negatives:
            return
        if not isinstance(outputs, Mapping) or not {"image", "text"} <= outputs.keys():
            raise ValueError(
                f"CaptionChoiceCallback compares what {type(pl_module).__name__}'s validation_step and test_step return: "
                "let them return the unit embeddings {'image': [B, K], 'text': [C, K]}, as ContrastiveModule does"
            )
        negatives = batch.negatives
        differs = (negatives.tokens != batch.tokens[negatives.caption_row]).any(dim=1)
        image = outputs["image"][negatives.image_row[differs]]
        self._waiting.image.append(image)
        self._waiting.true.append((image * outputs["text"][negatives.caption_row[differs]]).sum(dim=1))
        self._waiting.tokens.append(negatives.tokens[differs])
        self._waiting.excluded += int((~differs).sum())

    on_test_batch_end = on_validation_batch_end

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Embed the wrong captions, and log how many are less similar than the true ones."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        right = asked = 0
        if waiting.tokens:
            parts = (
                torch.cat(part).split(self.internal_batch_size)
                for part in (waiting.image, waiting.true, waiting.tokens)
            )
            for image, true, tokens in zip(*parts, strict=True):
                wrong = (image * normalize(pl_module.encoder.encode_text(tokens), dim=1)).sum(dim=1)
                right, asked = right + int((true > wrong).sum()), asked + len(true)
        counts = gather_to_first((right, asked, waiting.excluded))
        right, asked, excluded = from_first(lambda: tuple(sum(column) for column in zip(*counts, strict=True)))
        split = "test" if trainer.testing else "val"
        numbers = {"": right / asked if asked else math.nan, "_targets": asked, "_excluded": excluded}
        for name, value in numbers.items():
            pl_module.log(f"{split}/caption_choice{name}", float(value), prog_bar=not name)

    on_test_epoch_end = on_validation_epoch_end
