"""The explorer: a page on which you point at words and see patches, and at patches and see words."""

from __future__ import annotations

from lightning_xai.report.explorer.items import ExplorerCaption, ExplorerItem, ExplorerReading
from lightning_xai.report.explorer.page import Mode, component, explorer_frame, explorer_page, script_digest

__all__ = [
    "ExplorerCaption",
    "ExplorerItem",
    "ExplorerReading",
    "Mode",
    "component",
    "explorer_frame",
    "explorer_page",
    "script_digest",
]
