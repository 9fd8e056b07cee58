"""The learning rate of each step: linear warm-up, then constant, cosine or exponential from first to last."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["Schedule", "learning_rate_factor"]

Schedule = Literal["exponential", "cosine", "constant"]


def learning_rate_factor(step: int, steps: float, schedule: Schedule, warmup_steps: int, ratio: float) -> float:
    """The factor on the initial learning rate at a step.

    In warm-up it is (step + 1) / warmup_steps, as in open_clip. Of the n steps after it, the first has the factor 1 and
    the last has `ratio`; with t = 0, 1 / (n - 1), ..., 1 in between,

        exponential: ratio ** t        cosine: ratio + (1 - ratio) (1 + cos(pi t)) / 2        constant: 1

    Args:
        step: from 0.
        steps: of the whole run; only a constant schedule goes without (infinity).
        schedule: see above.
        warmup_steps: of the steps, below their number.
        ratio: the last learning rate, as a multiple of the initial one.

    >>> [round(learning_rate_factor(step, 6, "cosine", 2, 0.0), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.25, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    last = max(int(steps) - warmup_steps - 1, 1)
    done = min(step - warmup_steps, last) / last
    return ratio**done if schedule == "exponential" else ratio + (1 - ratio) * (1 + math.cos(math.pi * done)) / 2
