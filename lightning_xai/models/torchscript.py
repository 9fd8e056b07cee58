"""The tensors of a TorchScript archive, as OpenAI published its models, without running any of its code."""

from __future__ import annotations

import math
import pickle  # only as the base of a reader that builds nothing but tensors and containers
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_torchscript", "read_torchscript"]

_STORAGES = {
    f"{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
# open_clip keeps masks out of its state dicts; an archive holds them as it holds every attribute.
_NO_WEIGHTS = "attn_mask"


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip file with constants next to its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Names and tensors of the archive's module tree.

    Raises:
        pickle.UnpicklingError: it holds other things than modules, tensors and plain values.
        KeyError, zipfile.BadZipFile, EOFError, ValueError: it is broken.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))

        def stored(name: str) -> bytes:
            entry = archive.getinfo(f"{root.removesuffix('data.pkl')}data/{name}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its tensors are compressed, which PyTorch never does")
            return archive.read(entry)

        with archive.open(root) as stream:
            module = _Reader(stream, stored).load()
    if not isinstance(module, _Module):
        raise pickle.UnpicklingError("it holds no module")
    return {name: tensor for name, tensor in _tensors(module, "") if name.rpartition(".")[2] != _NO_WEIGHTS}


class _Inert:
    """Something that a pickle may hold, but may not change: by itself any object would take over a given state."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what is no module")


class _Module:
    """Stands for a module of any class: its attributes and nothing else."""

    __slots__ = ("attributes",)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Saved(_Inert):
    """A tensor, or the storage of tensors."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Function(_Inert):
    """A function that a pickle may call."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, _Saved):
            yield f"{prefix}{name}", value.tensor
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


def _rebuild(saved: _Saved, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *ignored: Any) -> _Saved:
    storage, count = saved.tensor, math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or count > len(storage) or (count and last >= len(storage)):
        raise ValueError("a tensor leaves its storage")
    return _Saved(torch.as_strided(storage, size, stride, offset).clone())


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild),
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch.jit._pickle", f"build_{kind}list"): _Function(list) for kind in ("int", "tensor", "double", "bool")},
}


class _Reader(pickle.Unpickler):
    """Builds tensors, containers and `_Module`; every other name in the file is an error, and nothing is imported."""

    def __init__(self, stream: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(stream)
        self._read = read
        self._storages: dict[str, _Saved] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for."""
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, saved: Any) -> _Saved:
        """The storage that an entry of the pickle names."""
        kind, dtype, name, _, length = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(name).isalnum():
            raise pickle.UnpicklingError("it refers to something that is no storage")
        if name not in self._storages:
            data = bytearray(self._read(str(name)))
            self._storages[name] = _Saved(torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype))
        if len(self._storages[name].tensor) < length:
            raise ValueError("a storage is shorter than it says")
        return self._storages[name]
