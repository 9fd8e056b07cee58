"""What AttributionEvaluation costs beside a plain validation pass, in one run; prints and keeps a table.

    python benchmarks/evaluation.py            # about five minutes on 2 cores

ViT-B-32 with random weights, float32, on images and captions of `shapes` drawn at 224 pixels. A plain pass decodes,
embeds images and captions and computes loss and recall. Each evaluation runs between two plain passes, and the ratios
are medians over the rounds; files, tables and example pictures count. Times differ from machine to machine: read the
ratios.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from kept_table import keep

ROUNDS = 3
EVALUATIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gamma and rho by feature_pair": ({"feature_pair": None}, ["grounding"]),
    "all metrics by feature_pair": (
        {"feature_pair": None},
        ["grounding", "other_objects", "hard_negatives", "confidence", "localization"],
    ),
    "confidence by attention_relevance": ({"attention_relevance": None}, ["confidence"]),
}


class Bench:
    """One model and one data set, and seconds of a pass over it."""

    def __init__(self, model: str, device: str, images: int, folder: Path) -> None:
        from lightning_xai.data import write_shards
        from lightning_xai.data.shapes import read_shapes
        from lightning_xai.training import ContrastiveFineTuning

        self.model, self.device, self.folder = model, device, folder
        self.plain = ContrastiveFineTuning(model, None)
        size = self.plain.encoder.image_transform.size[0]
        samples = read_shapes("val", images, 0, size)
        write_shards(samples, folder / "val", name="bench", excluded=Counter(), progress=False)
        self.encoded: Counter[str] = Counter()
        for tower in ("encode_image", "encode_text"):
            self._count(tower)

    def plain_pass(self) -> float:
        """Seconds of embedding and scoring the whole split."""
        return self._test(self.plain)

    def evaluation(self, methods: dict[str, Any], metrics: list[str]) -> float:
        """Seconds of an evaluation of the split; counts what passes through the towers' `encode_*` in `encoded`."""
        from lightning_xai.evaluation import AttributionEvaluation

        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        chosen: dict[str, Any] = {"methods": methods, "metrics": metrics}
        task = AttributionEvaluation(self.model, None, out=out, **chosen)
        task.encoder = self.plain.encoder
        self.encoded.clear()
        return self._test(task)

    def faithfulness(self) -> tuple[float, float]:
        """CPU seconds (on a GPU, seconds) of the faithfulness of two methods of the same items, one after the other."""
        import torch

        from lightning_xai.attribution import RandomMap
        from lightning_xai.data import ShardDataModule
        from lightning_xai.evaluation.embeddings import Embeddings
        from lightning_xai.evaluation.rows import maps_of, measure_batch
        from lightning_xai.metrics.registry import choose_metrics

        data = ShardDataModule(test=self.folder / "val", eval_batch_size=2, captions_per_image=1, num_workers=0)
        encoder = self.plain.encoder.eval().to(self.device)
        data.bind(encoder.image_transform, encoder.tokenizer)
        data.setup("test")
        batch = next(iter(data.test_dataloader())).to(self.device)
        metrics = list(choose_metrics(["faithfulness"], {}).values())
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        embeddings, seconds = Embeddings.of(encoder, batch), []
        for seed in range(2):
            begin = clock()
            measure_batch(batch, maps_of(RandomMap(encoder, seed=seed), 64), metrics, embeddings)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(clock() - begin)
        return seconds[0], seconds[1]

    def _test(self, task: Any) -> float:
        import lightning as L

        from lightning_xai.data import ShardDataModule

        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="auto" if self.device == "cuda" else self.device,
            devices=1,
            inference_mode=False,
            default_root_dir=self.folder,
            **options,
        )
        data = ShardDataModule(test=self.folder / "val", eval_batch_size=16, num_workers=1, swap_objects=True)
        begin = time.perf_counter()
        trainer.test(task, data, verbose=False)
        return time.perf_counter() - begin

    def _count(self, tower: str) -> None:
        encoder: Any = self.plain.encoder
        plain = getattr(encoder, tower)

        def counted(inputs: Any) -> Any:
            self.encoded[tower] += len(inputs)
            return plain(inputs)

        setattr(encoder, tower, counted)


def table(model: str, device: str, images: int) -> str:
    """All measurements as Markdown."""
    lines = ["| | seconds | of a plain pass | images embedded | captions embedded |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(model, device, images, Path(name))
        bench.plain_pass()
        plain = []
        for title, (methods, metrics) in EVALUATIONS.items():
            seconds, ratios = [], []
            for _ in range(ROUNDS):
                before, taken = bench.plain_pass(), bench.evaluation(methods, metrics)
                encoded = Counter(bench.encoded)
                after = bench.plain_pass()
                plain += [before, after]
                seconds.append(taken)
                ratios.append(2 * taken / (before + after))
            lines.append(
                f"| {title} | {statistics.median(seconds):.2f} | {statistics.median(ratios):.2f} | "
                f"{encoded['encode_image']} | {encoded['encode_text']} |"
            )
        first = f"| plain pass, {images} images, {2 * images} captions | {statistics.median(plain):.2f} | 1.00"
        lines.insert(2, f"{first} | {images} | {2 * images} |")
        one, other = bench.faithfulness()
    lines += ["", f"Faithfulness of 2 images takes {one:.2f} s for a first method, {other:.3f} s for a second one, "]
    lines[-1] += f"{other / one:.1%} of it (target: at most 3 %)."
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name or a model config")
    parser.add_argument("--images", type=int, default=64, help="images of the split")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    measured = table(options.model, options.device, options.images)
    keep("evaluation", "Evaluation of attributions", options.device, measured, options.model)


if __name__ == "__main__":
    main()
