"""The sections of benchmarks/gpu.py, which starts each in a separate process: one measurement a row.

    python benchmarks/gpu_sections.py NAME --device cuda --rows FILE.jsonl --work FOLDER

Nothing heavy is imported at the top: benchmarks/gpu.py needs the sections' names alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

TOWERS = ("ViT-B-16", "ViT-B-32", "ViT-B-16-SigLIP2", "PE-Core-S-16-384", "MobileCLIP2-S0", "RN50", "convnext_base")
SMALL_TOWERS = ("vit", "siglip", "resnet")  # of benchmarks/tower_kinds.py
MODEL, SMALL_MODEL = "ViT-B-16", "vit"
CAPTION = "a brown dog is lying on a red mat next to a small cat"
PRESETS: tuple[Literal["fast", "paper", "inputs"], ...] = ("fast", "paper", "inputs")
AGREEMENT = 1e-4  # largest relative difference from the CPU


@dataclass(frozen=True)
class Bench:
    """What a section measures on, and where its rows go.

    Attributes:
        section: its name.
        device: cpu or cuda.
        small: whether it is to be over in seconds.
        work: a folder that all sections of a run share.
        rows: the file of results.
    """

    section: str
    device: str
    small: bool
    work: Path
    rows: Path

    def write(self, table: str, row: str, **numbers: Any) -> None:
        """Add a row to a table; it is in the file when this returns."""
        with self.rows.open("a") as file:
            file.write(json.dumps({"table": table, "section": self.section, "row": row, **numbers}) + "\n")

    @contextmanager
    def attempt(self, table: str, row: str) -> Iterator[None]:
        """Inside, an error is that row's result, and the next one is measured."""
        import torch

        try:
            yield
        except Exception as error:
            text = str(error).strip().splitlines()
            self.write(table, row, failed=f"{type(error).__name__}: {text[0][:200] if text else ''}")
            print(f"{row}: {error!r}", file=sys.stderr, flush=True)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def config(self, name: str) -> Path:
        """A model's configuration, whose tokenizer needs no download."""
        if self.small:
            from tower_kinds import KINDS

            config = KINDS[name].config
        else:
            import open_clip

            config = open_clip.get_model_config(name)
        # What is measured does not depend on the words, and open_clip's own tokenizer is part of its package.
        for key in ("hf_tokenizer_name", "tokenizer_kwargs"):
            config["text_cfg"].pop(key, None)
        path = self.work / f"{name}.json"
        path.write_text(json.dumps(config))
        return path

    @contextmanager
    def peak(self) -> Iterator[dict[str, float]]:
        """Gives, on leaving, the peak of allocated memory on top of what there was, in GB; nothing on a CPU."""
        import torch

        found: dict[str, float] = {}
        if self.device != "cuda":
            yield found
            return
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found["GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9


def measure_fit(bench: Bench) -> None:
    """Rates of `fit`: a model that learns on batches in memory, and on shards of photographs."""
    from photo_shards import write_photo_shards
    from training import Setting

    cuda = bench.device == "cuda"
    sizes = (8,) if bench.small else (256, 1024)
    base = Setting(
        model=str(bench.config(SMALL_MODEL if bench.small else MODEL)),
        device=bench.device,
        precision="bf16-mixed" if cuda else "32-true",
        train=bench.work / "photos",
        folder=bench.work,
        batch_size=sizes[0],
        workers=0,
        steps=2 if bench.small else 40,
        warm=1 if bench.small else 10,
    )
    # Warm-up outlasts what workers read ahead, so that a rate is that of reading, where that is slower.
    reading = base if bench.small else replace(base, steps=48, warm=30)
    _write_small_photos(bench, base.train, (reading.total + 4) * base.batch_size)
    rows = _Fit(bench, base, sizes)
    for size in sizes:
        rows.memory(size)
    rows.plain(sizes[0])
    if not bench.small:
        rows.memory(sizes[0], compiled=True)
    rows.shards(reading, "photographs of 384 x 288")
    if not bench.small:
        large = replace(reading, train=bench.work / "coco_size", steps=30)
        write_photo_shards(large.train, (large.total + 4) * large.batch_size)
        rows.shards(large, "photographs of 640 x 480")
        rows.memory(sizes[-1], compiled=True)


def _write_small_photos(bench: Bench, folder: Path, count: int) -> None:
    """Shards of photographs whose short side is 288 pixels, so that reading them holds the device up less."""
    from functools import cache

    from photo_shards import SIZE, write_photo_shards
    from PIL import Image

    from lightning_xai.data import write_shards
    from lightning_xai.data.shard_reader import read_samples

    drawn, size = min(count, 2048), (384, 288)
    manifest = write_photo_shards(bench.work / "drawn", drawn)
    found = read_samples(bench.work / "drawn", manifest, range(len(manifest.shards)), 0, drawn)
    samples: list[Any] = [sample for _, sample in found]

    @cache  # they share a few images
    def shrunk(image: bytes) -> bytes:
        file = io.BytesIO()
        Image.open(io.BytesIO(image)).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        return file.getvalue()

    assert {sample.size for sample in samples} == {SIZE}
    repeated = (
        replace(sample, key=f"{number:06d}", image=shrunk(sample.image), size=size)
        for number, sample in zip(range(count), cycle(samples), strict=False)
    )
    write_shards(repeated, folder, name="small photos", excluded=Counter(), progress=False)


class _Fit:
    """Rows of the table of fits."""

    TABLE = "fit"

    def __init__(self, bench: Bench, base: Any, sizes: tuple[int, ...]) -> None:
        import torch
        from training import data_module, peak_of, step_flops

        from lightning_xai.models import load_dual_encoder

        self.bench, self.base = bench, base
        self.encoder = encoder = load_dual_encoder(base.model)
        largest = replace(base, batch_size=sizes[-1])
        data = data_module(replace(largest, workers=min(2, self.workers(largest))))
        data.bind(encoder.image_transform, encoder.tokenizer)
        data.setup("fit")
        self.batches = list(islice(data.train_dataloader(), 2))
        smallest = self.batches[0].only(torch.arange(sizes[0]))
        with torch.autocast(bench.device, torch.bfloat16, enabled=base.precision == "bf16-mixed"):
            self.flops = step_flops(encoder.to(bench.device), smallest.to(bench.device)) / sizes[0]
        encoder.cpu()
        cuda = bench.device == "cuda"
        self.flops_at_most = peak_of(torch.cuda.get_device_name()) if cuda else None

    def workers(self, setting: Any) -> int:
        """As many as cores, and as shared memory for three batches of each."""
        if self.bench.small:
            return 1
        batch = setting.batch_size * 3 * 224 * 224 * 4
        shared = Path("/dev/shm")
        room = shutil.disk_usage(shared).free // (3 * batch) if shared.exists() else 1
        return max(0, min((os.cpu_count() or 2) - 2, int(room)))

    def _task(self, compiled: bool) -> Any:
        from lightning_xai.training.contrastive import ContrastiveModule

        first, last = self.base.learning_rates
        return ContrastiveModule(copy.deepcopy(self.encoder), initial_lr=first, final_lr=last, compile=compiled)

    def _setting(self, size: int) -> Any:
        """As many pairs whatever the size of a batch."""
        return replace(self.base, batch_size=size, steps=max(2, self.base.steps * self.base.batch_size // size))

    def _in_memory(self, size: int) -> list[Any]:
        import torch

        batches = [batch.only(torch.arange(size)) for batch in self.batches]
        return [batch.pin_memory() for batch in batches] if self.bench.device == "cuda" else batches

    def memory(self, size: int, *, compiled: bool = False) -> None:
        """Fit on batches in (page-locked) memory."""
        import torch
        from training import fit

        row = f"fit, batches in memory, {size} pairs" + (", compiled" if compiled else "")
        with self.bench.attempt(self.TABLE, row):
            torch._dynamo.reset()  # a model compiled before would be taken for one of any size
            setting, task = self._setting(size), self._task(compiled)
            begin = time.perf_counter()
            with self.bench.peak() as peak:
                measured = fit(task, setting, self._in_memory(size))
            whole = time.perf_counter() - begin - measured.spent.seconds
            self._write(row, setting, measured.spent.seconds, {"data wait": measured.waiting}, peak, whole)

    def shards(self, setting: Any, what: str) -> None:
        """Fit on shards, which workers read."""
        from training import fit

        row = f"fit, {what} from shards, {setting.batch_size} pairs"
        with self.bench.attempt(self.TABLE, row):
            setting = replace(setting, workers=self.workers(setting))
            begin, task = time.perf_counter(), self._task(compiled=False)
            with self.bench.peak() as peak:
                measured = fit(task, setting)
            whole = time.perf_counter() - begin - measured.spent.seconds
            shares = {"data wait": measured.waiting, "workers": setting.workers}
            self._write(row, setting, measured.spent.seconds, shares, peak, whole)

    def plain(self, size: int) -> None:
        """The loop that a reader would write, on the same batches."""
        from training import plain_loop

        row = f"plain loop, batches in memory, {size} pairs"
        with self.bench.attempt(self.TABLE, row):
            setting, encoder = self._setting(size), self._task(compiled=False).encoder
            batches, begin = self._in_memory(size), time.perf_counter()
            turns = (batches[number % len(batches)] for number in range(setting.total))
            with self.bench.peak() as peak:
                encoder.to(self.bench.device)
                spent = plain_loop(encoder, setting, turns, encoder.encode_text).seconds
            self._write(row, setting, spent, {}, peak, time.perf_counter() - begin - spent)

    def _write(
        self, row: str, setting: Any, seconds: float, more: dict[str, Any], peak: dict[str, float], before: float
    ) -> None:
        rate = setting.steps * setting.batch_size / seconds
        utilisation = {"FLOP utilisation": rate * self.flops / self.flops_at_most} if self.flops_at_most else {}
        self.bench.write(
            self.TABLE,
            row,
            **{"samples/s": rate, "TFLOP/s": rate * self.flops / 1e12, **utilisation, **more},
            **{"peak memory, GB": peak.get("GB"), "steps": setting.steps, "start and warm-up, s": before},
            note=f"{setting.precision}; {self.flops / 1e9:.1f} GFLOP a pair for a forward and a backward pass.",
        )


def measure_towers(bench: Bench) -> None:
    """Agreement with the CPU, costs and peak memory of attributions, tower by tower."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in SMALL_TOWERS if bench.small else TOWERS:
        with bench.attempt("attribution", name):
            _measure_tower(bench, name)


def _measure_tower(bench: Bench, name: str) -> None:
    import torch

    from lightning_xai.attribution import FeaturePairAttribution
    from lightning_xai.models import load_dual_encoder

    torch.manual_seed(0)
    encoder = load_dual_encoder(bench.config(name)).eval()
    images = torch.randn(2 if bench.small else 8, *encoder.image_shape)
    tokens = encoder.tokenizer.encode([CAPTION] * len(images))
    method = FeaturePairAttribution(encoder, preset=PRESETS[0])
    begin = time.perf_counter()
    expected = _numbers(method, images[:2], tokens[:2])
    seconds = time.perf_counter() - begin
    encoder, images, tokens = encoder.to(bench.device), images.to(bench.device), tokens.to(bench.device)
    # A new one: a method may keep what it has computed of the model where it was.
    method = FeaturePairAttribution(encoder, preset=PRESETS[0])
    with bench.attempt("agreement with the CPU", name):
        found = _numbers(method, images[:2], tokens[:2])
        errors = {key: float((found[key] - value).norm() / value.norm()) for key, value in expected.items()}
        within = "yes" if max(errors.values()) <= AGREEMENT else "no"
        bench.write(
            "agreement with the CPU",
            name,
            **{**errors, f"all within {AGREEMENT:.0e}": within, "CPU seconds": seconds},
            note=f"Relative L2 differences, float32 without TF32; attributions by the preset {PRESETS[0]}.",
        )
    for preset in PRESETS:
        with bench.attempt("attribution", f"{name}, {preset}"):
            method = FeaturePairAttribution(encoder, preset=preset)
            _write_costs(bench, f"{name}, {preset}", method, images, tokens)


def _numbers(method: Any, images: Any, tokens: Any) -> dict[str, Any]:
    """What is compared between devices, in float64 on the CPU."""
    import torch

    encoder, span = method.encoder, torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 2:4] = True
    with torch.no_grad():
        found = {"image embedding": encoder.encode_image(images), "text embedding": encoder.encode_text(tokens)}
    found["span map"] = method.span_map(images, tokens, span)
    found["full interactions"] = method.attribute(images, tokens).interactions
    return {name: value.detach().double().cpu() for name, value in found.items()}


def _write_costs(bench: Bench, row: str, method: Any, images: Any, tokens: Any) -> None:
    import torch
    from attribution import FORWARD, FULL, SPAN, median_seconds, runs_of

    seconds, peaks = {}, {}
    with torch.no_grad():
        for run, call in runs_of(method, images, tokens):
            seconds[run] = median_seconds(call, repetitions=1 if bench.small else 3)
            with bench.peak() as peaks[run]:
                call()
    forward = seconds[FORWARD]
    memory = {f"peak memory of {run}, GB": peaks[run].get("GB") for run in (FORWARD, SPAN, FULL)}
    bench.write(
        "attribution",
        row,
        **{"forward pass, ms a pair": 1e3 * forward / len(images)},
        **{f"{run} / forward pass": value / forward for run, value in seconds.items() if run != FORWARD},
        **memory,
        note=f"{len(images)} pairs at a time, float32 without TF32; memory on top of weights and inputs.",
    )


def measure_callback(bench: Bench) -> None:
    """What GroundingCallback adds to a validation epoch."""
    import attribution

    images, workers = (32, 0) if bench.small else (512, min(8, os.cpu_count() or 1))
    model = SMALL_MODEL if bench.small else MODEL
    with bench.attempt("callback", model):
        cost = attribution.measure_callback(
            str(bench.config(model)), bench.device, images=images, side=64, batch_size=64, workers=workers
        )
        bench.write(
            "callback",
            model,
            **{"images": images, "plain epoch, s": cost["plain"], "with GroundingCallback, s": cost["measured"]},
            **{"ratio": cost["ratio"]},
            note="Two captions an image, at the last blocks, tables and pictures included, float32.",
        )


def measure_banzhaf(bench: Bench) -> None:
    """Banzhaf interactions, in passes of the model."""
    import torch
    from attribution import median_seconds

    from lightning_xai.attribution import BanzhafInteractions
    from lightning_xai.models import load_dual_encoder

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    name, chunk = (SMALL_MODEL, 64) if bench.small else (MODEL, 256)
    encoder = load_dual_encoder(bench.config(name), device=bench.device).eval()
    samples = (128, 32) if bench.small else (2048, 256)
    images = torch.randn(chunk, *encoder.image_shape, device=bench.device)
    tokens = encoder.tokenizer.encode([CAPTION] * chunk).to(bench.device)
    method = BanzhafInteractions(
        encoder, p=0.3, image_samples=samples[0], text_samples=samples[1], internal_batch_size=chunk
    )
    with torch.no_grad():
        image = median_seconds(lambda: encoder.encode_image(images), 3) / chunk
        text = median_seconds(lambda: encoder.encode_text(tokens), 3) / chunk
        with bench.peak() as peak:
            seconds = median_seconds(lambda: method.attribute(images[:1], tokens[:1]), repetitions=2)
    bench.write(
        "banzhaf_pairs",
        name,
        **{"coalitions of patches": samples[0], "of tokens": samples[1], "s a pair": seconds},
        **{
            "of the passes alone": seconds / (samples[0] * image + samples[1] * text),
            "peak memory, GB": peak.get("GB"),
        },
        note=f"p = 0.3, {chunk} masked inputs at a time, float32 without TF32.",
    )


def measure_resume(bench: Bench) -> None:
    """A killed fit against one that is not; then bf16's effect on gamma and rho of the model that it has trained."""
    from lightning_xai.data.shapes import prepare_shapes

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic
    begin = time.perf_counter()
    prepare_shapes(bench.work / "shapes", *((256, 32) if bench.small else (12_800, 128)), progress=False)
    drawn = time.perf_counter() - begin
    model: Path | None = None
    with bench.attempt("resume", "fit, killed by kill -9 and resumed"):
        model = _kill_and_resume(bench, drawn)
    sources: dict[str, Path | None] = {"the model of that fit": model}
    if not bench.small:
        sources[f"{MODEL}, random weights"] = bench.config(MODEL)
    for name, source in sources.items():
        if source is not None:  # there is none where the fit failed
            with bench.attempt("bf16", name):
                _write_bf16(bench, name, source)


def _fit_command(bench: Bench, run: str, deterministic: str) -> list[str]:
    options = {
        "config": bench.work / "fit.json",
        "run": bench.work / run,
        "save_every_minutes": 0.02 if bench.small else 0.03,
        "trainer.deterministic": deterministic,
    }
    return [sys.executable, "-m", "lightning_xai", "fit", *(f"--{name}={value}" for name, value in options.items())]


def _fit_config(bench: Bench) -> dict[str, Any]:
    """The demo's model, data and recipe; nothing is measured by the way."""
    config = Path(__file__).resolve().parent.parent / "configs/models/shapes_vit.json"
    recipe = {"initial_lr": 8e-4, "final_lr": 2e-5, "schedule": "cosine", "warmup_steps": 20, "text_lr_factor": 0.3}
    data = {"root": str(bench.work / "shapes"), "train_samples": 256 if bench.small else 12_800}
    data |= {"val_samples": 32 if bench.small else 128, "batch_size": 8 if bench.small else 64}
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_xai.training.ContrastiveFineTuning",
            "init_args": {"model": str(config), "pretrained": None, **recipe, "weight_decay": 0.2, "fused": True},
        },
        "data": {
            "class_path": "lightning_xai.data.ShapesDataModule",
            "init_args": {**data, "num_workers": 0 if bench.small else 4},
        },
        "trainer": {
            "accelerator": "gpu" if bench.device == "cuda" else "cpu",
            "devices": 1,
            "precision": "bf16-mixed" if bench.device == "cuda" else "32-true",
            "max_epochs": 3 if bench.small else 5,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


class _Fits(NamedTuple):
    """The two fits that are compared.

    Attributes:
        deterministic: as the trainer's option.
        resumed_from: name of the checkpoint that was there when the process was killed.
    """

    deterministic: str
    resumed_from: str


def _kill_and_resume(bench: Bench, drawn: float) -> Path:
    (bench.work / "fit.json").write_text(json.dumps(_fit_config(bench)))
    begin = time.perf_counter()
    fits = _run_fits(bench)
    whole, killed = (_newest(bench.work / run) for run in ("whole", "killed"))
    different, compared = _differences(whole, killed)
    bench.write(
        "resume",
        "fit, killed by kill -9 and resumed",
        **{"killed with": fits.resumed_from, "ended with": killed.stem, "tensors compared": compared},
        **{"that differ": len(different), "bit for bit": "no" if different else "yes"},
        **{"deterministic": fits.deterministic, "seconds": time.perf_counter() - begin, "drawing the data, s": drawn},
        note="Weights and optimizer's averages of a fit of the demo's model, against those of one that ran through.",
    )
    print("different:", different[:20], flush=True)
    return whole


def _run_fits(bench: Bench) -> _Fits:
    """Fit in one go, and once more with a kill; some kernel may have no deterministic form, which is only warned of."""
    deterministic = "true"
    first = subprocess.run(_fit_command(bench, "whole", deterministic), cwd=bench.work, capture_output=True, text=True)
    if first.returncode and re.search("deterministic (implementation|behavior)", first.stdout + first.stderr):
        print(first.stderr[-3000:], flush=True)
        deterministic = "warn"
        shutil.rmtree(bench.work / "whole", ignore_errors=True)
        command = _fit_command(bench, "whole", deterministic)
        first = subprocess.run(command, cwd=bench.work, capture_output=True, text=True)
    if first.returncode:
        raise RuntimeError(f"fit ended with {first.returncode}: {first.stderr.strip()[-180:]}")
    command = _fit_command(bench, "killed", deterministic)
    found = _kill_at_first_checkpoint(command, bench.work, bench.work / "killed" / "resume")
    again = subprocess.run(command, cwd=bench.work, capture_output=True, text=True)
    if again.returncode or "Resuming" not in again.stdout + again.stderr:
        raise RuntimeError(f"it did not resume ({again.returncode}): {again.stderr.strip()[-160:]}")
    return _Fits(deterministic, found)


def _kill_at_first_checkpoint(command: list[str], folder: Path, checkpoints: Path) -> str:
    """Start a fit and kill it as soon as it has written a checkpoint, whose name is given back."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            found = sorted(checkpoints.glob("step=*.ckpt"))
            if found:
                process.send_signal(signal.SIGKILL)
                if process.wait() != -signal.SIGKILL:
                    break
                return found[-1].stem
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    raise RuntimeError(f"the fit ended by itself, with {process.returncode}, before it could be killed")


def _newest(run: Path) -> Path:
    return max((run / "resume").glob("step=*.ckpt"))


def _differences(one: Path, other: Path) -> tuple[list[str], int]:
    """Names of tensors that are not the same to the last bit, and how many were compared."""
    import torch

    contents = [torch.load(path, weights_only=True, map_location="cpu") for path in (one, other)]
    first, second = ({**content["state_dict"], **_averages(content)} for content in contents)
    names = sorted(first.keys() | second.keys())
    same = (name in first and name in second and torch.equal(first[name], second[name]) for name in names)
    return [name for name, equal in zip(names, same, strict=True) if not equal], len(names)


def _averages(content: dict[str, Any]) -> dict[str, Any]:
    states = content["optimizer_states"][0]["state"]
    return {f"optimizer.{number}.{name}": value for number, state in states.items() for name, value in state.items()}


def _write_bf16(bench: Bench, name: str, source: Path) -> None:
    """Gamma and rho from hidden states that a pass in bf16 has made, next to those of float32."""
    import torch
    from quadrature import read_phrases

    from lightning_xai.models import load_dual_encoder

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    encoder = load_dual_encoder(source).eval()
    phrases = read_phrases(encoder, bench.work / "shapes" / "val", 16 if bench.small else 240)
    encoder.to(bench.device)
    (share, hit), (bf16_share, bf16_hit) = (_grounding(bench, encoder, phrases, bf16) for bf16 in (False, True))
    bench.write(
        "bf16",
        name,
        **{"phrases": len(share), "gamma > 0.5": float((share > 0.5).double().mean())},
        **{
            "in bf16": float((bf16_share > 0.5).double().mean()),
            "crossed 0.5": int(((share > 0.5) != (bf16_share > 0.5)).sum()),
        },
        **{"change of gamma, mean": float((share - bf16_share).abs().nanmean())},
        **{"rho": float(hit.double().mean()), "rho in bf16": float(bf16_hit.double().mean())},
        **{"other hits": int((hit != bf16_hit).sum())},
        note="Hidden states of a pass under autocast, as in bf16-mixed, against those of one in float32 without TF32; "
        "attributions from them in float32.",
    )


def _grounding(bench: Bench, encoder: Any, phrases: Any, bf16: bool) -> tuple[Any, Any]:
    import torch

    from lightning_xai.attribution import FeaturePairAttribution
    from lightning_xai.metrics import gamma, patch_mask, rho

    method, parts = FeaturePairAttribution(encoder), []
    for start in range(0, len(phrases.images), 64):
        rows = slice(start, start + 64)
        images, tokens = phrases.images[rows].to(bench.device), phrases.tokens[rows].to(bench.device)
        with (
            torch.no_grad(),
            torch.autocast(bench.device, torch.bfloat16, enabled=bf16),
            method.capturing() as captured,
        ):
            encoder.encode_image(images), encoder.encode_text(tokens)
        states = method.hidden_states(images, tokens, captured)
        every = torch.arange(len(images), device=bench.device)
        spans = phrases.spans[rows].to(bench.device)
        maps = method.span_maps_of(states, every, every, spans, method.references(tokens.shape[1]))
        masks = patch_mask(
            phrases.boxes[rows].to(bench.device), (maps.shape[1], maps.shape[2]), tuple(images.shape[2:])
        )
        parts.append((gamma(maps, masks).cpu(), rho(maps, masks).cpu()))
    shares, hits = zip(*parts, strict=True)
    return torch.cat(shares), torch.cat(hits)


class Section(NamedTuple):
    """A section.

    Attributes:
        share: of the time, in seconds of the eight minutes.
        measure: what it does.
    """

    share: float
    measure: Callable[[Bench], None]


SECTIONS = {
    "fit": Section(150, measure_fit),
    "towers": Section(125, measure_towers),
    "resume": Section(105, measure_resume),
    "callback": Section(55, measure_callback),
    "banzhaf": Section(35, measure_banzhaf),
}
"""By name, in their order."""


def main() -> None:
    """Measure a section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch
    from kept_table import device_name, versions

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there, so nothing was measured")
    bench = Bench(options.section, options.device, options.small, options.work, options.rows)
    bench.write(
        "device", options.section, name=device_name(options.device), versions=f"{versions()}, {os.cpu_count()} cores"
    )
    SECTIONS[options.section].measure(bench)


if __name__ == "__main__":
    main()
