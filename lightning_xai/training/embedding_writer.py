"""Save what `predict` computes: the embeddings of a split's images and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter

__all__ = ["EmbeddingWriter"]


class EmbeddingWriter(BasePredictionWriter):
    """One `embeddings/rank_R.npz` for each rank, in the run's folder, without padding and broken records.

    Arrays: `keys` [N] and `image` [N, K] of the images, `captions` [C], `caption_key` [C] and `text` [C, K] of the
    captions; embeddings are float32 of unit length, strings are unicode (nothing is pickled).
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[dict[str, Any]],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write this rank's batches to one file."""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "embeddings"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{trainer.global_rank}.npz"
        np.savez(path, **_arrays(predictions))
        print(f"Saved {path}")  # noqa: T201 - the result of the command


def _arrays(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys, caption_keys, captions, images, texts = [], [], [], [], []
    for batch in predictions:
        valid = batch["valid"].cpu()
        keys += [key for key, kept in zip(batch["keys"], valid.tolist(), strict=True) if kept]
        images.append(batch["image"].float().cpu()[valid].numpy())
        captions += batch["captions"]
        caption_keys += [batch["keys"][row] for row in batch["caption_image"].tolist()]
        texts.append(batch["text"].float().cpu().numpy())
    return {
        "keys": np.array(keys, dtype=np.str_),
        "image": np.concatenate(images),
        "captions": np.array(captions, dtype=np.str_),
        "caption_key": np.array(caption_keys, dtype=np.str_),
        "text": np.concatenate(texts),
    }
