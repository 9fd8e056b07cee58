"""Keeps what a benchmark has measured under benchmarks/results, with where and by what versions it was measured."""

from __future__ import annotations

import platform
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def keep(name: str, title: str, device: str, measured: str, model: str = "") -> None:
    """Write `results/NAME-DEVICE.md`, and print it."""
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    text = f"# {title} on {where}\n\n{f'{model}, ' if model else ''}{versions}\n\n{measured}\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device}.md"
    path.write_text(text)
    print(f"{text}\nKept in {path}")
