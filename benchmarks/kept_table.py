"""Keeps what a benchmark has measured under benchmarks/results, with where and by what versions it was measured."""

from __future__ import annotations

import platform
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def keep(name: str, title: str, device: str, measured: str, model: str = "") -> None:
    """Write `results/NAME-DEVICE.md`, and print it."""
    text = f"# {title} on {device_name(device)}\n\n{f'{model}, ' if model else ''}{versions()}\n\n{measured}\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device}.md"
    path.write_text(text)
    print(f"{text}\nKept in {path}")


def device_name(device: str) -> str:
    """What CUDA calls its device, or the number of CPU threads."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def versions() -> str:
    """Versions of torch and Python, in words."""
    import torch

    return f"torch {torch.__version__}, Python {platform.python_version()}"
