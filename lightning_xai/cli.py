"""The command line: Lightning's verbs through LightningCLI, everything else as plain functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["export", "main", "prepare_coco_shards", "prepare_shapes_shards"]

_OVERVIEW = """\
lightning_xai trains CLIP-like models and shows which words they match with which parts of an image.

usage: python -m lightning_xai COMMAND ...

Training and evaluation (Lightning's Trainer; every option can stand in a YAML file given with --config):
  fit         train, and measure grounding (gamma, rho) before training and after each epoch
  validate    measure a model on the validation shards
  test        measure a model on the test shards
  predict     write the embeddings of a split's images and captions

Data and models:
  prepare     convert a data set to shards: `prepare shapes` (made here, no download), `prepare coco`
  export      turn a checkpoint into weights that open_clip loads

Start here (3 minutes on a laptop, no download):
  python -m lightning_xai fit --config configs/demo.yaml

`python -m lightning_xai COMMAND --help` lists the options of a command; `fit --print_config` all settings as YAML.
"""


def prepare_shapes_shards(out: Path, train: int | None = None, val: int | None = None, seed: int = 0) -> None:
    """Make the embedded world of coloured shapes: images, captions, boxes and phrases.

    Args:
        out: folder to make; train/ and val/ come below it.
        train: number of training images (default: as the demo uses).
        val: number of validation images.
        seed: the same seed gives the same bytes.
    """
    from lightning_xai.data.shapes import TRAIN_SAMPLES, VAL_SAMPLES, prepare_shapes
    from lightning_xai.data.shards import Manifest, describe

    prepare_shapes(out, TRAIN_SAMPLES if train is None else train, VAL_SAMPLES if val is None else val, seed)
    for split in ("train", "val"):
        print(describe(Manifest.load(out / split)))  # noqa: T201 - the summary is the command's output


def prepare_coco_shards(  # noqa: PLR0913 - the files of COCO as they lie on a disk
    images: Path,
    captions: Path,
    instances: Path,
    split: str,
    out: Path,
    karpathy: Path | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> None:
    """Convert COCO 2014 or 2017: five captions an image, all boxes, and where captions name their classes.

    Args:
        images: folder of the image files.
        captions: annotations/captions_*.json.
        instances: annotations/instances_*.json.
        split: name of the split; with `karpathy` the split to take (val, test, train, restval, or train+restval).
        out: folder to make.
        karpathy: dataset_coco.json of the Karpathy splits.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.coco import prepare_coco

    manifest = prepare_coco(
        images=images,
        captions=captions,
        instances=instances,
        out=out,
        split=split,
        karpathy=karpathy,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


def export(checkpoint: Path, out: Path) -> None:
    """Turn a checkpoint of this project into weights for `open_clip.create_model(name, pretrained=out)`.

    Args:
        checkpoint: a .ckpt file that `fit` has written.
        out: a .safetensors or .pt file to write; the model's configuration goes beside it, as .json.
    """
    from lightning_xai.models.dual_encoder import load_dual_encoder, save_open_clip

    if checkpoint.suffix != ".ckpt":
        raise ValueError(f"export takes a .ckpt file that fit has written; got {checkpoint}")
    encoder = load_dual_encoder(str(checkpoint))
    save_open_clip(encoder, out)
    name = encoder.architecture["name"]
    print(f"Wrote {out} and {out.with_suffix('.json')}.\nopen_clip.create_model({name!r}, pretrained={str(out)!r})")  # noqa: T201


_COMMANDS: dict[str, Any] = {
    "prepare": {"shapes": prepare_shapes_shards, "coco": prepare_coco_shards},
    "export": export,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; `python -m lightning_xai --help` lists them."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_OVERVIEW)  # noqa: T201
    elif arguments[0] in _COMMANDS:
        _run_command(arguments[0], arguments[1:])
    else:
        _run_trainer(arguments)


def _run_command(name: str, arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    components: Callable[..., None] | dict[str, Callable[..., None]] = _COMMANDS[name]
    try:
        auto_cli(components, args=arguments, prog=f"lightning_xai {name}", as_positional=name == "export")
    except (ValueError, OSError) as error:
        # What a user can mend is told without a trace of our own code.
        sys.exit(f"lightning_xai {name}: {error}")


def _run_trainer(arguments: list[str]) -> None:
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    # Imported, so that configs and the command line may use the bare class names.
    from lightning_xai import callbacks, data, tasks

    assert callbacks.GroundingCallback and data.ShardDataModule and tasks.ContrastiveFineTuning
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"inference_mode": False, "callbacks": [callbacks.EmbeddingWriter()]},
        seed_everything_default=0,
        parser_kwargs={"prog": "lightning_xai", "description": "Train and evaluate dual encoders."},
        args=arguments,
    )
