"""The command line: Lightning's verbs through LightningCLI, everything else as plain functions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Loading torch takes seconds, which a help text or a mistyped command is not worth.
    from lightning.pytorch.cli import LightningCLI

    from lightning_xai.models import DualEncoder

__all__ = ["build_cli", "export", "main", "prepare_coco_shards", "prepare_shapes_shards"]

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


def prepare_coco_shards(
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
        split: name of the split; with `karpathy` the split to take: train, restval, val, test, or several
            joined by "+" (COCO 2014 keeps restval among the images and annotations of val2014).
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
    print(f"Wrote {out} and {out.with_suffix('.json')}. To load them:\n{_loading_code(encoder, out)}")  # noqa: T201


def _loading_code(encoder: DualEncoder, weights: Path) -> str:
    """Python that builds the very same function: open_clip's own config of that name may differ, or not exist."""
    import open_clip

    name, config = encoder.architecture["name"], dict(encoder.architecture["model_cfg"])
    quick_gelu = config.pop("quick_gelu", False)
    known = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    lines, more = ["import open_clip"], ""
    if known is not None and {**known, "quick_gelu": False} == {**config, "quick_gelu": False}:
        more = ", force_quick_gelu=True" if quick_gelu and not known.get("quick_gelu", False) else ""
    else:
        name = weights.stem
        lines.append(f"open_clip.add_model_config({str(weights.with_suffix('.json'))!r})")
    lines.append(f"model = open_clip.create_model({name!r}, pretrained={str(weights)!r}{more})")
    return "\n".join(lines)


_COMMANDS: dict[str, Any] = {
    "prepare": {"shapes": prepare_shapes_shards, "coco": prepare_coco_shards},
    "export": export,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; `python -m lightning_xai --help` lists them."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_OVERVIEW)  # noqa: T201
        return
    try:
        if arguments[0] in _COMMANDS:
            _run_command(arguments[0], arguments[1:])
        else:
            build_cli(args)
    except Exception as error:
        told = _meant_for_the_user(error)
        if told is None:
            raise
        sys.exit(f"lightning_xai {arguments[0]}: {told}")


def build_cli(args: Sequence[str] | None = None, run: bool = True) -> LightningCLI:
    """The LightningCLI behind `fit`, `validate`, `test` and `predict`.

    Args:
        args: the verb and its options; None for those of the command line.
        run: False makes trainer, model and data of a config without running anything; `args` then has no verb.
    """
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    from lightning_xai.callbacks import EmbeddingWriter

    # What is logged in evaluation has been reduced over the ranks by its metric; Lightning cannot know.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
    # Configs and the command line may use the bare names of classes that are loaded.
    for classes in ("data", "tasks"):
        import_module(f"lightning_xai.{classes}")
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"inference_mode": False, "callbacks": [EmbeddingWriter()]},
        seed_everything_default=0,
        parser_kwargs={"prog": "lightning_xai", "description": "Train and evaluate dual encoders."},
        args=None if args is None else list(args),
        run=run,
    )


def _run_command(name: str, arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    auto_cli(_COMMANDS[name], args=arguments, prog=f"lightning_xai {name}", as_positional=name == "export")


def _meant_for_the_user(error: BaseException | None) -> BaseException | None:
    """The error that says what to mend, where there is one: raised by this package itself, or about a file.

    A trace of our own code would bury it. Parsers wrap it, so it may be the cause of what arrives here.
    """
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        ours = trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lightning_xai.")
        deliberate = isinstance(error, (ValueError, RuntimeError)) and ours
        if deliberate or isinstance(error, (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)):
            return error
        error = error.__cause__
    return None
