"""Hidden states taken from a forward pass that runs anyway."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lightning_xai.models.at_layer import TowerAtLayer, as_constant


class InputCapture:
    """Keeps what enters a split's block, from `open` to `close`, without graph.

    The model is touched by one hook, which `close` removes; as a context manager it is removed after an exception too.

    Attributes:
        hidden: the block's inputs since the last `clear`, one a forward pass, as `features_before` returns them.
    """

    def __init__(self, split: TowerAtLayer) -> None:
        self._split = split
        self._handle: Any = None
        self._listening = True
        self.hidden: list[Tensor] = []

    def open(self) -> None:
        """Start keeping inputs."""
        if self._split.block is None:
            raise ValueError(
                f"layer {self._split.layer} is the head, which has no block to listen to; take a layer before"
            )
        if self._handle is None:
            self._handle = self._split.block.register_forward_pre_hook(self._keep)

    def close(self) -> None:
        """Stop, and let go of everything kept."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.clear()

    def clear(self) -> None:
        """Let go of everything kept, and listen to what comes next."""
        self.hidden.clear()
        self._listening = True

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._listening:
            self.hidden.append(self._split.captured(inputs[0]).detach())

    def take(self) -> Tensor | None:
        """The one input kept since the last `clear`, or None where there was not exactly one forward pass.

        Nothing is kept until the next `clear`: attributing may run the block itself, on many points of a path.
        """
        taken = as_constant(self.hidden[0]) if len(self.hidden) == 1 else None
        self.hidden.clear()
        self._listening = False
        return taken

    def __enter__(self) -> InputCapture:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
