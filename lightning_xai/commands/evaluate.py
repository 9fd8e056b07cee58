"""`evaluate`: measure gamma and rho on the maps that `predict --maps` has written, without the model."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there, and so torch.


@dataclass
class Evaluate:
    """Measure gamma and rho of every phrase on stored maps, and write a result folder, as `test` does.

    Any program can write such maps: safetensors parts as the documentation of PredictionPart describes them.

    The maps of a run's test split:
      python -m lightning_xai predict --run runs/coco --maps phrases
      python -m lightning_xai evaluate --predictions runs/coco/predict/predictions --out runs/coco/stored
    and as a page:
      python -m lightning_xai report runs/coco/stored --out runs/coco/stored/report

    Attributes:
        predictions: the folder that `predict --maps` has written.
        out: the folder for the results.
    """

    predictions: Path
    out: Path

    def __call__(self) -> None:
        """Read part by part, write the results, and print the table.

        Raises:
            ValueError: the folder holds no predictions, or no maps.
        """
        from lightning_xai.metrics.registry import choose_metric
        from lightning_xai.report.terminal import result_tables, wide_console
        from lightning_xai.results.predictions import read_predictions
        from lightning_xai.results.record import MethodRecord, ResultError, ResultRecord, package_versions
        from lightning_xai.results.table import ResultTable, write_result

        settings = _settings(self.predictions)
        label, metric = str(settings.get("method", "stored")), choose_metric("grounding", {})
        signed = _is_signed(label)
        values: list[tuple[str, int, str, str, float, str]] = []
        targets: list[dict[str, Any]] = []
        samples = 0
        for part in read_predictions(self.predictions):
            samples += len(part.arrays["index"])
            try:
                found, described = _measured(part, metric, signed)
            except (LookupError, RuntimeError, TypeError) as error:
                raise ResultError(
                    f"a part of {self.predictions} has not the form that PredictionPart describes "
                    f"({type(error).__name__}: {error}); write it again"
                ) from error
            values += [(label, 0, *row) for row in found]
            targets += described
        record = ResultRecord(
            kind="evaluation",
            model={"name": str(self.predictions), "fingerprint": settings.get("weights")},
            data={"name": settings.get("data_name"), "fingerprint": settings.get("data"), "samples": samples},
            settings={"predictions": settings},
            versions=package_versions(),
            methods={label: MethodRecord(name=label, options=settings.get("options") or {}, signed=signed)},
            metrics={"grounding": metric.spec.record({})},
        )
        table = ResultTable.of(values, targets)
        self.out.mkdir(parents=True, exist_ok=True)
        write_result(self.out, record, table)
        console = wide_console()
        for lines in result_tables(record, table):
            console.print(lines, crop=False)
        print(f"Saved {self.out}")  # noqa: T201 - where it is


def _settings(folder: Path) -> dict[str, Any]:
    """What the predictions depend on; nothing where another program has written them."""
    path = folder / "settings.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); run `predict` again") from error
    return settings if isinstance(settings, dict) else {}


def _is_signed(method: str) -> bool:
    """Whether maps distinguish for from against; unknown methods' are taken as they are."""
    from lightning_xai.attribution.registry import METHODS

    return METHODS[method].signed if method in METHODS else True


def _measured(part: Any, metric: Any, signed: bool) -> tuple[list[tuple[str, str, float, str]], list[dict[str, Any]]]:
    """Rows of the tables of values and of targets of one part."""
    import torch

    from lightning_xai.exclusion import Exclusion
    from lightning_xai.metrics.base import PhraseTargets
    from lightning_xai.metrics.grounding import patch_mask
    from lightning_xai.results.record import ResultError

    arrays = {name: torch.from_numpy(array) for name, array in part.arrays.items()}
    if not arrays.keys() & {"maps", "interactions"}:
        raise ResultError("the predictions are embeddings without maps; run `predict --maps phrases` into a new folder")
    maps = arrays.get("maps")
    if maps is None:
        mine = arrays["interactions"][arrays["phrase_caption"]]
        maps = torch.einsum("rl,rlhw->rhw", arrays["span_mask"].to(mine), mine)
    reasons = [Exclusion[text.upper()] if text else Exclusion.MEASURED for text in part.texts["excluded"]]
    chosen = torch.tensor([reason == Exclusion.MEASURED for reason in reasons], dtype=torch.bool)
    height, width = arrays["image_size"].tolist()
    masks = patch_mask(arrays["boxes"][chosen], (maps.shape[1], maps.shape[2]), (height, width))
    columns = metric.measure(PhraseTargets(maps[chosen], masks, signed))
    numbers = zip(*columns.values(), strict=True)
    values, targets = [], []
    counts: Counter[int] = Counter()
    for row, reason in enumerate(reasons):
        caption = int(part.arrays["phrase_caption"][row])
        image = int(part.arrays["caption_image"][caption])
        index = int(part.arrays["index"][image])
        name = f"phrase-{index}-{counts[index]}"
        targets.append(
            {
                "target": name,
                "kind": "phrase",
                "ordinal": counts[index],
                "index": index,
                "key": part.texts["keys"][image],
                "caption_index": int(part.arrays["caption_index"][caption]),
                "caption": part.texts["captions"][caption],
                "label": part.texts["labels"][row],
                "phrase": part.texts["phrases"][row],
                **dict(zip(("x0", "y0", "x1", "y1"), part.arrays["boxes"][row].tolist(), strict=True)),
            }
        )
        counts[index] += 1
        measured = next(numbers) if reason == Exclusion.MEASURED else (math.nan,) * len(columns)
        for what, value in zip(columns, measured, strict=True):
            why = reason
            if reason == Exclusion.MEASURED and math.isnan(value):
                why = metric.spec.empty.get(what, Exclusion.NO_VALUE)
            values.append((name, what, value, why.key))
    return values, targets
