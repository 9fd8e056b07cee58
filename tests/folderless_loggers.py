"""Loggers of users' own, with no folder called `save_dir`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger


class WithoutFolder(Logger):
    """Writes to no file."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    @property
    def name(self) -> str:
        return "print"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class WithRootFolder(WithoutFolder):
    """Calls its folder as LitLogger does."""

    def __init__(self, root_dir: str = ".") -> None:
        super().__init__()
        self.root = root_dir
