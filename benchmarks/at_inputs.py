"""Measures the cost of attributions at the inputs of both towers, and exCLIP's by formula; prints and keeps a table.

    python benchmarks/at_inputs.py                  # about six minutes of one core
    python benchmarks/at_inputs.py --only ViT-B-32

Random weights, float32, one image and a caption of 12 tokens (start and end included), on one thread. A pass is the
model as it stands, of that image and that caption at the context length. Costs are those of `span_maps_of`
and `attribute_states` on top of the model's own pass of the image, which has given its embedding. Each row is
measured in a separate process; seconds are those of the CPU, in turn with the pass, and operations are counted by
torch.utils.flop_counter (matrix products alone). SigLIP is built with CLIP's tokenizer, since its own has to be
downloaded; that changes nothing of the cost.

exCLIP differentiates each of K embedding dimensions in a backward pass through N + 1 points, of all tokens, and then
multiplies two Jacobians into a matrix of S D_text x P D_image. Its cost follows from that, and the formula is checked
on a tiny model in the same run. On random weights the completeness error means nothing: see benchmarks/quadrature.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attribution import peak_gigabytes
from kept_table import keep

CAPTION = "a brown dog is lying on a red mat outside"
TOKENS = 12
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2")
POINTS = (2, 3)
EXCLIP_POINTS = 10
ROUNDS = 3


def build(config: dict[str, Any]) -> Any:
    """A dual encoder of an open_clip configuration, with random weights that are constants."""
    import torch

    from lightning_xai.models import load_dual_encoder

    torch.manual_seed(0)
    config["text_cfg"] = {**config["text_cfg"], "vocab_size": 49408}
    for name in ("hf_tokenizer_name", "tokenizer_kwargs"):
        config["text_cfg"].pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.json")
        path.write_text(json.dumps(config))
        return load_dual_encoder(str(path)).eval().requires_grad_(False)


def measure(name: str, points: int) -> dict[str, float]:
    """Passes, by the CPU's seconds and by operations, of a phrase and of full interactions; and the peak memory."""
    import open_clip
    import torch

    from lightning_xai.attribution import FeaturePairAttribution

    torch.set_num_threads(1)
    encoder = build(open_clip.get_model_config(name))
    images = torch.randn(1, 3, *encoder.image_transform.size)
    tokens = encoder.tokenizer.encode([CAPTION])
    assert int(encoder.tokenizer.content_mask(tokens).sum()) + 2 == TOKENS
    method = FeaturePairAttribution(encoder, 0, 0, points, rule="midpoint")
    row = torch.arange(1)
    span = torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 2:4] = True
    with torch.no_grad():
        with method.capturing() as captured:
            encoder.encode_image(images)
        states, references = method.hidden_states(images, tokens, captured), method.references(tokens.shape[1])

    def forward() -> None:
        with torch.no_grad():
            encoder.model.encode_image(images), encoder.model.encode_text(tokens)

    found = {"pass": flops(encoder, forward)} | {"before": peak_gigabytes()}
    runs = {
        "phrase": lambda: method.span_maps_of(states, row, row, span, references),
        "full": lambda: method.attribute_states(states, references),
    }
    for what, run in runs.items():
        found[f"{what}, operations"] = flops(encoder, run) / found["pass"]
        ratios = [cpu_seconds(run) / cpu_seconds(forward) for _ in range(ROUNDS)]
        found |= {what: statistics.median(ratios), f"{what}, peak": peak_gigabytes()}
    return found | exclip_cost(name, tokens=TOKENS)


def flops(encoder: Any, run: Callable[[], object]) -> float:
    """Floating-point operations of matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    from lightning_xai.models.at_layer import differentiable

    # The fast path of nn.MultiheadAttention and fused attention would not be counted.
    with differentiable(encoder), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def cpu_seconds(run: Callable[[], object]) -> float:
    """The CPU's seconds of a call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def exclip_cost(name: str, tokens: int) -> dict[str, float]:
    """Passes and gigabytes of exCLIP at the inputs, by formula."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text, points = config["vision_cfg"], config["text_cfg"], EXCLIP_POINTS + 1
    patch = vision.get("patch_size", 16)
    places = (vision["image_size"] // patch) ** 2 + ("timm_model_name" not in vision)
    side = tokens * text["width"], places * vision.get("width", 768)
    # The matrix of interactions, the two differences repeated to its size, and their product with it.
    return {"exclip": points * (1 + config["embed_dim"]), "exclip, memory": 4 * side[0] * side[1] * 4 / 1e9}


def exclip_on_a_tiny_model() -> tuple[float, float]:
    """Operations of exCLIP counted on a tiny model, and by the formula."""
    import torch
    from exclip.explanation import OpenClipExplainer

    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    encoder = build({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    images, tokens = torch.randn(1, 3, 32, 32), encoder.tokenizer.encode([CAPTION])
    encoder.requires_grad_(True)  # exCLIP takes its graph from the weights
    explainer = OpenClipExplainer(encoder.model, image_dim=32, device=torch.device("cpu"))
    counted = flops(encoder, lambda: explainer.explain(tokens, images, 0, 0, N=EXCLIP_POINTS))
    explainer.reset_attribution()

    def forward() -> None:
        with torch.no_grad():
            encoder.model.encode_image(images), encoder.model.encode_text(tokens)

    product = 2 * 16 * (TOKENS * 32) * (17 * 64)
    return counted, (EXCLIP_POINTS + 1) * (1 + 16) * flops(encoder, forward) + product


def in_own_process(name: str, points: int) -> dict[str, float]:
    """Measure one model in a fresh process."""
    command = [sys.executable, __file__, "--measure", name, "--points", str(points)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return result


HEADS = (
    "model",
    "points",
    "phrase [passes]",
    "by operations",
    "full interactions [passes]",
    "by operations",
    "memory: before, phrase, full [GB]",
    "exCLIP [passes]",
    "exCLIP's matrices [GB]",
)


def line(name: str, points: int, found: dict[str, float]) -> str:
    """A row of the table."""
    memory = ", ".join(f"{found[what]:.2f}" for what in ("before", "phrase, peak", "full, peak"))
    numbers = [f"{found[what]:.2f}" for what in ("phrase", "phrase, operations")]
    numbers += [f"{found[what]:.1f}" for what in ("full", "full, operations")]
    cells = [f"`{name}`", str(points), *numbers, memory, f"{found['exclip']:,.0f}", f"{found['exclip, memory']:.1f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS, help="measure one model, and keep nothing")
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--points", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.measure:
        print(json.dumps(measure(options.measure, options.points)))
        return
    lines = [
        "Forward passes (image and caption) that a phrase at the inputs costs, and full interactions of a caption of "
        f"{TOKENS} tokens, midpoint rule; for comparison exCLIP's full interactions (it has no other) by formula, with "
        f"{EXCLIP_POINTS} points.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---" * len(HEADS) + "|",
    ]
    for name in [options.only] if options.only else MODELS:
        for points in POINTS:
            lines.append(line(name, points, in_own_process(name, points)))
            print(lines[-1], file=sys.stderr, flush=True)
    counted, expected = exclip_on_a_tiny_model()
    lines += ["", f"On a tiny model exCLIP's operations are {counted / expected:.3f} times what the formula gives."]
    print(lines[-1], file=sys.stderr, flush=True)
    if not options.only:
        keep("at-inputs", "Attributions at the inputs", "cpu", "\n".join(lines))


if __name__ == "__main__":
    main()
