"""Files of weights: read without unpickling anything but tensors and plain values, and written for open_clip."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_xai.atomic_file import replaced_at_once
from lightning_xai.models.architecture import FOLDER_CONFIG, check_architecture, folder_architecture
from lightning_xai.models.dual_encoder import CHECKPOINT_KEY, DualEncoder
from lightning_xai.models.image_transform import open_clip_preprocessing
from lightning_xai.models.low_rank import merged_state
from lightning_xai.models.torchscript import is_torchscript, read_torchscript

__all__ = ["Weights", "read_weights", "save_checkpoint", "save_open_clip", "without_common_prefix"]

_STATE_PREFIX = "encoder.model."
_WRAPPED_IN = ("state_dict", "model_state_dict", "model")
"""Keys under which training code keeps a state dict, the usual ones first."""
_PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DistributedDataParallel, Lightning modules and torch.compile put before names."""
_COMPILED = "_orig_mod."
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Weights:
    """A state dict of an open_clip model read from a file.

    Attributes:
        path: the file.
        state: names and tensors.
        architecture: what the file itself, or an open_clip_config.json next to it, says of the model; else None.
    """

    path: Path
    state: dict[str, Tensor]
    architecture: dict[str, Any] | None


def read_weights(path: Path, *, merge: bool = True) -> Weights:
    """Read a state dict without unpickling anything but tensors and plain values.

    The file may be one of PyTorch's, a safetensors file or a TorchScript archive, whatever its name. Names may have the
    prefixes of DistributedDataParallel, torch.compile and Lightning modules.

    Args:
        path: the file.
        merge: whether low-rank adapters of this project are merged into their weights.

    Raises:
        ValueError: the file is missing, broken, or holds other objects.
    """
    state, recorded = _read(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"checkpoint {path} holds no state dict (names and tensors); save the model's state_dict alone"
        )
    own = {str(key): value for key, value in state.items()}
    if recorded is not None and any(key.startswith(_STATE_PREFIX) for key in own):
        # A checkpoint of this project: all else in it belongs to metrics and the like.
        state = {key.removeprefix(_STATE_PREFIX): x for key, x in own.items() if key.startswith(_STATE_PREFIX)}
    else:
        state = {_plain_name(key): value for key, value in own.items()}
        if len(state) < len(own):
            raise ValueError(
                f"checkpoint {path} holds weights twice, under several prefixes ({', '.join(_PREFIXES)}); save one "
                "model's state_dict alone"
            )
    if not state:
        raise ValueError(f"checkpoint {path} holds no weights")
    if merge:
        state = merged_state(state)
    config = path.parent / FOLDER_CONFIG
    if recorded is not None:
        return Weights(path, state, check_architecture(recorded, path))
    return Weights(path, state, folder_architecture(path.parent) if config.is_file() else None)


def _read(path: Path) -> tuple[Any, Any]:
    """What a file holds, and the architecture that this project has recorded in it, or None."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    with path.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        raise ValueError(
            f"checkpoint {path} is a Git LFS pointer, which names the weights only: run `git lfs pull` where it lies"
        )
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if is_torchscript(path):
        return _read_torchscript(path), None
    return _read_pickle(path)


def _plain_name(name: str) -> str:
    """A tensor's name without the prefixes of wrappers, which come in any order.

    >>> _plain_name("_orig_mod.module.visual._orig_mod.proj")
    'visual.proj'
    """
    name = name.replace(f".{_COMPILED}", ".")
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def without_common_prefix(weights: Weights, names: Collection[str], optional: Collection[str] = ()) -> Weights:
    """The weights without one prefix of all their names, such as "net.", if these are then exactly a model's.

    A warning says so. Other weights stay as they are.

    Args:
        weights: as read.
        names: of the model's weights.
        optional: names that may be there as well.
    """
    first = next(iter(weights.state))
    for end in (place + 1 for place, letter in enumerate(first) if letter == "."):
        if not all(name.startswith(first[:end]) for name in weights.state):
            break
        state = {name[end:]: tensor for name, tensor in weights.state.items()}
        if set(names) <= state.keys() <= {*names, *optional}:
            warnings.warn(f"{weights.path}: all names begin with {first[:end]!r}, which was left out", stacklevel=2)
            return replace(weights, state=state)
    return weights


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            recorded = (opened.metadata() or {}).get(CHECKPOINT_KEY)
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is no readable safetensors file: {error}") from error
    try:
        return state, None if recorded is None else json.loads(recorded)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} has broken JSON in its metadata {CHECKPOINT_KEY!r}: {error}") from error


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        state = read_torchscript(path)
    except MemoryError:
        raise
    except Exception as error:  # a broken archive raises whatever its bytes happen to ask for
        raise ValueError(
            f"checkpoint {path} is a TorchScript archive whose tensors cannot be read ({error}); copy it again, or "
            "save the model's state_dict"
        ) from error
    if not state:
        raise ValueError(
            f"checkpoint {path} is a TorchScript archive without weights: those of a frozen one are part of its code; "
            "save it without torch.jit.freeze"
        )
    return state


def _read_pickle(path: Path) -> tuple[Any, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle raises whatever its bytes happen to ask for
        raise ValueError(
            f"checkpoint {path} cannot be read as plain tensors ({_unreadable(path, error)}); it is broken, or holds "
            "Python objects, which are never loaded: save its state_dict alone"
        ) from error
    if not isinstance(checkpoint, dict):
        return checkpoint, None
    wrapped = [key for key in _WRAPPED_IN if isinstance(checkpoint.get(key), dict)]
    state = checkpoint[wrapped[0]] if wrapped else checkpoint.get("state_dict", checkpoint)
    return state, checkpoint.get(CHECKPOINT_KEY)


def _unreadable(path: Path, error: Exception) -> str:
    """The reason why a pickle was refused: the foreign classes in it, or the error, without PyTorch's advice on it."""
    try:
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # not a zip file, or a broken one
        foreign = []
    if foreign:
        return f"it holds {', '.join(foreign[:4])}{' and more' if len(foreign) > 4 else ''}"
    reason = str(error).strip().partition("\n")[0]
    # PyTorch's own words begin with how to switch the safety off.
    return type(error).__name__ if not reason or "weights_only" in reason or "eights only" in reason else reason


def save_open_clip(encoder: DualEncoder, path: Path) -> None:
    """Write weights that `open_clip.create_model(name, pretrained=path)` loads, or a folder for `local-dir:`.

    A file also carries the architecture, with the preprocessing of images; `<name>.json` next to it holds the model
    config, so that models that open_clip has no name for can be built as well. A folder, for a path without suffix,
    holds both in its `open_clip_config.json`, as repositories on the hub do, and the files of a tokenizer from there.

    Raises:
        ValueError: a suffix other than `.safetensors` or `.pt`; a folder that holds something, or a model that
            open_clip builds for another size of images before it loads a folder's weights.
    """
    if path.suffix not in (".safetensors", ".pt", ""):
        raise ValueError(f"export writes .safetensors, .pt or a folder, not {path.suffix}: {path}")
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.model.state_dict().items()}
    if not path.suffix:
        _save_folder(encoder, state, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={CHECKPOINT_KEY: json.dumps(encoder.architecture)})
    else:
        torch.save({"state_dict": state, CHECKPOINT_KEY: encoder.architecture}, path)
    path.with_suffix(".json").write_text(
        json.dumps(encoder.architecture["model_cfg"], indent=2) + "\n", encoding="utf-8"
    )


def save_checkpoint(encoder: DualEncoder, path: Path) -> None:
    """Write a checkpoint as `fit` does, with weights and architecture alone: to load, to `export`, or to measure.

    Args:
        encoder: the model.
        path: a file that ends in `.ckpt`; it is replaced at once.
    """
    state = {f"{_STATE_PREFIX}{key}": value.detach().cpu() for key, value in encoder.model.state_dict().items()}
    # Lightning's own keys, so that its verbs take the file as --ckpt_path.
    own = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version("lightning")}
    with replaced_at_once(path) as part:
        torch.save({**own, "state_dict": state, CHECKPOINT_KEY: encoder.architecture}, part)


def _save_folder(encoder: DualEncoder, state: dict[str, Tensor], folder: Path) -> None:
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give a new folder, or a file that ends in .safetensors or .pt")
    visual: Any = encoder.model.visual
    default = getattr(getattr(visual, "trunk", None), "default_cfg", {}).get("input_size", (3, *visual.image_size))
    if hasattr(getattr(visual, "trunk", None), "set_input_size") and tuple(default[1:]) != tuple(visual.image_size):
        raise ValueError(
            f"open_clip builds a folder's {encoder.name} for images of {tuple(default[1:])} before it loads its "
            "weights: export to a .safetensors file, whose printed code sets the size first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        state, folder / "open_clip_model.safetensors", metadata={CHECKPOINT_KEY: json.dumps(encoder.architecture)}
    )
    config = {
        "model_cfg": encoder.architecture["model_cfg"],
        "preprocess_cfg": open_clip_preprocessing(encoder.architecture["preprocess_cfg"]),
    }
    (folder / FOLDER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own: Any = getattr(encoder.tokenizer.tokenizer, "tokenizer", None)
    if hasattr(own, "save_pretrained"):
        own.save_pretrained(folder)
