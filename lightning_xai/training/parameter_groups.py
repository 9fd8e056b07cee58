"""Parameters by tower and depth: which are frozen, and with which rate and weight decay the others are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_xai.models.at_layer import differentiable
from lightning_xai.models.dual_encoder import DualEncoder

__all__ = ["Frozen", "Place", "freeze", "freeze_embeddings", "parameter_groups", "parameter_places", "trained_towers"]

Frozen = int | Literal["all"]
TOWERS = ("image", "text")


@dataclass(frozen=True)
class Place:
    """The place of a parameter in its tower.

    Attributes:
        tower: image or text.
        depth: 0 before the first block, k in the k-th, `blocks` + 1 after the last.
        blocks: of the tower; 0 for one that is no list of blocks.
    """

    tower: str
    depth: int
    blocks: int


def parameter_places(encoder: DualEncoder) -> dict[str, Place]:
    """The place of each parameter by its name; what is part of no tower (the logit scale) has none.

    Found by following one forward pass of each tower back to the parameters that take part in it, so that no names have
    to be known. Parameters that need no gradient have no place.

    Raises:
        ValueError: a parameter is part of both towers.
    """
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    found: dict[str, Place] = {}
    for tower in TOWERS:
        blocks = encoder.blocks(tower)
        entering: list[Tensor] = []
        with differentiable(encoder):
            handle = blocks[0].register_forward_pre_hook(_keeps(entering), with_kwargs=True) if blocks else None
            try:
                embedding = _embed_probe(encoder, tower)
            finally:
                if handle is not None:
                    handle.remove()
        depths = {each: len(blocks) + 1 for each in _leaves(embedding)}
        depths |= {id(each): number for number, block in enumerate(blocks, 1) for each in block.parameters()}
        depths |= {each: 0 for hidden in entering for each in _leaves(hidden)}
        for each, depth in depths.items():
            if each in names:
                if names[each] in found:
                    raise ValueError(f"{names[each]} is part of both towers, which then have no rates of their own")
                found[names[each]] = Place(tower, depth, len(blocks))
    return found


def trained_towers(encoder: DualEncoder) -> set[str]:
    """The towers, image or text, of which any parameter is trained."""
    with differentiable(encoder):
        return {tower for tower in TOWERS if _embed_probe(encoder, tower).requires_grad}


def freeze(encoder: DualEncoder, places: Mapping[str, Place], frozen: Mapping[str, Frozen]) -> None:
    """Let the first blocks of towers, with what is before them, or whole towers take no part in training.

    Args:
        encoder: whose parameters need no gradient afterwards.
        places: of the parameters by name.
        frozen: number of blocks, or "all" for the whole tower, by tower.

    Raises:
        ValueError: a tower has fewer blocks, or is no list of blocks, or both towers are frozen.
    """
    if all(number == "all" for number in frozen.values()):
        raise ValueError("freeze_image and freeze_text are both all, so that nothing is left to train")
    for tower, number in frozen.items():
        inside = {name: place for name, place in places.items() if place.tower == tower}
        depth = max((place.blocks for place in inside.values()), default=0)
        if number != "all" and number != 0 and not 0 < number <= depth:
            has = f"has {depth} blocks" if depth else "is no list of blocks"
            raise ValueError(
                f"freeze_{tower}: the {tower} tower of {encoder.name} {has}; got {number} (all: the whole tower)"
            )
        for name, place in inside.items():
            if number == "all" or place.depth <= number > 0:
                encoder.get_parameter(name).requires_grad_(False)


def freeze_embeddings(encoder: DualEncoder, places: Mapping[str, Place]) -> None:
    """Let all that is before the text tower's first block, such as token embeddings and positions, not be trained.

    Raises:
        ValueError: the text tower is no list of blocks.
    """
    before = [name for name, place in places.items() if (place.tower, place.depth) == ("text", 0)]
    if not before:
        raise ValueError(
            f"freeze_text_embeddings: the text tower of {encoder.name} is no list of blocks, so that nothing is known "
            "to be before them: leave it at false, or freeze the whole tower (freeze_text: all)"
        )
    for name in before:
        encoder.get_parameter(name).requires_grad_(False)


def parameter_groups(
    encoder: DualEncoder,
    places: Mapping[str, Place],
    *,
    rate: float,
    weight_decay: float,
    tower_factors: Mapping[str, float],
    layer_decay: float,
    decay_norms_and_biases: bool,
) -> list[dict[str, Any]]:
    """Groups of an optimizer, of the parameters that are trained; the first has the plain rate.

    The rate of a parameter is `rate` times its tower's factor times `layer_decay` to the number of blocks above: after
    the blocks that is 0, in the last one 1, before all of n blocks n + 1 (BEiT, Bao et al. 2021).

    Args:
        encoder: whose parameters.
        places: of the parameters by name.
        rate: the learning rate of a factor of 1.
        weight_decay: of the parameters that are decayed.
        tower_factors: of the rate, by tower.
        layer_decay: in (0, 1].
        decay_norms_and_biases: False: parameters of a single dimension (norms, biases, class tokens, the logit scale)
            have no weight decay.

    Raises:
        ValueError: layer decay of a tower that is no list of blocks.
    """
    flat = {place.tower for place in places.values() if not place.blocks}
    if layer_decay != 1 and flat:
        raise ValueError(f"layer_decay: the {min(flat)} tower of {encoder.name} is no list of blocks: leave it at 1")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            place = places.get(name)
            factor = 1.0
            if place is not None:
                factor = tower_factors[place.tower] * layer_decay ** (place.blocks + 1 - place.depth)
            decayed = decay_norms_and_biases or not (
                name.endswith("bias") or parameter.numel() in (1, *parameter.shape)
            )
            groups.setdefault((factor, decayed), []).append(parameter)
    # The rate that is logged is that of the first group.
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != 1, item[0]))
    return [
        {"params": members, "lr": rate * factor, "weight_decay": weight_decay if decayed else 0.0}
        for (factor, decayed), members in ordered
    ]


def _embed_probe(encoder: DualEncoder, tower: str) -> Tensor:
    device = next(encoder.parameters()).device
    if tower == "image":
        return encoder.encode_image(encoder.black_image()[None].to(encoder.logit_scale))
    return encoder.encode_text(encoder.tokenizer.encode(["a probe"]).to(device))


def _keeps(entering: list[Tensor]) -> Any:
    """A hook that keeps the tensors that a block gets."""

    def keep(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        entering.extend(each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor))

    return keep


def _leaves(output: Tensor) -> set[int]:
    """Ids of the parameters that an output was computed from."""
    found: set[int] = set()
    seen: set[Any] = set()
    rest = [output.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of AccumulateGrad
        if variable is not None:
            found.add(id(variable))
        rest += [each for each, _ in node.next_functions]
    return found
