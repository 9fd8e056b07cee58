"""Caption choice: is an image more similar to its own caption than to a slightly wrong one?

As SugarCrepe (Hsieh et al. 2023), ARO (Yuksekgonul et al. 2023) and Winoground (Thrush et al. 2022) ask. A tie is a
miss, as in the publishers' code: a model that embeds all captions alike chooses none.

Shape suffixes: N wrong captions, P pairs of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Choice", "ChoiceScores", "choice_scores", "pair_choice", "right_choices"]


class Choice(NamedTuple):
    """A true and a wrong caption of one image.

    Attributes:
        kind: what is wrong, by which scores are reported.
        group: the same in the two choices of a pair of images, each of whose true caption is the other's wrong one;
            empty where there is none.
        true: similarity of the image and the true caption.
        wrong: similarity of the image and the wrong caption.
    """

    kind: str
    group: str
    true: float
    wrong: float


def right_choices(true_N: Tensor, wrong_N: Tensor) -> Tensor:
    """[N] bool, True where the true caption is the more similar one; chance is 1/2.

    >>> right_choices(torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.2, 0.2, 0.2])).tolist()
    [True, False, False]
    """
    return true_N > wrong_N


def pair_choice(true_P2: Tensor, wrong_P2: Tensor) -> dict[str, Tensor]:
    """Compute Winoground's scores (section 4) of pairs of images whose captions are exchanged.

    Args:
        true_P2: similarity of each image and its own caption, s(C0, I0) and s(C1, I1).
        wrong_P2: of each image and the other one's caption, s(C1, I0) and s(C0, I1).

    Returns:
        [P] bool each: `text`, both images choose their captions (Eq. 1; chance 1/4); `image`, both captions choose
        their images (Eq. 2; chance 1/4); `group`, both (Eq. 3; chance 1/6).

    >>> scores = pair_choice(torch.tensor([[0.5, 0.3]]), torch.tensor([[0.4, 0.2]]))
    >>> {name: value.tolist() for name, value in scores.items()}
    {'text': [True], 'image': [False], 'group': [False]}
    """
    text_P = (true_P2 > wrong_P2).all(dim=1)
    image_P = (true_P2 > wrong_P2.flip(1)).all(dim=1)
    return {"text": text_P, "image": image_P, "group": text_P & image_P}


@dataclass(frozen=True)
class ChoiceScores:
    """How many choices were right; the same whatever their order.

    Attributes:
        right: by kind.
        asked: by kind.
        pairs: how many pairs of images were right, by score (`text`, `image`, `group`).
        pairs_asked: number of pairs.
        incomplete: groups that are no pair, since one of their choices is missing, or there are more than two.
    """

    right: dict[str, int]
    asked: dict[str, int]
    pairs: dict[str, int]
    pairs_asked: int
    incomplete: int

    @property
    def micro(self) -> float:
        """Share of right choices, in [0, 1], higher is better; NaN where there are none."""
        asked = sum(self.asked.values())
        return sum(self.right.values()) / asked if asked else math.nan

    @property
    def macro(self) -> float:
        """Mean of the kinds' shares, likewise: what SugarCrepe's and ARO's papers report."""
        shares = [self.right[kind] / asked for kind, asked in self.asked.items()]
        return math.fsum(shares) / len(shares) if shares else math.nan


def choice_scores(choices: Iterable[Choice]) -> ChoiceScores:
    """Count right choices by kind, and right pairs.

    >>> scores = choice_scores([Choice("swap", "", 0.3, 0.1), Choice("swap", "", 0.1, 0.1), Choice("add", "", 1, 0)])
    >>> scores.right, scores.asked, scores.macro
    ({'add': 1, 'swap': 1}, {'add': 1, 'swap': 2}, 0.75)
    """
    given = sorted(choices)
    true_N, wrong_N = torch.tensor([choice[2:] for choice in given], dtype=torch.float64).reshape(-1, 2).unbind(1)
    right, asked = dict[str, int](), dict[str, int]()
    groups = dict[str, list[Choice]]()
    for choice, is_right in zip(given, right_choices(true_N, wrong_N).tolist(), strict=True):
        right[choice.kind] = right.get(choice.kind, 0) + is_right
        asked[choice.kind] = asked.get(choice.kind, 0) + 1
        if choice.group:
            groups.setdefault(choice.group, []).append(choice)
    pairs = [pair for pair in groups.values() if len(pair) == 2]
    values_P22 = torch.tensor([[choice[2:] for choice in pair] for pair in pairs], dtype=torch.float64)
    values_P22 = values_P22.reshape(-1, 2, 2)
    matched = pair_choice(values_P22[..., 0], values_P22[..., 1])
    counts = {name: int(found.sum()) for name, found in matched.items()}
    return ChoiceScores(right, asked, counts, len(pairs), len(groups) - len(pairs))
