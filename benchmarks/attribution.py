"""Times feature-pair attribution against the authors' package, side by side in one run; prints and keeps a table.

    python benchmarks/attribution.py            # all of it: about ten minutes on 2 cores, most of them exclip's
    python benchmarks/attribution.py --without-exclip

Random weights, float32, N = 10, input of the last block, the caption below. Every row is measured in a process of its
own, so that peak memory (resident set of the process, torch's own included) is that row's; our times are medians of
several repetitions after a warm-up. Times differ from machine to machine: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kept_table import keep

CAPTION = "a brown dog is lying on a red mat next to a small cat"  # 15 tokens with BOS and EOT
BATCH = 8


def peak_gigabytes() -> float:
    """Largest resident set of this process so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 1e6 if sys.platform != "darwin" else kilobytes / 1e9


def median_seconds(run: Callable[[], Any], repetitions: int = 7) -> float:
    """Median wall time of a call, after one that is not counted."""
    import torch

    def timed() -> float:
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    run()
    return statistics.median(timed() for _ in range(repetitions))


def _inputs(model: str, device: str) -> tuple[Any, Any, Any]:
    import torch

    from lightning_xai.models import load_dual_encoder

    torch.manual_seed(0)
    encoder = load_dual_encoder(model, device=device).eval()
    images = torch.randn(BATCH, 3, *encoder.image_transform.size, device=device)
    return encoder, images, encoder.tokenizer.encode([CAPTION] * BATCH).to(device)


def measure_ours(model: str, device: str) -> dict[str, float]:
    """Seconds a pair, in a batch: plain forward pass, span map on top of it, span map in all, full tensor."""
    import torch

    from lightning_xai.attribution import FeaturePairAttribution

    encoder, images, tokens = _inputs(model, device)
    with torch.no_grad():
        seconds = {name: median_seconds(run) for name, run in runs_of(FeaturePairAttribution(encoder), images, tokens)}
    return {name: value / BATCH for name, value in seconds.items()} | {"peak": peak_gigabytes()}


FORWARD, SPAN, SPAN_IN_ALL, FULL = (
    "forward pass",
    "span map on top of a forward pass",
    "span map, forward pass included",
    "full tensor, forward pass included",
)


def runs_of(attribution: Any, images: Any, tokens: Any) -> list[tuple[str, Callable[[], Any]]]:
    """What is timed of a batch of pairs, by name."""
    import torch

    model = attribution.encoder.model
    span = torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 2:4] = True
    rows = torch.arange(len(images), device=images.device)
    states, references = attribution.hidden_states(images, tokens), attribution.references()
    return [
        # What a user runs without this package: both towers of open_clip, text at its full context length.
        (FORWARD, lambda: (model.encode_image(images), model.encode_text(tokens))),
        (SPAN, lambda: attribution.span_maps_of(states, rows, rows, span, references)),
        (SPAN_IN_ALL, lambda: attribution.span_map(images, tokens, span)),
        (FULL, lambda: attribution.attribute(images, tokens)),
    ]


def measure_exclip(model: str, device: str) -> dict[str, float]:
    """Seconds for one pair with the authors' package, and how far our numbers are from its."""
    import torch
    from exclip.explanation import OpenClipExplainer

    encoder, images, tokens = _inputs(model, device)
    explainer = OpenClipExplainer(encoder.model, device=torch.device(device))
    begin = time.perf_counter()
    theirs = explainer.explain(tokens[:1], images[:1])
    seconds = time.perf_counter() - begin
    peak = peak_gigabytes()
    from lightning_xai.attribution import FeaturePairAttribution

    explainer.reset_attribution()
    ours = FeaturePairAttribution(encoder).attribute(images[:1], tokens[:1]).interactions[0, : len(theirs)].cpu()
    return {"pair": seconds, "difference": float((ours - theirs).norm() / theirs.norm()), "peak": peak}


def measure_callback(
    model: str, device: str, *, images: int = 128, side: int | None = None, batch_size: int = 16, workers: int = 1
) -> dict[str, float]:
    """Seconds of a validation epoch with and without GroundingCallback, in turn, on drawn shapes.

    Args:
        model: open_clip's name, or the path of a config.
        device: cpu or cuda.
        images: with two captions each.
        side: pixels of a side that they are drawn at, at least 32; by default those that the model takes.
        batch_size: images at a time.
        workers: processes that read.
    """
    import lightning as L
    from lightning.pytorch.callbacks import Callback

    from lightning_xai.data import ShardDataModule, write_shards
    from lightning_xai.data.shapes import read_shapes
    from lightning_xai.training import ContrastiveFineTuning, GroundingCallback

    module = ContrastiveFineTuning(model, None)

    class Clock(Callback):
        seconds = 0.0

        def on_validation_epoch_start(self, *_: Any) -> None:
            self.begin = time.perf_counter()

        def on_validation_end(self, *_: Any) -> None:
            Clock.seconds = time.perf_counter() - self.begin

    def epoch(folder: Path, callbacks: list[Callback]) -> float:
        # The clock starts before and stops after the callback that it times: files and pictures count.
        trainer = L.Trainer(
            accelerator="auto" if device == "cuda" else device,
            devices=1,
            inference_mode=False,
            callbacks=[Clock(), *callbacks, Clock()],
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        data = ShardDataModule(val=folder / "val", eval_batch_size=batch_size, num_workers=workers)
        trainer.validate(module, data, verbose=False)
        return Clock.seconds

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = read_shapes("val", images, 0, side or module.encoder.image_transform.size[0])
        write_shards(drawn, folder / "val", name="bench", excluded=Counter(), progress=False)
        epoch(folder, [])
        rounds = [(epoch(folder, []), epoch(folder, [GroundingCallback(input_phrases=0)])) for _ in range(3)]
    plain, measured = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    ratio = statistics.median(with_it / without for without, with_it in rounds)
    return {"plain": plain, "measured": measured, "ratio": ratio, "peak": peak_gigabytes()}


MEASUREMENTS = {"ours": measure_ours, "exclip": measure_exclip, "callback": measure_callback}


def in_own_process(what: str, model: str, device: str) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    print(f"measuring {what}, {model} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--measure", what, "--model", model, "--device", device]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return result


def table(device: str, with_exclip: bool) -> str:
    """All measurements as Markdown."""
    small, large = (in_own_process("ours", model, device) for model in ("ViT-B-32", "ViT-B-16"))
    exclip = in_own_process("exclip", "ViT-B-32", device) if with_exclip else None
    callback = in_own_process("callback", "ViT-B-32", device)
    lines = ["| | seconds a pair | of a forward pass | times faster than exclip |", "|---|---|---|---|"]
    for model, ours in (("ViT-B-32", small), ("ViT-B-16", large)):
        for name, seconds in ours.items():
            if name == "peak":
                continue
            compared = exclip and model == "ViT-B-32" and "included" in name
            faster = f"{exclip['pair'] / seconds:.0f}" if exclip and compared else ""
            lines.append(f"| {model}: {name} | {seconds:.4f} | {seconds / ours['forward pass']:.2f} | {faster} |")
    if exclip:
        ratio = exclip["pair"] / small["forward pass"]
        lines.append(
            f"| ViT-B-32: exclip 1.1, full tensor (it has no other) | {exclip['pair']:.1f} | {ratio:.0f} | 1 |"
        )
        lines += ["", f"Relative difference between exclip's numbers and ours: {exclip['difference']:.1e}."]
    peaks = f"ViT-B-32 {small['peak']:.2f} GB and ViT-B-16 {large['peak']:.2f} GB in batches of {BATCH}"
    if exclip:
        peaks += (
            f"; exclip {exclip['peak']:.2f} GB for one pair of ViT-B-32 ({exclip['peak'] / small['peak']:.1f} times)"
        )
    lines += ["", f"Peak memory of the process: {peaks}."]
    lines += [
        "",
        f"A validation epoch (128 images, 256 captions, ViT-B-32) takes {callback['plain']:.1f} s without and "
        f"{callback['measured']:.1f} s with GroundingCallback at the last blocks, tables and pictures included: "
        f"{callback['ratio']:.2f} times as long.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-exclip", action="store_true", help="leave out the authors' package")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="ViT-B-32", help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure](options.model, options.device)))
        return
    measured = table(options.device, not options.without_exclip)
    keep("attribution", "Feature-pair attribution", options.device, measured)


if __name__ == "__main__":
    main()
