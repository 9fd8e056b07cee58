from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.image_transform import ImageTransform
from lightning_xai.data.phrases import Phrases
from lightning_xai.data.sample import RecordError, Region, Sample
from lightning_xai.data.shapes_datamodule import ShapesDataModule
from lightning_xai.data.shards import Manifest, write_shards
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.exclusion import Exclusion

__all__ = [
    "Batch",
    "CaptionTokenizer",
    "Exclusion",
    "ImageTransform",
    "Manifest",
    "Phrases",
    "RecordError",
    "Region",
    "Sample",
    "ShapesDataModule",
    "ShardDataModule",
    "write_shards",
]
