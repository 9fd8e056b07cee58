"""Samples, shards and batches.

Names are loaded when they are first used: `prepare --help` needs the list of data sets, but not torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_xai.data.batch import Batch
    from lightning_xai.data.datamodule import ShapesDataModule, ShardDataModule
    from lightning_xai.data.masks import Mask, encode_mask
    from lightning_xai.data.needs import BatchNeeds
    from lightning_xai.data.phrases import Phrases
    from lightning_xai.data.sample import RecordError, Region, Sample, WrongCaption
    from lightning_xai.data.shards import Manifest, write_shards
    from lightning_xai.data.spans import CaptionTokenizer
    from lightning_xai.exclusion import Exclusion
    from lightning_xai.models.image_transform import ImageTransform

__all__ = [
    "Batch",
    "BatchNeeds",
    "CaptionTokenizer",
    "Exclusion",
    "ImageTransform",
    "Manifest",
    "Mask",
    "Phrases",
    "RecordError",
    "Region",
    "Sample",
    "ShapesDataModule",
    "ShardDataModule",
    "WrongCaption",
    "encode_mask",
    "write_shards",
]

_MODULES = {
    "Batch": "data.batch",
    "BatchNeeds": "data.needs",
    "CaptionTokenizer": "data.spans",
    "Exclusion": "exclusion",
    "ImageTransform": "models.image_transform",
    "Manifest": "data.shards",
    "Mask": "data.masks",
    "Phrases": "data.phrases",
    "RecordError": "data.sample",
    "Region": "data.sample",
    "Sample": "data.sample",
    "ShapesDataModule": "data.datamodule",
    "ShardDataModule": "data.datamodule",
    "WrongCaption": "data.sample",
    "encode_mask": "data.masks",
    "write_shards": "data.shards",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lightning_xai.{_MODULES[name]}"), name)
