"""The interface of training objectives.

Shapes: B rows on this rank, K embedding width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightning_xai.data.batch import Batch
from lightning_xai.models.dual_encoder import DualEncoder

__all__ = ["Objective", "Step", "Term"]


@dataclass(frozen=True)
class Step:
    """What a training step has computed of this rank's rows.

    Attributes:
        encoder: the model that is trained.
        batch: its images and captions; row i of both belongs together.
        image: [B, K] unit embeddings, at least float32.
        text: [B, K], likewise.
        scale: the factor on similarities, a scalar (the exponential already taken).
    """

    encoder: DualEncoder
    batch: Batch
    image: Tensor
    text: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Term:
    """A term of the loss.

    Attributes:
        loss: a scalar with a graph, the same on every rank, so that ranks' averaged gradients are those of one process.
        logged: other numbers of the step by name, scalars without a graph.
    """

    loss: Tensor
    logged: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A term of the loss, which counts `weight` times.

    Args:
        weight: factor on the term in the loss.

    Attributes:
        name: the term is logged as `train/NAME`, before the weight.
        needs_targets: whether training batches have to hold phrases, boxes and hard negatives.
        listens: whether hidden states of the training pass are read, by hooks (`listening`).
        trains_logit_bias: whether the model's `logit_bias` has a gradient; where it has none, it is frozen.

    Raises:
        ValueError: `weight` is not a positive, finite number.
    """

    name: ClassVar[str]
    needs_targets: ClassVar[bool] = False
    listens: ClassVar[bool] = False
    trains_logit_bias: ClassVar[bool] = False

    def __init__(self, *, weight: float = 1.0) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of the objective {self.name} has to be positive and finite; got {weight}")
        self.weight = weight

    def prepare(self, encoder: DualEncoder) -> None:  # noqa: B027 - most objectives have nothing to prepare
        """Check, before training, that the model serves the objective, and give it the parameters that it lacks.

        Raises:
            ValueError: it does not serve; the message says what would.
        """

    def check_sharding(self) -> None:  # noqa: B027 - what uses embeddings alone goes with every strategy
        """Check, before training, that the objective goes with parameters that are spread over processes.

        Raises:
            ValueError: it does not; the message says what would.
        """

    def listening(self) -> AbstractContextManager[object]:
        """Around the training pass: keep what its hooks see for the call that follows. By default nothing."""
        return nullcontext()

    @abstractmethod
    def __call__(self, step: Step) -> Term:
        """Compute the term."""
