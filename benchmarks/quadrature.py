"""Measures how well a few integration steps do: completeness error, and how far gamma moves; prints and keeps tables.

    python -m lightning_xai fit --config configs/demo.yaml
    python benchmarks/quadrature.py

Run the demo first: its best checkpoint and its validation shards are what is measured, on phrases that can be measured,
each in its caption. The reference for gamma is the midpoint rule with 60 steps. Then gamma and rho are measured at the
inputs of other layers, with the midpoint rule. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from kept_table import keep
from torch import Tensor

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.data import Exclusion, ShardDataModule
from lightning_xai.metrics import gamma, patch_mask, rho
from lightning_xai.models import DualEncoder, load_dual_encoder

CHECKPOINT = Path("runs/demo/version_0/checkpoints/best-grounding.ckpt")
SHARDS = Path("data/shapes/val")
SETTINGS = (
    *(("right", steps) for steps in (3, 5, 10, 20, 50)),
    *(("midpoint", steps) for steps in (3, 5, 10, 20)),
    *(("trapezoid", steps) for steps in (10,)),
    *(("gauss_legendre", steps) for steps in (3, 6, 8, 10)),
)
EXACT_STEPS = 60


@dataclass(frozen=True)
class Phrases:
    """M phrases that can be measured, each with its image, its caption and its box.

    Attributes:
        images: [M, 3, h, w].
        tokens: [M, L], of the whole captions.
        spans: [M, L] bool, the phrases' tokens.
        boxes: [M, 4] in pixels.
    """

    images: Tensor
    tokens: Tensor
    spans: Tensor
    boxes: Tensor


def read_phrases(encoder: DualEncoder, shards: Path, count: int) -> Phrases:
    """The first phrases of a split that can be measured."""
    data = ShardDataModule(test=shards, eval_batch_size=64, num_workers=0)
    data.bind(encoder.image_transform, encoder.tokenizer)
    data.setup("test")
    parts: list[tuple[Tensor, ...]] = []
    for batch in data.test_dataloader():
        phrases = batch.phrases
        rows = (phrases.reason == Exclusion.MEASURED).nonzero()[:, 0]
        images, tokens = batch.images[phrases.image_row[rows]], batch.tokens[phrases.caption_row[rows]]
        parts.append((images, tokens, phrases.span_mask[rows], phrases.boxes[rows]))
        if sum(len(part[0]) for part in parts) >= count:
            break
    return Phrases(*(torch.cat(column)[:count] for column in zip(*parts, strict=True)))


def measure(attribution: FeaturePairAttribution, phrases: Phrases) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each phrase: similarity of its caption, completeness error, gamma, and whether the largest entry is a hit."""
    result = attribution.attribute(phrases.images, phrases.tokens)
    maps = torch.einsum("ml,mlhw->mhw", phrases.spans.to(result.interactions), result.interactions)
    masks = patch_mask(
        phrases.boxes, (maps.shape[1], maps.shape[2]), (phrases.images.shape[2], phrases.images.shape[3])
    )
    return result.similarity, result.completeness_error, gamma(maps, masks), rho(maps, masks)


def quadrature_rows(encoder: DualEncoder, phrases: Phrases) -> Iterator[str]:
    """Lines of the table of rules and steps."""
    exact = measure(_attribution(encoder, "midpoint", EXACT_STEPS), phrases)[2]
    for rule, steps in SETTINGS:
        similarity, error, share, _ = measure(_attribution(encoder, rule, steps), phrases)
        mean = float(error.abs().mean())
        crossed = int(((share > 0.5) != (exact > 0.5)).sum())
        cells = [f"`{rule}`", str(steps), f"{mean:.5f}", f"{100 * mean / float(similarity.mean()):.1f} %"]
        yield "| " + " | ".join([*cells, f"{float((share - exact).abs().nanmean()):.4f}", str(crossed)]) + " |"


def layer_rows(encoder: DualEncoder, phrases: Phrases, steps: int) -> Iterator[str]:
    """Lines of the table of layers: the last blocks, and the inputs of one tower or of both."""
    for layers in ((-1, -1), (0, -1), (-1, 0), (0, 0)):
        attribution = FeaturePairAttribution(encoder, *layers, steps, rule="midpoint", internal_batch_size=32)
        _, _, share, hit = measure(attribution, phrases)
        names = ["last" if layer < 0 else str(layer) for layer in layers]
        numbers = [f"{float(share.nanmean()):.3f}", f"{100 * float((share > 0.5).double().mean()):.1f} %"]
        yield "| " + " | ".join([*names, *numbers, f"{100 * float(hit.double().mean()):.1f} %"]) + " |"


def _attribution(encoder: DualEncoder, rule: str, steps: int) -> FeaturePairAttribution:
    return FeaturePairAttribution(encoder, steps=steps, rule=rule, internal_batch_size=32)  # type: ignore[arg-type]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--shards", type=Path, default=SHARDS)
    parser.add_argument("--phrases", type=int, default=480)
    options = parser.parse_args()
    encoder = load_dual_encoder(str(options.checkpoint)).eval()
    phrases = read_phrases(encoder, options.shards, options.phrases)
    with torch.no_grad():
        similarity = torch.nn.functional.cosine_similarity(
            encoder.encode_image(phrases.images), encoder.encode_text(phrases.tokens)
        )
    measured = [
        f"{len(phrases.images)} phrases of the validation shards, mean similarity {float(similarity.mean()):.3f}; "
        f"gamma is compared with the midpoint rule at {EXACT_STEPS} steps.",
        "",
        "| rule | steps | mean completeness error | of the mean similarity | mean change of gamma | crossed 0.5 |",
        "|---|---|---|---|---|---|",
        *quadrature_rows(encoder, phrases),
        "",
        "Gamma and rho at the inputs of other layers (midpoint rule, 10 steps):",
        "",
        "| image layer | text layer | gamma, mean | gamma > 0.5 | rho |",
        "|---|---|---|---|---|",
        *layer_rows(encoder, phrases, 10),
    ]
    keep("quadrature", "Integration steps of feature-pair attribution", "cpu", "\n".join(measured), "the demo's model")


if __name__ == "__main__":
    main()
