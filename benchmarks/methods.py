"""Times the attribution methods against what they would cost written plainly; prints and keeps a table.

    python benchmarks/methods.py                  # about a quarter of an hour on 2 cores, half of it the plain M2IB's
    python benchmarks/methods.py --device cuda
    python benchmarks/methods.py --only m2ib

Random weights of ViT-B-32, float32, captions of COCO's length. What is compared runs in one process, in turn, so that
what else the machine does touches all alike; a time is the median of several rounds after one that is not counted.
Peak memory (resident set of the process, or what the GPU has allocated) is measured in a separate process. Times
differ from machine to machine: read the ratios.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any, TypeVar

# torch is imported where it is used: a process starts with the peak memory of the one that it was started by.
from attribution import peak_gigabytes
from kept_table import keep

MODEL = "ViT-B-32"
CAPTION = "a brown dog lies on a red mat next to a cat"  # 13 tokens with start and end, as captions of COCO have
PAIRS = 8  # that M2IB optimises at a time
MASKED = 64  # masked inputs that pass through a tower at a time

_R = TypeVar("_R")


def in_own_process(measure: Callable[..., _R], *arguments: Any) -> _R:
    """Run one measurement in a fresh process."""
    print(f"measuring {measure.__name__[8:]} {arguments} ...", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=warnings.simplefilter, initargs=("ignore",)
    ) as pool:
        return pool.submit(measure, *arguments).result()


def seconds_of(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    of: Callable[[list[float]], float] = median,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Wall time of each run, by default the median; all are run in turn, once without being counted, then each round.

    Args:
        runs: name -> what is timed.
        rounds: that count.
        of: takes one of the times of a run; `min` for the least, which other programs disturb less.
        clock: `time.process_time` for the CPU's time, which they disturb still less.
    """
    import torch

    def timed(run: Callable[[], object]) -> float:
        begin = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - begin

    counted = [{name: timed(run) for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    return {name: of([seconds[name] for seconds in counted]) for name in runs}


def inputs(device: str, pairs: int) -> tuple[Any, Any, Any]:
    """The encoder, images and token ids."""
    import torch

    from lightning_xai.models import load_dual_encoder

    torch.manual_seed(0)
    encoder = load_dual_encoder(MODEL, device=device).eval()
    images = torch.randn(pairs, *encoder.image_shape, device=device)
    return encoder, images, encoder.tokenizer.encode([CAPTION] * pairs).to(device)


def plain_m2ib(model: Any, image: Any, tokens: Any, *, block: int = 9, beta: float = 0.1) -> dict[str, Any]:
    """M2IB of one pair as its published code computes it: both encoders in full at each of 10 steps of each tower.

    Ten copies of the pair, each with its own noise, run as one batch. Captions keep their padding.

    Args:
        model: open_clip's.
        image: [1, 3, height, width].
        tokens: [1, 77].
        block: whose output is compressed.
        beta: the price of a nat.

    Returns:
        The capacity of each token, [T], by tower.
    """
    import torch

    images, captions = image.expand(10, -1, -1, -1), tokens.expand(10, -1)

    def similarity() -> Any:
        return torch.cosine_similarity(model.encode_image(images), model.encode_text(captions)).mean()

    towers = {
        "image": (model.visual.transformer.resblocks[block], partial(model.encode_image, image)),
        "text": (model.transformer.resblocks[block], partial(model.encode_text, tokens)),
    }
    return {tower: plain_capacity(module, encode, similarity, beta) for tower, (module, encode) in towers.items()}


def plain_capacity(block: Any, encode: Callable[[], Any], similarity: Callable[[], Any], beta: float) -> Any:
    """The capacity [T] after one block, whose output is compressed while `similarity` runs both encoders.

    Args:
        block: of the tower that `encode` runs once, to see what the block gives.
        encode: the block's tower, on one input.
        similarity: the mean cosine of both encoders.
        beta: the price of a nat.
    """
    import torch

    gates: Any = None
    capacity: Any = None

    def compress(module: Any, arguments: Any, features: Any) -> Any:
        nonlocal gates, capacity
        if gates is None:
            gates = torch.full_like(features[:1], 5.0, requires_grad=True)
            return features
        kept = gates.sigmoid()
        variance = (1 - kept) ** 2
        capacity = -0.5 * (1 + variance.log() - (kept * features) ** 2 - variance)
        return kept * features + variance.sqrt() * torch.randn_like(features)

    handle = block.register_forward_hook(compress)
    with torch.no_grad():
        encode()
    optimizer = torch.optim.Adam([gates], lr=1.0)
    for _ in range(10):
        optimizer.zero_grad()
        fit = similarity()
        (beta * capacity.mean() - fit).backward()
        optimizer.step()
    handle.remove()
    return capacity.detach().mean(dim=0).sum(dim=1)


def measure_m2ib(device: str, rounds: int) -> dict[str, float]:
    """Seconds a pair, ours and plain, and the correlation of both image maps."""
    import torch

    from lightning_xai.attribution.m2ib import M2IB

    encoder, images, tokens = inputs(device, PAIRS)
    ours = M2IB(encoder)

    def plain(*, weights_have_gradients: bool) -> Any:
        encoder.model.requires_grad_(weights_have_gradients)
        return plain_m2ib(encoder.model, images[:1], tokens[:1])

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.attribute(images, tokens),
        "plain": partial(plain, weights_have_gradients=True),
        "plain, weights frozen": partial(plain, weights_have_gradients=False),
    }
    seconds = seconds_of(runs, rounds)
    maps = [ours.attribute(images[:1], tokens[:1]).image.flatten(), plain(weights_have_gradients=False)["image"][1:]]
    agreement = float(torch.corrcoef(torch.stack(maps))[0, 1])
    return {**seconds, "ours": seconds["ours"] / PAIRS, "agreement": agreement}


def perturbation_methods(encoder: Any, images: int, texts: int, batch: int) -> dict[str, Any]:
    """RISE and Kernel SHAP that run so many masked images and texts, `batch` of them at a time."""
    from lightning_xai.attribution import RISE, KernelSHAP

    return {
        "RISE": RISE(encoder, image_masks=images, text_masks=texts, internal_batch_size=batch),
        "KernelSHAP": KernelSHAP(encoder, image_samples=images, text_samples=texts, internal_batch_size=batch),
    }


def measure_masks(device: str, rounds: int, images: int, texts: int) -> dict[str, float]:
    """Seconds of a pair with so many masked images and texts, and of the bare encoder on as many inputs."""
    import torch

    encoder, image, tokens = inputs(device, 1)
    masked, captions = image.repeat(MASKED, 1, 1, 1), tokens.repeat(MASKED, 1)

    @torch.inference_mode()
    def bare() -> None:
        for encode, batch, count in ((encoder.encode_image, masked, images), (encoder.encode_text, captions, texts)):
            for start in range(0, count, MASKED):
                encode(batch[: count - start])

    methods = perturbation_methods(encoder, images, texts, MASKED)
    runs = {name: partial(method.attribute, image, tokens) for name, method in methods.items()}
    return seconds_of({"bare": bare, **runs}, rounds)


def measure_relevance(device: str, rounds: int) -> dict[str, float]:
    """Seconds a pair of attention relevance and of the bare encoder, 32 pairs at once and one at a time."""
    import torch

    from lightning_xai.attribution.attention_relevance import AttentionRelevance

    pairs = 32
    encoder, images, tokens = inputs(device, pairs)
    method = AttentionRelevance(encoder)

    @torch.no_grad()
    def bare(images: Any, tokens: Any) -> None:
        encoder.encode_image(images), encoder.encode_text(tokens)

    def one_at_a_time(run: Callable[[Any, Any], object]) -> None:
        for row in range(pairs):
            run(images[row : row + 1], tokens[row : row + 1])

    runs: dict[str, Callable[[], object]] = {
        "batched": partial(method.attribute, images, tokens),
        "one at a time": partial(one_at_a_time, method.attribute),
        "bare, batched": partial(bare, images, tokens),
        "bare, one at a time": partial(one_at_a_time, bare),
    }
    return {name: seconds / pairs for name, seconds in seconds_of(runs, rounds).items()}


def measure_baselines(device: str, rounds: int) -> dict[str, float]:
    """CPU seconds (on a GPU, seconds) of a pass, and of methods with that pass on the same batch: the least of each.

    The pass is by the model's own functions, captions padded to 77 tokens, as methods run it; "trimmed" is one of the
    captions' few tokens alone.
    """
    import torch

    from lightning_xai.attribution import GradECLIP, LeGrad, MaskCLIP

    encoder, images, tokens = inputs(device, PAIRS)

    @torch.no_grad()
    def trimmed() -> None:
        encoder.encode_image(images), encoder.encode_text(tokens)

    methods = {"Grad-ECLIP": GradECLIP(encoder), "LeGrad": LeGrad(encoder), "MaskCLIP": MaskCLIP(encoder)}
    runs: dict[str, Callable[[], object]] = {
        "pass": torch.no_grad()(partial(encoder.own_similarity, images, tokens)),
        "trimmed": trimmed,
    }
    runs |= {name: partial(method.attribute, images, tokens) for name, method in methods.items()}
    return seconds_of(runs, rounds, min, time.process_time if device == "cpu" else time.perf_counter)


def measure_peak(device: str, name: str, masks: int, batch: int) -> float:
    """Peak memory in GB of one method on one pair, with so many masks and masked inputs at a time."""
    import torch

    encoder, images, tokens = inputs(device, 1)
    perturbation_methods(encoder, masks, MASKED, batch)[name].attribute(images, tokens)
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else peak_gigabytes()


def m2ib_section(device: str) -> list[str]:
    """M2IB, and both encoders in full."""
    seconds = in_own_process(measure_m2ib, device, 2)
    lines = [
        f"M2IB, 10 steps, 10 noise samples, bottleneck after block 9 of 12, {PAIRS} pairs at a time. Plain: both "
        "encoders in full at each step of each tower, as the published code does, which leaves the weights their "
        "gradients.",
        "",
        "| M2IB | seconds a pair | ours is faster by | target |",
        "|---|---|---|---|",
        f"| blocks after the bottleneck only, pairs batched | {seconds['ours']:.3f} | 1 | |",
    ]
    for name, target in (("plain", "at least 25"), ("plain, weights frozen", "")):
        lines.append(f"| {name} | {seconds[name]:.2f} | {seconds[name] / seconds['ours']:.1f} | {target} |")
    return [*lines, "", f"Image maps of both, with other noise each, correlate by {seconds['agreement']:.3f}."]


def masks_section(device: str) -> list[str]:
    """RISE and Kernel SHAP, and the bare encoder."""
    lines = [
        f"One pair, {MASKED} masked inputs at a time. Bare: the encoder alone on as many inputs, masked before.",
        "",
        "| method | masked images | masked captions | inputs/s | bare encoder's | ratio | target |",
        "|---|---|---|---|---|---|---|",
    ]
    # Kernel SHAP needs more coalitions than there are patches, 49, and tokens, 11.
    for images, texts in ((256, 16), (64, 1024)):
        seconds = in_own_process(measure_masks, device, 2, images, texts)
        for name in ("RISE", "KernelSHAP"):
            rate, bare = ((images + texts) / seconds[key] for key in (name, "bare"))
            lines.append(
                f"| {name} | {images} | {texts} | {rate:.1f} | {bare:.1f} | {rate / bare:.2f} | at least 0.9 |"
            )
    return lines


def relevance_section(device: str) -> list[str]:
    """Attention relevance, batched."""
    seconds = in_own_process(measure_relevance, device, 3)
    batched, single = seconds["batched"], seconds["one at a time"]
    bare_batched, bare_single = seconds["bare, batched"], seconds["bare, one at a time"]
    return [
        "| last block | attention relevance, seconds a pair | faster by | bare encoder, seconds a pair | faster by |",
        "|---|---|---|---|---|",
        f"| one at a time | {single:.4f} | 1 | {bare_single:.4f} | 1 |",
        f"| batch of 32 | {batched:.4f} | {single / batched:.1f} (target: 3) | {bare_batched:.4f} "
        f"| {bare_single / bare_batched:.1f} |",
    ]


def baselines_section(device: str) -> list[str]:
    """Methods that read attention, on top of the forward pass."""
    seconds = in_own_process(measure_baselines, device, 4)
    whole, trimmed = seconds["pass"], seconds["trimmed"]
    lines = [
        f"Methods that read attention, a batch of {PAIRS}; CPU time, the least of 4 rounds. A pass is the model's own "
        f"of both towers, captions padded to 77 tokens, which methods run to check themselves: {whole:.3f} s. Without "
        f"padding it takes {trimmed:.3f} s.",
        "",
        "| method | seconds, pass included | passes on top of the pass | target: at most |",
        "|---|---|---|---|",
    ]
    for name, target in (("Grad-ECLIP", 1.0), ("LeGrad", 2.0), ("MaskCLIP", 0.2)):
        lines.append(f"| {name} | {seconds[name]:.3f} | {seconds[name] / whole - 1:.2f} | {target} |")
    return lines


def memory_section(device: str) -> list[str]:
    """Peak memory of RISE and Kernel SHAP."""
    settings = ((128, 16), (128, 64), (128, 128), (512, 64))
    columns = " | ".join(f"{masks} masks, {batch} at a time" for masks, batch in settings)
    lines = [f"| peak memory, GB | {columns} |", "|---" * (len(settings) + 1) + "|"]
    for name in ("RISE", "KernelSHAP"):
        peaks = [in_own_process(measure_peak, device, name, masks, batch) for masks, batch in settings]
        lines.append(f"| {name} | {' | '.join(f'{peak:.2f}' for peak in peaks)} |")
    return lines


SECTIONS = {
    "m2ib": m2ib_section,
    "masks": masks_section,
    "relevance": relevance_section,
    "baselines": baselines_section,
    "memory": memory_section,
}


def main() -> None:
    """Measure, print, and keep the tables under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", choices=SECTIONS, help="measure one table")
    options = parser.parse_args()
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            keep(
                f"methods-{name}",
                f"Attribution methods: {name}",
                options.device,
                "\n".join(section(options.device)),
                MODEL,
            )


if __name__ == "__main__":
    main()
