"""Times Banzhaf interactions against a dense regression over pairs of coalitions; prints and keeps a table.

    python benchmarks/banzhaf.py                  # about two minutes on 2 cores

The budget is that of FIxLIP's README: 2^13 coalitions of patches and 2^6 of tokens, here of a ViT-B-32 (49 patches) and
a caption of 10 tokens. Both regressions get the same embeddings, drawn at random, in a process of their own each, which
also gives its peak memory. What the towers take for that budget is measured on fewer masked inputs, with random
weights. Times differ from machine to machine: read the ratios.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from attribution import peak_gigabytes
from kept_table import keep
from methods import in_own_process

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_xai.attribution.coalitions import Coalitions

PATCHES, TOKENS, WIDTH = 49, 10, 512
COALITIONS = (2**13, 2**6)
MODEL = "ViT-B-32"
MASKED = 64


def _given() -> tuple[Coalitions, Tensor, Coalitions, Tensor]:
    """Coalitions and unit embeddings of both sides."""
    import torch
    from torch.nn.functional import normalize

    from lightning_xai.attribution.coalitions import Coalitions

    generator = torch.Generator().manual_seed(0)
    image_NK, text_MK = (normalize(torch.randn(count, WIDTH, generator=generator), dim=1) for count in COALITIONS)
    images, texts = (Coalitions.sample(*side, 0.5) for side in zip((PATCHES, TOKENS), COALITIONS, strict=True))
    return images, image_NK, texts, text_MK


def measure_dense() -> tuple[float, float, list[float]]:
    """Seconds and gigabytes of the regression as it is published: a row for each pair of coalitions."""
    import torch

    images, image_NK, texts, text_MK = _given()
    before = peak_gigabytes()
    begin = time.perf_counter()
    ones = [
        torch.cat([torch.ones(len(side.present), 1), side.present.float()], dim=1).double() for side in (images, texts)
    ]
    values = (image_NK @ text_MK.T).double().flatten()
    design = torch.einsum("ni,mt->nmit", *ones).flatten(2).flatten(0, 1)
    solution = torch.linalg.solve(design.T @ design, design.T @ values)
    return time.perf_counter() - begin, peak_gigabytes() - before, solution.tolist()


def measure_factorised() -> tuple[float, float, list[float]]:
    """The same by one regression of embeddings a side, as `BanzhafInteractions` has it."""
    images, image_NK, texts, text_MK = _given()
    before = peak_gigabytes()
    begin = time.perf_counter()
    image = images.regression("patches", "image_samples").float() @ image_NK
    text = texts.regression("tokens", "text_samples").float() @ text_MK
    solution = image @ text.T
    return time.perf_counter() - begin, peak_gigabytes() - before, solution.flatten().tolist()


def measure_passes() -> float:
    """Seconds that both towers take for the whole budget, from some masked inputs."""
    import torch

    from lightning_xai.models import load_dual_encoder

    encoder = load_dual_encoder(MODEL, None).eval()
    images = torch.randn(MASKED, *encoder.image_shape)
    tokens = encoder.tokenizer.encode(["a dog lies on a red mat near a cat"] * MASKED)
    seconds = []
    with torch.inference_mode():
        for encode, inputs in ((encoder.encode_image, images), (encoder.encode_text, tokens)):
            encode(inputs)
            begin = time.perf_counter()
            encode(inputs)
            seconds.append((time.perf_counter() - begin) / MASKED)
    return sum(each * count for each, count in zip(seconds, COALITIONS, strict=True))


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (dense, dense_peak, one), (factorised, peak, other) = (
        in_own_process(measure) for measure in (measure_dense, measure_factorised)
    )
    passes = in_own_process(measure_passes)
    most = max(abs(a - b) for a, b in zip(one, other, strict=True))
    lines = [
        f"{COALITIONS[0]:,} coalitions of {PATCHES} patches, {COALITIONS[1]} of {TOKENS} tokens, p = 0.5.",
        "",
        "| regression | seconds | faster by | memory on top, GB | of the dense one's |",
        "|---|---|---|---|---|",
        f"| dense, {COALITIONS[0] * COALITIONS[1]:,} rows | {dense:.2f} | 1 | {dense_peak:.2f} | 1 |",
        f"| factorised | {factorised:.3f} | {dense / factorised:.0f} (target: 20) | {peak:.2f} "
        f"| {peak / dense_peak:.3f} (target: 0.1) |",
        "",
        f"Largest difference of a coefficient: {most:.1e}. The towers' passes of this budget take {passes:.0f} s, so "
        f"that the regression is {factorised / passes:.3%} of them (target: 5 %).",
    ]
    keep("banzhaf", "Banzhaf interactions", "cpu", "\n".join(lines), MODEL)


if __name__ == "__main__":
    main()
