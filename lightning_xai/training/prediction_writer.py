"""Save what `predict` computes, part by part: embeddings of a split, and maps of its phrases or captions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_xai.atomic_file import as_read, read_json, write_json
from lightning_xai.attribution.method_options import check_method, choose_method
from lightning_xai.attribution.pairwise import PairwiseMethod
from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.evaluation.rows import MethodMaps, Wanted, maps_of
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import measurable
from lightning_xai.models.fingerprint import weights_fingerprint
from lightning_xai.results.predictions import PredictionPart, part_paths, read_part, write_part
from lightning_xai.results.record import settings_that_differ

__all__ = ["PredictionWriter"]

_SETTINGS = "settings.json"
_ROWS = {"caption_image": "index", "phrase_caption": "text"}  # arrays of rows -> the array whose rows they count


class PredictionWriter(L.Callback):
    """Writes a part whenever there is enough, without padding and broken records; what is there is not computed again.

    A `predict` that was stopped goes on where it was, with any number of processes, if its folder is the same. See
    `lightning_xai.results.predictions` for the files, and for `read_predictions`, which reads them.

    Args:
        folder: where to write; None: `predictions` in the logger's folder.
        maps: besides embeddings, write the `phrases`' maps, or the full `interactions` of every image and caption,
            tokens x patches; None: neither.
        method: that makes the maps; interactions need one with token-patch attributions.
        options: of the method.
        internal_batch_size: pairs that are attributed at a time; bounds memory, changes no number.
        part_megabytes: size from which on a part is written.
        part_seconds: age from which on a part is written.

    Raises:
        ValueError: unknown method, one without interactions where these are asked for; at the start: the folder holds
            predictions of other settings.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        maps: Literal["phrases", "interactions"] | None = None,
        method: str = "feature_pair",
        options: dict[str, Any] | None = None,
        internal_batch_size: int = 64,
        part_megabytes: float = 64.0,
        part_seconds: float = 60.0,
    ) -> None:
        check_method(method, pairwise="maps=interactions" if maps == "interactions" else None)
        self.folder = folder
        self.maps = maps
        self.method = method
        self.options = options or {}
        self.internal_batch_size = internal_batch_size
        self.part_bytes = part_megabytes * 2**20
        self.part_seconds = part_seconds
        self._place = Path()
        self._maker: MethodMaps | None = None
        self._rows: list[PredictionPart] = []
        self._begun = 0.0
        self._number = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out what an earlier run has computed, before anything is read."""
        if stage != "predict":
            return
        if self.maps is not None and trainer.predict_loop.inference_mode:
            raise ValueError(
                "attribution needs gradients, which inference mode rules out: use Trainer(inference_mode=False), "
                "or --trainer.inference_mode=false"
            )
        self._place = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        self._rows = []
        paths = part_paths(self._place)
        own = [path for path in paths if path.name.startswith(f"rank_{trainer.global_rank}-")]
        self._number = 1 + max((int(path.stem.rpartition("-")[2]) for path in own), default=-1)
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ShardDataModule):
            data.predicted = _passed(paths, data.manifest(data.predict_split).samples) if paths else None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a folder with predictions of other settings."""
        trainer.strategy.barrier()  # a process that comes late would take what others have just written for earlier
        settings = self._settings(trainer, pl_module)
        path = self._place / _SETTINGS
        found = _read_settings(path) if path.is_file() else None
        trainer.strategy.barrier()
        if found is None:
            if part_paths(self._place):
                raise ValueError(f"{path} is missing, which says what the parts are of; choose or empty the folder")
            if trainer.is_global_zero:
                write_json(path, settings, durable=True)
        elif changed := settings_that_differ(found, as_read(settings)):
            raise ValueError(
                f"{self._place} holds predictions of other settings: {'; '.join(changed)}. Choose another folder, or "
                "delete this one to compute all of it again"
            )
        trainer.strategy.barrier()
        if self.maps is not None:
            chosen = choose_method(_encoder_of(pl_module), self.method, self.options)
            self._maker = maps_of(chosen.method, self.internal_batch_size)
        self._begun = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take up a batch's embeddings, compute its maps, and write a part if there is enough."""
        if not isinstance(outputs, Mapping) or not {"image", "text"} <= outputs.keys():
            raise ValueError(
                f"predict_step of {type(pl_module).__name__} has to return embeddings as ContrastiveModule does, "
                "{'image': [B, K], 'text': [C, K]}; use such a module"
            )
        if bool(batch.valid.any()):
            self._rows.append(self._part_of(outputs, batch))
        size = sum(array.nbytes for part in self._rows for array in part.arrays.values())
        if self._rows and (size >= self.part_bytes or time.monotonic() - self._begun >= self.part_seconds):
            self._write(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what is left, and say where all of it is."""
        self._write(trainer)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            paths = part_paths(self._place)
            total = sum(len(_indices(path)) for path in paths)
            print(f"Saved {total:,} images with their captions in {len(paths):,} parts in {self._place}")  # noqa: T201

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what was computed."""
        self._write(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the method."""
        self._maker = None

    def _write(self, trainer: L.Trainer) -> None:
        rows, self._rows = self._rows, []
        self._begun = time.monotonic()
        if rows:
            write_part(self._place / f"rank_{trainer.global_rank}-{self._number:06d}.safetensors", _joined(rows))
            self._number += 1

    def _settings(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """All that the numbers depend on."""
        data: Any = getattr(trainer, "datamodule", None)
        settings: dict[str, Any] = {
            "weights": weights_fingerprint(pl_module),
            "precision": trainer.precision,
            "maps": self.maps,
        }
        encoder: Any = getattr(pl_module, "encoder", None)
        if encoder is not None:
            # The same weights are another function with another activation, and see other images.
            settings |= {
                "architecture": encoder.architecture["model_cfg"],
                "preprocessing": encoder.architecture["preprocess_cfg"],
            }
        if isinstance(data, ShardDataModule):
            manifest = data.manifest(data.predict_split)
            settings |= {"data": manifest.fingerprint, "data_name": manifest.name}
            settings["captions_per_image"] = data.captions_per_image
        if self.maps is not None:
            settings |= {"method": self.method, "options": self.options}
        return settings

    def _part_of(self, outputs: Mapping[str, Tensor], batch: Batch) -> PredictionPart:
        """The valid rows of a batch."""
        valid = batch.valid.cpu()
        rows = valid.cumsum(0) - 1
        arrays = {
            "index": batch.index.cpu()[valid],
            "image": outputs["image"].float().cpu()[valid],
            "text": outputs["text"].float().cpu(),
            "caption_image": rows[batch.caption_image.cpu()],
            "caption_index": batch.caption_index.cpu(),
        }
        texts = {
            "keys": [key for key, kept in zip(batch.keys, valid.tolist(), strict=True) if kept],
            "captions": batch.captions,
        }
        if self._maker is not None:
            with torch.autocast(batch.images.device.type, enabled=False):
                more, words = self._maps(batch, self._maker)
            arrays, texts = arrays | more, texts | words
        return PredictionPart({name: np.asarray(array) for name, array in arrays.items()}, texts)

    def _maps(self, batch: Batch, maker: MethodMaps) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        """What a part holds of the phrases with tokens of their own, measurable or not, and of their captions."""
        phrases, size = batch.phrases, (batch.images.shape[2], batch.images.shape[3])
        there = phrases.span_mask.any(dim=1).nonzero()[:, 0]
        arrays = {
            "phrase_caption": phrases.caption_row[there],
            "span_mask": phrases.span_mask[there],
            "boxes": phrases.boxes[there],
            "image_size": torch.tensor(size),
        }
        if self.maps == "phrases":
            arrays["maps"] = maker.maps(batch, Wanted(there, there[:0], captions=False)).phrases.float()
        else:
            arrays["interactions"] = _interactions(batch, maker)
        reasons = measurable(phrases.reason, phrases.boxes, maker.grid, size)[there].tolist()
        texts = {
            "phrases": [phrases.text[row] for row in there.tolist()],
            "labels": [batch.label_names[row] for row in phrases.label[there].tolist()],
            "excluded": [Exclusion(reason).name.lower() if reason else "" for reason in reasons],
        }
        return {name: array.cpu() for name, array in arrays.items()}, texts


def _interactions(batch: Batch, maker: MethodMaps) -> Tensor:
    """Tokens x patches of each caption and its image, [C, L, H, W]."""
    method = maker.method
    assert isinstance(method, PairwiseMethod)  # `check_method` has seen to it
    parts = [batch.images.new_zeros(0, batch.tokens.shape[1], *maker.grid)]
    for rows in maker.chunks(len(batch.tokens)):
        found = method.attribute(batch.images[batch.caption_image[rows]], batch.tokens[rows])
        parts.append(found.interactions.float())
    return torch.cat(parts)


def _joined(parts: list[PredictionPart]) -> PredictionPart:
    """Some batches as one part, whose rows count through."""
    arrays: dict[str, Any] = {}
    for name, first in parts[0].arrays.items():
        if name == "image_size":
            arrays[name] = first
            continue
        found, begin = [], 0
        for part in parts:
            found.append(part.arrays[name] + begin if name in _ROWS else part.arrays[name])
            begin += len(part.arrays[_ROWS[name]]) if name in _ROWS else 0
        arrays[name] = np.concatenate(found)
    return PredictionPart(
        arrays, {name: [text for part in parts for text in part.texts[name]] for name in parts[0].texts}
    )


def _passed(paths: Sequence[Path], samples: int) -> NDArray[np.bool_]:
    """Which of a split's samples are in the parts, [N] bool."""
    passed = np.zeros(samples, dtype=np.bool_)
    for path in paths:
        indices = _indices(path)
        # Others are of other data, which is found out and refused later.
        passed[indices[indices < samples]] = True
    return passed


def _indices(path: Path) -> Any:
    return read_part(path, ["index"]).arrays["index"]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict[str, Any])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete {path.parent} to compute it again") from error


def _encoder_of(pl_module: L.LightningModule) -> Any:
    encoder = getattr(pl_module, "encoder", None)
    if encoder is None:
        raise ValueError(
            f"maps explain `encoder` of a module, which {type(pl_module).__name__} lacks; leave --maps out"
        )
    return encoder
