"""The pages of the documentation, and what stands between their fences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


class Block(NamedTuple):
    """A fenced block of a page: the comment above it, the words after the fence, and its text."""

    comment: str
    language: str
    title: str
    code: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a text."""
    pattern = r'(?:<!-- (\S+) -->\n)?```(\w+)(?: title="([^"]+)")?\n(.*?)```'
    return [Block(*found) for found in re.findall(pattern, text, re.DOTALL)]
