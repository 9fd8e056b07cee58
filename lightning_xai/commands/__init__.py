"""What `python -m lightning_xai COMMAND` runs beside Lightning's verbs: one command, one module.

Torch is imported inside the functions: it takes seconds, which a help text or a mistyped command is not worth.
"""

from lightning_xai.commands.explain import Explain
from lightning_xai.commands.export import export
from lightning_xai.commands.prepare import prepare_coco_shards, prepare_shapes_shards

__all__ = ["Explain", "export", "prepare_coco_shards", "prepare_shapes_shards"]
