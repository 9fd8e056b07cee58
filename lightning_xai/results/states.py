"""Names of the states in which a training is measured."""

from __future__ import annotations

__all__ = ["state_name"]


def state_name(epoch: object) -> str:
    """Return the name of a model's state after `epoch` finished epochs; strings are kept.

    >>> [state_name(epoch) for epoch in (0, 3, "validate")]
    ['before', 'epoch 3', 'validate']
    """
    if isinstance(epoch, str):
        return epoch
    return "before" if epoch == 0 else f"epoch {epoch}"
