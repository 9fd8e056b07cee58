"""Hidden states taken from a forward pass that runs anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from lightning_xai.models.at_layer import TowerAtLayer, as_constant

__all__ = ["Captured", "capture"]


@dataclass(frozen=True)
class Captured:
    """Inputs of a layer, one for each forward pass through it, as `TowerAtLayer.features_before` returns them.

    Attributes:
        image: those of the image tower.
        text: those of the text tower.
    """

    image: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)

    @staticmethod
    def only(kept: list[Tensor], count: int) -> Tensor | None:
        """The one input kept, if it is of `count` images or captions; else the pass that is meant is not known."""
        return as_constant(kept[0]) if len(kept) == 1 and len(kept[0]) == count else None


@contextmanager
def capture(image: TowerAtLayer, text: TowerAtLayer) -> Iterator[Captured]:
    """Inside, keep what enters both towers' layers, without graph; the hooks are removed also after an exception.

    Example:
        >>> with capture(image, text) as captured:  # doctest: +SKIP
        ...     model(images, tokens)
        >>> hidden = Captured.only(captured.image, len(images))  # doctest: +SKIP

    Raises:
        ValueError: the layer is the head, which has no block.
    """
    captured, handles = Captured(), []
    try:
        for tower, kept in ((image, captured.image), (text, captured.text)):
            if tower.block is None:
                raise ValueError(
                    f"layer {tower.layer} is the head, which has no block to listen to; take a layer before"
                )

            def keep(_: object, inputs: tuple[Tensor, ...], at: TowerAtLayer = tower, to: list[Tensor] = kept) -> None:
                to.append(at.captured(inputs[0]).detach())

            handles.append(tower.block.register_forward_pre_hook(keep))
        yield captured
    finally:
        for handle in handles:
            handle.remove()
