"""Why something that a data set offers is not measured."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Exclusion"]


class Exclusion(IntEnum):
    """Why a phrase is not measured; the lower-case name is its key in metrics and tables.

    The first reason that applies, in this order, is the one that counts.
    """

    MEASURED = 0
    SEVERAL_INSTANCES = 1
    OUTSIDE_CROP = 2
    SMALLER_THAN_PATCH = 3
    SPAN_CUT_OFF = 4
    SPAN_NOT_ALIGNED = 5
    NOT_MENTIONED = 6
    NO_POSITIVE = 7
