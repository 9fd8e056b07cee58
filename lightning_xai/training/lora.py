"""Training low-rank adapters in place of a model's weights: which matrices get one, and what else learns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, get_args

from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.low_rank import adapt, matrices
from lightning_xai.models.peft_folder import PeftAdapter
from lightning_xai.training.parameter_groups import TOWERS, Place

__all__ = ["Lora", "add_adapters"]

Preset = Literal["attention", "mlp", "all"]
Towers = Literal["both", "image", "text"]
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)  # as open_clip, timm and transformers name it
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, Hu et al. 2021): W + (alpha / rank) B A, where A and B learn and W does not.

    All else in both towers is frozen; what is part of no tower, such as the logit scale, learns as without adapters.

    Attributes:
        rank: of B A; at least 1.
        alpha: factor on B A, times the rank.
        targets: which matrices of the blocks are adapted: attention (its projections), mlp (all others), or all. Or a
            list of names: each stands for the modules of that name and all inside them, such as `attn`, `c_fc` or
            `resblocks.11`, with `*` and `?` as in a shell, and is not confined to blocks.
        towers: which are adapted: both, image or text.
        norms: whether the weights and biases of an adapted tower's norms learn, too.
        init: folder of a peft adapter to begin with, of the same rank, alpha and targets, as `export --adapter` and
            peft's `save_pretrained` write it (safetensors alone); null: B begins with zeros.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Preset | Sequence[str] = "attention"
    towers: Towers = "both"
    norms: bool = False
    init: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank of lora has to be at least 1 (lora: null trains without adapters); got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha of lora has to be positive and finite; got {self.alpha}")
        if isinstance(self.targets, str) and self.targets not in get_args(Preset):
            raise ValueError(
                f"targets of lora is one of {', '.join(get_args(Preset))}, or a list of names of modules; got "
                f"{self.targets!r}"
            )
        if self.towers not in get_args(Towers):
            raise ValueError(f"towers of lora is one of {', '.join(get_args(Towers))}; got {self.towers!r}")


def add_adapters(encoder: DualEncoder, lora: Lora, places: Mapping[str, Place]) -> dict[str, Place]:
    """Adapt the target matrices that are not frozen, and freeze everything else in both towers.

    Args:
        encoder: changed in place.
        lora: the options.
        places: of the parameters by name.

    Returns:
        The places of the parameters as they are named now; an adapter's is that of its weight.

    Raises:
        ValueError: a target that names no matrix, or frozen ones alone; the message lists what there is. Or an adapter
            to begin with that is broken, or of another rank, alpha or targets.
    """
    available: dict[str, list[_Matrix]] = {tower: [] for tower in TOWERS if lora.towers in ("both", tower)}
    for module, weight in matrices(encoder):
        place = places.get(f"{module}.{weight}")
        if place is not None and place.tower in available and encoder.get_parameter(f"{module}.{weight}").requires_grad:
            available[place.tower].append(_Matrix(module, weight, 0 < place.depth <= place.blocks or not place.blocks))
    chosen = _by_preset(lora, available) if isinstance(lora.targets, str) else _by_name(lora.targets, available)
    norms = set(_norm_parameters(encoder)) if lora.norms else set()
    for name, place in places.items():
        if name not in norms or place.tower not in available:
            encoder.get_parameter(name).requires_grad_(False)
    former: dict[str, str] = {}
    for each in chosen:
        former |= adapt(encoder, each.module, each.weight, lora.rank, lora.alpha)
    if lora.init is not None:
        _begin_with(Path(lora.init), encoder, lora, chosen)
    kept = {name: place for name, place in places.items() if name not in former.values()}
    return kept | {name: places[old] for name, old in former.items()}


def _begin_with(folder: Path, encoder: DualEncoder, lora: Lora, chosen: Sequence[_Matrix]) -> None:
    """Give the new adapters of an encoder the values of a peft adapter."""
    adapter = PeftAdapter.load(folder)
    rank, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    # Checkpoints hold alpha / rank in the precision of the weights.
    if rank != lora.rank or not isinstance(alpha, (int, float)) or not math.isclose(alpha, lora.alpha, rel_tol=4e-3):
        raise ValueError(
            f"lora: the adapter {folder} has rank {rank} and alpha {alpha}: give lora the same; got {lora.rank} and "
            f"{lora.alpha:g}"
        )
    parts = {f"{each.module}.{each.weight}".removeprefix("model."): each for each in chosen}
    try:
        found = adapter.factors(encoder.model, parts)
        for name, (lora_A, lora_B) in found.items():
            own = encoder.get_submodule(f"{parts[name].module}.parametrizations.{parts[name].weight}.0")
            for factor, value in (("lora_A", lora_A), ("lora_B", lora_B)):
                place = own.get_parameter(factor)
                if place.shape != value.shape:
                    raise ValueError(f"{factor} of {name} is {list(value.shape)}, expected {list(place.shape)}")
                place.data.copy_(value)
            own.get_buffer("scaling").fill_(alpha / rank)
    except ValueError as error:
        raise ValueError(f"lora: {folder} does not fit {encoder.name}: {error}") from error


@dataclass(frozen=True)
class _Matrix:
    """A parameter that can be adapted: its module's name, its own, and whether it is part of a block."""

    module: str
    weight: str
    in_block: bool


def _by_preset(lora: Lora, available: Mapping[str, Sequence[_Matrix]]) -> list[_Matrix]:
    chosen = []
    for tower, all_of_tower in available.items():
        found = [
            each
            for each in all_of_tower
            if each.in_block and lora.targets in ("all", "attention" if _ATTENTION.search(each.module) else "mlp")
        ]
        if not found:
            raise ValueError(
                f"lora: the {tower} tower's blocks have no matrix for targets: {lora.targets}; "
                f"{_what_there_is(available)}"
            )
        chosen += found
    return chosen


def _by_name(targets: Sequence[str], available: Mapping[str, Sequence[_Matrix]]) -> list[_Matrix]:
    every = [each for all_of_tower in available.values() for each in all_of_tower]
    named = {target: [each for each in every if _names(target, each.module)] for target in targets}
    missing = [target for target, found in named.items() if not found]
    if missing or not named:
        raise ValueError(
            f"lora: no matrix that could be adapted is part of {', '.join(missing) or 'an empty list of targets'}; "
            f"{_what_there_is(available)}"
        )
    return [each for each in every if any(each in found for found in named.values())]


def _names(target: str, module: str) -> bool:
    """Return whether a target is the module's name, or that of a module around it, or the end of one of these.

    Example:
        >>> _names("attn", "visual.blocks.0.attn.out_proj"), _names("blocks.1*.attn", "visual.blocks.0.attn")
        (True, False)
    """
    parts = module.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}") for name in around)


def _what_there_is(available: Mapping[str, Sequence[_Matrix]]) -> str:
    """The modules that can be adapted, in words, each kind once."""
    kinds = {_NUMBER.sub("*", each.module): None for all_of_tower in available.values() for each in all_of_tower}
    if not kinds:
        return "nothing there can be adapted: it is frozen, or has no linear layers"
    return f"what can be adapted: {', '.join(kinds)}"


def _norm_parameters(encoder: DualEncoder) -> Iterator[str]:
    for name, module in encoder.named_modules():
        if "norm" in type(module).__name__.lower():
            yield from (f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))
