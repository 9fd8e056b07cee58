"""Measures span maps and full interactions on each kind of tower, also of another version; prints and keeps a table.

    python benchmarks/towers.py                        # presets paper and fast; about ten minutes on one core
    git worktree add ../before v0.1.0                  # a checkout of the version to compare with
    python benchmarks/towers.py --against ../before

Random weights, float32, one thread, pairs with a caption of 15 tokens, tokenized as CLIP does, `--batch` at a time.
Costs are CPU seconds on top of a forward pass of the pair (open_clip's encode_image and encode_text), in multiples of
that pass, each the least of several; what enters the layers, and the embedding of the image, are kept of that pass.
Every row is measured in a separate process, so that its peak memory (resident set, torch's own included) is that row's.
The completeness error is of random weights, which says little: `benchmarks/tower_kinds.py` measures it on trained
models. A version without presets is measured at its defaults.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attribution import CAPTION, peak_gigabytes
from kept_table import keep

MODELS = {  # the most that a span map and full interactions are asked to cost
    "ViT-B-32": (0.10, 0.40),
    "ViT-B-16": (0.06, 0.20),
    "ViT-B-16-SigLIP2": (0.50, 3.0),
    "PE-Core-S-16-384": (0.60, 3.0),
    "MobileCLIP2-S0": (0.50, 4.0),
    "RN50": (1.20, 4.0),
    "convnext_base": (0.50, 2.0),
}
PRESETS = ("paper", "fast")
ROUNDS = 10


def _seconds(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def _encoder(model: str) -> Any:
    """The architecture with random weights and CLIP's tokenizer, as some have one that is downloaded."""
    import open_clip
    import torch

    from lightning_xai.models import load_dual_encoder

    config = open_clip.get_model_config(model)
    for name in ("hf_tokenizer_name", "tokenizer_kwargs"):
        config["text_cfg"].pop(name, None)
    config["text_cfg"]["vocab_size"] = 49408
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{model}.json"
        path.write_text(json.dumps(config))
        return load_dual_encoder(path).eval()


def measure(model: str, preset: str, what: str, batch: int) -> dict[str, Any]:
    """Cost in forward passes, completeness error, and peak memory with and without, of one model and preset."""
    import torch

    from lightning_xai.attribution import FeaturePairAttribution

    torch.set_num_threads(1)
    encoder = _encoder(model)
    images, tokens = torch.randn(batch, *encoder.image_shape), encoder.tokenizer.encode([CAPTION] * batch)
    options: dict[str, Any] = (
        {"preset": preset} if "preset" in inspect.signature(FeaturePairAttribution).parameters else {}
    )
    method = FeaturePairAttribution(encoder, **options)
    row, span = torch.arange(batch), torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 2:4] = True

    def forward() -> None:
        with torch.no_grad():
            encoder.model.encode_image(images), encoder.model.encode_text(tokens)

    with torch.no_grad(), method.capturing() as captured:
        forward()
        # A version without presets would also attribute to the padding that the pass has run.
        states = method.hidden_states(images, tokens, *([captured] if options else []))
        references = method.references(tokens.shape[1])
    before, rounds, found = peak_gigabytes(), ROUNDS, None
    begin = time.process_time()

    def run() -> Any:
        if what == "span map":
            return method.span_maps_of(states, row, row, span, references)
        return method.attribute_states(states, references)

    found = run()
    if time.process_time() - begin > 5 * _seconds(forward):
        rounds = 1  # a warm-up changes little there
    cost = min(_seconds(run) for _ in range(rounds)) / min(_seconds(forward) for _ in range(ROUNDS))
    layers, error = f"{method.image.layer}, {method.text.layer}", getattr(found, "completeness_error", None)
    numbers = {"cost": cost, "peak": peak_gigabytes(), "before": before, "layers": layers}
    return numbers if error is None else numbers | {"error": float(error.abs().mean())}


def in_own_process(model: str, preset: str, what: str, batch: int, checkout: Path) -> dict[str, Any]:
    """Run one measurement in a fresh process, with the package of a checkout."""
    command = [sys.executable, __file__, "--model", model, "--preset", preset, "--what", what]
    command += ["--batch", str(batch)]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def rows(models: list[str], batch: int, builds: dict[str, tuple[str, Path]]) -> list[str]:
    """Lines of the table: every model by every build, which is a preset and a checkout."""
    lines = []
    for model in models:
        for build, (preset, checkout) in builds.items():
            span, full = (in_own_process(model, preset, what, batch, checkout) for what in ("span map", "interactions"))
            memory = [f"{found['peak'] / found['before']:.2f}" for found in (span, full)]
            asked_span, asked_full = MODELS[model]
            costs = [f"{span['cost']:.2f}", f"{asked_span:.2f}", f"{full['cost']:.2f}", f"{asked_full:.2f}"]
            cells = [model, build, full["layers"], *costs, f"{full['error']:.1e}", *memory, f"{full['peak']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another version of this repository")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="some of the models")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS, help="some of the presets")
    parser.add_argument("--batch", type=int, default=1, help="pairs at a time")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--preset", help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.model:
        print(json.dumps(measure(options.model, options.preset, options.what, options.batch)))
        return
    here = Path(__file__).parent.parent
    builds = {preset: (preset, here) for preset in options.presets}
    if options.against is not None:
        builds = {"before": ("paper", options.against)} | builds
    heads = ["tower", "preset", "layers", "span map", "asked", "full interactions", "asked", "completeness error"]
    heads += ["memory, span map", "memory, full", "peak [GB]"]
    lines = [
        f"Forward passes that attributions cost on top of the pairs' own, {options.batch} at a time, and peak memory "
        "as a multiple of that pass's.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *rows(options.models, options.batch, builds),
    ]
    import torch

    torch.set_num_threads(1)  # as each measurement; the table's head says so
    keep(
        "towers" if options.batch == 1 else f"towers-batch={options.batch}",
        "Attribution by kind of tower",
        "cpu",
        "\n".join(lines),
    )


if __name__ == "__main__":
    main()
