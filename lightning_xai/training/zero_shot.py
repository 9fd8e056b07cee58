"""Measures, while a model learns, what it may lose: zero-shot classification of images that it is not trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_xai.evaluation.zero_shot import ZeroShot, ZeroShotResult
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.training.measurement import check_monitors, find_encoder, is_due

__all__ = ["ZeroShotCallback"]

_LOGGED = ("zero_shot_accuracy", "zero_shot_accuracy_top_5", "zero_shot_images", "zero_shot_skipped")
_SHOWN = 5  # images that could not be read


class ZeroShotCallback(Callback):
    """Zero-shot accuracy on a folder of images after each epoch, on all ranks.

    Works with any LightningModule that has a `DualEncoder`. Logs `val/zero_shot_accuracy` in [0, 1] (higher is better),
    `val/zero_shot_accuracy_top_5` where there are more than five classes, `val/zero_shot_images`, how many images were
    classified, and `val/zero_shot_skipped`, how many could not be read; `test/...` in a test run. Checkpoint callbacks
    can monitor each of them. `GroundingCallback` has them in its table, its curves and its `summary.csv`, and where it
    measures the model before training, this callback does so, too.

    Each rank classifies a part of the images. The numbers are the same on any number of ranks, and nothing in the
    training depends on them. Images are turned upright, as in training.

    Args:
        folder: a subfolder of images (JPEG, PNG, WebP) for each class, as torchvision's `ImageFolder`.
        classes: null: the folders' names, with blanks for underscores, are the classes' names; imagenet: open_clip's
            names of the 1000 classes of ImageNet, whose folders are their WordNet ids; or a mapping of folders to
            names, or a text file with a line for each folder: its name, a tab, and the name of the class.
        templates: openai (80 templates of the CLIP paper), simple (7 of them), or a list of texts with {} where the
            name goes. A class is the mean of its texts' embeddings.
        every_n_epochs: measure in the validations of each n-th epoch, and where training ends.
        batch_size: images, and about as many texts, that pass through a tower at a time.
        num_workers: processes of each rank that read images; 0 reads in the main process.

    Attributes:
        result: of the latest measurement; None before the first.

    Raises:
        ValueError: an option outside its range; at set-up: a folder or names that cannot be classified, no DualEncoder,
            or a callback that monitors zero-shot accuracy in epochs that are not measured.
    """

    def __init__(
        self,
        folder: Path,
        *,
        classes: dict[str, str] | str | None = None,
        templates: list[str] | str = "openai",
        every_n_epochs: int = 1,
        batch_size: int = 64,
        num_workers: int = 2,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs has to be at least 1; got {every_n_epochs}")
        self.task = ZeroShot(
            folder, classes=classes, templates=templates, batch_size=batch_size, num_workers=num_workers
        )
        self.every_n_epochs = every_n_epochs
        self.result: ZeroShotResult | None = None
        self._encoder: DualEncoder | None = None
        self._warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all that could fail later, before anything is computed."""
        if stage == "predict":
            return
        self._encoder = find_encoder(pl_module, type(self).__name__)
        if stage == "fit":
            check_monitors(trainer, {f"val/{name}" for name in _LOGGED}, type(self).__name__, self.every_n_epochs)

    # Not on_validation_end: there nothing can be logged any more. Not on_validation_start: that of a sharded module,
    # which gathers its parameters, comes after those of callbacks.
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Classify the images, and log how many were right, in epochs that are measured."""
        if trainer.sanity_checking:
            due = trainer.num_sanity_val_steps == math.inf  # a whole validation, that of GroundingCallback
        else:
            due = is_due(trainer, self.every_n_epochs)
        if not due:
            return
        assert self._encoder is not None, "Lightning calls setup first"
        show = _print if trainer.is_global_zero else None
        self.result = self.task.measure(self._encoder, trainer.precision_plugin.forward_context, show)
        self._tell_of_skipped(trainer, self.result)
        values = (self.result.accuracy, self.result.accuracy_top, self.result.images, self.result.skipped)
        split = "test" if trainer.testing else "val"
        for name, value in zip(_LOGGED, values, strict=True):
            if value is not None:
                # Every rank holds the same number already.
                pl_module.log(f"{split}/{name}", float(value), prog_bar=name == _LOGGED[0])

    on_test_epoch_end = on_validation_epoch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep no model alive."""
        self._encoder = None

    def _tell_of_skipped(self, trainer: L.Trainer, result: ZeroShotResult) -> None:
        """Name images that could not be read, once; their number is logged each time."""
        if not result.skipped or self._warned or not trainer.is_global_zero:
            return
        self._warned = True
        more = f"\n... and {result.skipped - _SHOWN:,} more" if result.skipped > _SHOWN else ""
        reasons = "\n".join(result.reasons[:_SHOWN])
        whole = result.images + result.skipped
        _print(f"\nZero-shot classification skipped {result.skipped:,} of {whole:,} images:\n{reasons}{more}")


def _print(text: Any) -> None:
    print(text, flush=True)  # noqa: T201 - a log without lines looks like a run that hangs
