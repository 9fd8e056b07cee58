"""Reasons why something that a data set offers is not measured."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Exclusion"]


class Exclusion(IntEnum):
    """A reason why a target has no value; tables hold its `key`.

    The first reason that applies, in this order, is the one that counts. The data decide what they know, up to
    NOT_MENTIONED except for SMALLER_THAN_PATCH; the evaluation decides the rest. Of what is measured by mask alone,
    MASK_SIZE means a mask of another size than its image, MASK_BROKEN one that does not decode or has no pixel in its
    object's box.
    """

    MEASURED = 0
    SEVERAL_INSTANCES = 1
    OUTSIDE_CROP = 2
    SMALLER_THAN_PATCH = 3
    SPAN_CUT_OFF = 4
    SPAN_NOT_ALIGNED = 5
    NOT_MENTIONED = 6
    NO_POSITIVE = 7
    NO_BOX = 8
    NO_VALUE = 9
    NO_MASK = 10
    MASK_SIZE = 11
    MASK_BROKEN = 12
    NO_COLLAGE = 13
    NO_COMPARISON = 14

    @property
    def key(self) -> str:
        """The lower-case name; empty for MEASURED.

        >>> Exclusion.NO_POSITIVE.key, Exclusion.MEASURED.key
        ('no_positive', '')
        """
        return self.name.lower() if self else ""
