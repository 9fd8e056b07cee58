"""Report at the end of every epoch which shards held records that could not be used."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.excluded import shard_table

__all__ = ["DataFaults"]


class DataFaults(Callback):
    """Logs how many records were broken, and prints their shards and kinds.

    Logs `train/broken_records`, `val/broken_records` and `test/broken_records`, each at the end of its epoch, summed
    over all ranks; 0 if there were none. In `predict` they are printed, not logged, since Lightning logs nothing there.
    If they are more than the data module's `max_fault_fraction` allows, all ranks raise its
    `TooManyBrokenRecordsError`. Does nothing with other data modules than `ShardDataModule`.
    """

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report those of the epoch or of the split, but not of Lightning's sanity check of a few batches."""
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or not isinstance(data, ShardDataModule):
            return
        stage = trainer.state.stage
        logged = None if stage is None or trainer.predicting else stage.dataloader_prefix
        split = logged or data.predict_split
        counts = data.gather_faults(split)
        if logged:
            pl_module.log(f"{split}/broken_records", float(counts.total()), on_step=False, on_epoch=True)
        if counts and trainer.is_global_zero:
            epoch = f" of epoch {trainer.current_epoch}" if split == "train" else ""
            print(f"\nBroken records in {split}{epoch}, left out:\n{shard_table(counts)}", flush=True)  # noqa: T201

    on_train_epoch_end = on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
