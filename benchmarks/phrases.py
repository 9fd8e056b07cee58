"""Measures what attributing phrases costs at the inputs, at the last blocks and in between; prints and keeps a table.

    python benchmarks/phrases.py            # about five minutes on two cores

Random weights, float32, midpoint rule with 3 points, on one thread. A pass is the model as it stands, of one image and
one caption at the context length. Each row is measured in a separate process, passes and phrases in turn, and so is
its peak memory (resident set, torch's own included). Times differ from machine to machine: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from attribution import CAPTION, peak_gigabytes
from kept_table import keep

MODELS = {  # images at a time, and layers (image, text): the inputs, in between, the last blocks
    "configs/models/shapes_vit.json": (32, ((0, 0), (1, 0), (1, 1))),
    "ViT-B-32": (2, ((0, 0), (6, 6), (11, 11))),
}
PHRASES = (1, 2, 5)
ROUNDS = 3


def measure(model: str, layers: tuple[int, int], batch: int) -> dict[str, float]:
    """Passes a phrase, by how many phrases an image and its caption have, and the peak memory."""
    import torch

    from lightning_xai.attribution import FeaturePairAttribution
    from lightning_xai.models import load_dual_encoder

    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder: Any = load_dual_encoder(model).eval()
    images = torch.randn(batch, 3, *encoder.image_transform.size)
    tokens = encoder.tokenizer.encode([CAPTION] * batch)
    method = FeaturePairAttribution(encoder, *layers, 3, rule="midpoint")
    with torch.no_grad():
        states, references = method.hidden_states(images, tokens), method.references()
    before = peak_gigabytes()

    def forward() -> None:
        with torch.no_grad():
            encoder.model.encode_image(images), encoder.model.encode_text(tokens)

    def phrases(count: int) -> Callable[[], object]:
        rows = torch.arange(batch).repeat_interleave(count)
        spans = torch.zeros(len(rows), tokens.shape[1], dtype=torch.bool)
        spans[torch.arange(len(rows)), 1 + torch.arange(len(rows)) % count] = True
        return lambda: method.span_maps_of(states, rows, rows, spans, references)

    runs = {count: phrases(count) for count in PHRASES}
    found: dict[str, float] = {}
    for count, run in runs.items():
        ratios = [_seconds(run) / _seconds(forward) / count for _ in range(ROUNDS + 1)][1:]
        found[str(count)] = statistics.median(ratios)
    return found | {"peak": peak_gigabytes(), "before": before}


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_own_process(model: str, number: int) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--model", model, "--layers", str(number)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return result


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.model:
        batch, every = MODELS[options.model]
        print(json.dumps(measure(options.model, every[options.layers], batch)))
        return
    heads = [*(f"passes a phrase, {count} an image" for count in PHRASES), "peak memory [GB]", "before [GB]"]
    lines = [
        "Forward passes (image and caption) that a phrase costs, midpoint rule with 3 points.",
        "",
        "| model | images at a time | layers (image, text) | " + " | ".join(heads) + " |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for model, (batch, every) in MODELS.items():
        for number, (image, text) in enumerate(every):
            found = in_own_process(model, number)
            cells = [f"{value:.2f}" for value in found.values()]
            lines.append(f"| `{model}` | {batch} | {image}, {text} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    keep("phrases", "Phrases by layer", "cpu", "\n".join(lines))


if __name__ == "__main__":
    main()
