"""A callback for runs that have to last: a small model's training would be over before a job can be disturbed."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class SlowSteps(Callback):
    """Sleeps before each training batch; changes no number.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Sleep."""
        time.sleep(self.seconds)
