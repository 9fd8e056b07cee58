"""The interface of training objectives.

Shapes: B rows on this rank, K embedding width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_xai.data.batch import Batch
from lightning_xai.data.needs import BatchNeeds
from lightning_xai.models.dual_encoder import DualEncoder

__all__ = ["Objective", "Step", "Term", "zero_with_graph"]


@dataclass(frozen=True)
class Step:
    """What a training step has computed of this rank's rows.

    Attributes:
        encoder: the model that is trained.
        batch: its images and captions; row i of both belongs together.
        image: [B, K] unit embeddings, at least float32.
        text: [B, K], likewise.
        scale: the factor on similarities, a scalar (the exponential already taken).
        extra: by name of an objective, [N, K] unit embeddings of its `extra_tokens`.
    """

    encoder: DualEncoder
    batch: Batch
    image: Tensor
    text: Tensor
    scale: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


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
        needs: what training batches have to hold in addition to images and captions; data without it are refused.
        listens: whether hidden states of the training pass are read, by hooks (`listening`).
        trains_logit_bias: whether the model's `logit_bias` has a gradient; where it has none, it is frozen.
        towers: which towers the term trains: `both`, or `image` or `text` alone.

    Raises:
        ValueError: `weight` is not a positive, finite number.
    """

    name: str
    needs: BatchNeeds = BatchNeeds()
    listens: ClassVar[bool] = False
    trains_logit_bias: ClassVar[bool] = False
    towers: Literal["both", "image", "text"] = "both"

    def __init__(self, *, weight: float = 1.0) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of the objective {self.name} has to be positive and finite; got {weight}")
        self.weight = weight

    @property
    def trains_on(self) -> Mapping[str, Mapping[str, Any]]:
        """What the term itself asks about, so that it says little of what was learned.

        Attribution methods by name, with the options of the maps, and numbers that validation logs by name
        (`val/caption_choice`), without options. The command `objectives` keeps them apart from other judges.
        """
        return {}

    def prepare(self, encoder: DualEncoder) -> None:  # noqa: B027 - most objectives have nothing to prepare
        """Check, before training, that the model serves the objective, and give it the parameters that it lacks.

        Raises:
            ValueError: it does not serve; the message says what would.
        """

    def check_towers(self, trained: Collection[str]) -> None:
        """Check, before training, that the term has something to train.

        Args:
            trained: the towers, image or text, of which any parameter is trained.

        Raises:
            ValueError: it trains one tower alone, which is frozen.
        """
        if self.towers != "both" and self.towers not in trained:
            raise ValueError(
                f"the objective {self.name} trains the {self.towers} tower alone, which is frozen: give it other "
                f"towers, leave it out, or train some of the tower (freeze_{self.towers}, lora)"
            )

    def check_sharding(self) -> None:  # noqa: B027 - what uses embeddings alone goes with every strategy
        """Check, before training, that the objective goes with parameters that are spread over processes.

        Raises:
            ValueError: it does not; the message says what would.
        """

    def listening(self) -> AbstractContextManager[object]:
        """Around the training pass: keep what its hooks see for the call that follows. By default nothing."""
        return nullcontext()

    def extra_tokens(self, batch: Batch) -> Tensor | None:
        """Token ids [N, T] of texts that the training pass embeds after the captions, which have T tokens, too.

        One pass embeds all texts, so that it is the same on every process, however many texts each of them has.
        By default None: no texts.
        """
        return None

    @abstractmethod
    def __call__(self, step: Step) -> Term:
        """Compute the term."""


def zero_with_graph(step: Step) -> Tensor:
    """A zero, scalar, whose backward pass reaches all that a term of this rank's rows would reach.

    A term adds it where a rank has nothing to learn from: every rank then has a graph, and DistributedDataParallel
    gets a gradient of every parameter, the logit scale's included. Invalid rows are not part of it.
    """
    invalid = ~step.batch.valid[:, None]
    embedded = step.image.masked_fill(invalid, 0).sum() + step.text.masked_fill(invalid, 0).sum()
    return 0 * (embedded + step.scale.to(embedded.dtype))
