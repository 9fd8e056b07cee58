"""Pictures and tables of an evaluation for the loggers of its trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning_xai.evaluation.logged_pictures import LoggedTable, Picture, logged_pairs
from lightning_xai.results.examples import ExampleRecord
from lightning_xai.results.record import ResultRecord
from lightning_xai.results.table import VALUES_NAME, ResultTable, score_table

__all__ = ["for_loggers"]

_FOLDER = "heat_maps"


def for_loggers(
    out: Path, record: ResultRecord, table: ResultTable, examples: Mapping[str, Sequence[ExampleRecord]]
) -> Iterator[Picture | LoggedTable]:
    """Yield an evaluation's sheets of heat maps, which are written as `heat_maps/*.png`, its scores, and its phrases.

    Args:
        out: the result folder, in which the pictures of the examples are.
        record: of the results.
        table: of the results.
        examples: label of a method -> its examples.
    """
    from lightning_xai.report.gallery import Gallery
    from lightning_xai.report.page import HeatMaps, flat
    from lightning_xai.report.plots import save_figure
    from lightning_xai.report.sections.heat_maps import heat_map_blocks
    from lightning_xai.results.runs import Measurement, Run

    data = str(record.data.get("name") or "unnamed data")
    run = Run("test", out, "", (Measurement("test", "", record, table, data),), examples=examples)
    gallery = Gallery([run])
    for block in flat(heat_map_blocks([run], gallery)):
        if isinstance(block, HeatMaps):
            name = block.name.replace(f"-{run.name}", "", 1)
            path = out / _FOLDER / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            save_figure(block.figure, path)
            yield Picture(f"test/{_FOLDER}/{name}", path)
    scores = [score for metric in record.metrics.values() for score in metric.scores]
    yield LoggedTable("test/scores", out / VALUES_NAME, score_table(table.values, scores))
    pairs = logged_pairs("test/grounding_pairs", out / VALUES_NAME, table, gallery.pictures())
    if len(pairs.frame):
        yield pairs
