"""What is explained, apart from how: a number made of the similarities of an image with captions.

A new target is one class here, or in another package, and one entry in `TARGETS`.

Shape suffixes: C captions, the pair's own first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_xai.registry import Registry

__all__ = ["SIMILARITY", "TARGETS", "Contrast", "PairSimilarities", "Probability", "Similarity", "Target"]

Weight = Literal["mean", "softmax"]
Captions = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True)
class PairSimilarities:
    """The similarities of an image and its captions as they are, which a target may take as constants.

    Attributes:
        values: [..., C] cosine similarities, that of the pair's own caption first.
        counted: [..., C] bool, False for what only fills up: pairs may have different numbers of other captions.
        scale: the model's factor on similarities, exp(logit_scale), a scalar.
    """

    values: Tensor
    counted: Tensor
    scale: Tensor

    @property
    def weights_of_others(self) -> Tensor:
        """[..., C - 1]: the softmax of the scaled similarities of the other captions."""
        logits = (self.scale * self.values[..., 1:]).masked_fill(~self.counted[..., 1:], -torch.inf)
        return logits.softmax(dim=-1)


class Target(ABC):
    """A number that is explained: a function of the similarities of an image with its caption and with others.

    Args:
        others: captions, the same for all pairs of a batch; or a sequence of captions for each pair.

    Attributes:
        linear: whether `value` is linear in the similarities, so that interactions of captions can be added up.
        may_hold_caption: whether a pair's own caption may be among the others, where it is then left out.

    Raises:
        ValueError: a caption that is empty, or no text.
    """

    linear: ClassVar[bool] = False
    may_hold_caption: ClassVar[bool] = False

    def __init__(self, others: Captions = ()) -> None:
        name = type(self).__name__
        if isinstance(others, str):
            raise ValueError(f"{name} takes a list of captions; got the text {others!r}: give [{others!r}]")
        self.others = others
        for given in others:
            for caption in given if isinstance(given, list | tuple) else [given]:
                if not isinstance(caption, str):
                    raise ValueError(f"{name} takes captions as texts; got {caption!r}")
                if not caption.strip():
                    raise ValueError(f"a caption that {name} compares with is empty: give a text, or leave it out")

    def of_pairs(self, count: int) -> list[list[str]]:
        """The other captions of each of `count` pairs.

        Raises:
            ValueError: there are captions for another number of pairs.
        """
        if not any(not isinstance(given, str) for given in self.others):
            return [[str(caption) for caption in self.others]] * count
        if len(self.others) != count:
            raise ValueError(f"{type(self).__name__} has captions for {len(self.others)} pairs; got {count} pairs")
        return [list(captions) for captions in self.others]

    @abstractmethod
    def value(self, similarities: Tensor, pair: PairSimilarities) -> Tensor:
        """The target of similarities [..., C] of an image, a caption (the first) and others; differentiable.

        Args:
            similarities: some of which depend on what is explained. They need not be those of the whole image and
                captions, but of one patch, or of an image from which parts were taken.
            pair: the similarities of the whole image and captions, in a shape that broadcasts.

        Returns:
            [...]
        """


class Similarity(Target):
    """The cosine similarity of image and caption, in [-1, 1]."""

    linear = True

    def __init__(self) -> None:
        super().__init__()

    def value(self, similarities: Tensor, pair: PairSimilarities) -> Tensor:
        """The similarity of the caption."""
        return similarities[..., 0]


class Contrast(Target):
    """Why this caption rather than others: s(caption) less the mean of s(other), in [-2, 2].

    Args:
        others: the other captions, the same for all pairs; or a sequence of captions for each pair.
        weight: of the other captions: `"mean"`, or `"softmax"` of their similarities with the whole image times the
            model's logit scale, so that those nearest to the image count most. These weights are constants: the
            contrast is linear in the similarities either way.

    Raises:
        ValueError: no caption, an empty one, or an unknown weight.

    Example:
        >>> pair = PairSimilarities(torch.tensor([0.3, 0.2, 0.0]), torch.tensor([True] * 3), torch.tensor(10.0))
        >>> round(float(Contrast(["a cat", "a bird"]).value(pair.values, pair)), 3)  # 0.3 - (0.2 + 0.0) / 2
        0.2
    """

    linear = True

    def __init__(self, others: Captions, weight: Weight = "mean") -> None:
        super().__init__(others)
        _check_some(self)
        if weight not in get_args(Weight):
            raise ValueError(f"weight is one of {', '.join(get_args(Weight))}; got {weight!r}")
        self.weight = weight

    def value(self, similarities: Tensor, pair: PairSimilarities) -> Tensor:
        """The difference."""
        counted = pair.counted[..., 1:].to(similarities)
        mean = counted / counted.sum(dim=-1, keepdim=True)
        weights = mean if self.weight == "mean" else pair.weights_of_others.to(similarities)
        return similarities[..., 0] - (weights * similarities[..., 1:]).sum(dim=-1)


class Probability(Target):
    """The probability of the caption among candidates: softmax of the similarities times the model's logit scale.

    In (0, 1). Its gradient is that of `Contrast(candidates, weight="softmax")` times scale * p * (1 - p).

    Args:
        candidates: the captions to choose from, the same for all pairs; or a sequence of captions for each pair. A
            pair's own caption is always one of them, and counts once.

    Raises:
        ValueError: no caption, or an empty one.

    Example:
        >>> pair = PairSimilarities(torch.tensor([0.3, 0.2]), torch.tensor([True] * 2), torch.tensor(10.0))
        >>> round(float(Probability(["a cat"]).value(pair.values, pair)), 3)  # 1 / (1 + exp(-10 * 0.1))
        0.731
    """

    may_hold_caption = True

    def __init__(self, candidates: Captions) -> None:
        super().__init__(candidates)
        _check_some(self)

    def value(self, similarities: Tensor, pair: PairSimilarities) -> Tensor:
        """The probability."""
        logits = (pair.scale * similarities).masked_fill(~pair.counted, -torch.inf)
        return logits.softmax(dim=-1)[..., 0]


SIMILARITY = Similarity()
"""What is explained unless something else is asked for."""


def _check_some(target: Target) -> None:
    if not len(target.others) or not all(map(len, target.others)):
        raise ValueError(f"{type(target).__name__} needs at least one other caption to compare with; got none")


def _check_target_class(name: str, entry: Any) -> None:
    """Raise a ValueError that states the rule which a target of another package breaks."""
    if not name.isidentifier():
        raise ValueError("a target's name consists of letters, digits and underscores")
    if not (isinstance(entry, type) and issubclass(entry, Target)):
        raise ValueError(f"a target is a subclass of lightning_xai.attribution.Target; got {entry!r}")
    if entry.__abstractmethods__:
        raise ValueError(f"a target implements {', '.join(sorted(entry.__abstractmethods__))}")


TARGETS: Registry[type[Target]] = Registry(
    "target",
    {
        "similarity": "lightning_xai.attribution.targets:Similarity",
        "contrast": "lightning_xai.attribution.targets:Contrast",
        "probability": "lightning_xai.attribution.targets:Probability",
    },
    group="lightning_xai.targets",
    check=_check_target_class,
)
"""Every target by the name that commands use."""
