"""What a report rests on, as its last part: counts of what was left out, settings, versions, and the files read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning_xai.report.html import Block, Code, Folded
from lightning_xai.report.paper_table import Body, Column, PaperTable, count, words
from lightning_xai.report.summaries import left_out_table
from lightning_xai.results.runs import Run

__all__ = ["appendix_blocks"]

_LONG = 12  # rows of a table that few want to read


def appendix_blocks(runs: Sequence[Run]) -> list[Block]:
    """Counts, settings and files of each run, folded where they are long."""
    table = left_out_table(runs)
    blocks: list[Block] = []
    if table is not None:
        long = len(table.rows) > _LONG
        blocks.append(Folded("What was measured, and what was left out", (table,)) if long else table)
    for run in runs:
        if run.training is not None:
            text = run.training.config or "No config.yaml lies in the folder."
        else:
            result = run.evaluation or run.roar
            text = json.dumps(_record(result), indent=2, ensure_ascii=False, default=str)
        blocks.append(Folded(f"Settings and versions of {run.name}", (Code(text),)))
    blocks.append(Folded("Files that were read", (_files_table(runs),)))
    return blocks


def _record(result: Any) -> dict[str, Any]:
    parts = {name: dict(getattr(result, name)) for name in ("model", "data", "settings", "versions")}
    parts["methods"] = {label: {"method": m.method, **dict(m.options)} for label, m in result.methods.items()}
    speed = getattr(result, "speed", None)
    return parts | ({"speed": dict(speed)} if speed else {})


def _files_table(runs: Sequence[Run]) -> PaperTable:
    rows = [(words(run.name), words(str(path)), count(size)) for run in runs for path, size in run.files.items()]
    columns = (Column("run", numeric=False), Column("file", numeric=False), Column("bytes"))
    return PaperTable("files", "Files that were read", "", columns, (Body("", tuple(rows)),))
