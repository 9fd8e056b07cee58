"""The last section: counts of what was excluded, settings, versions, and the files that were read."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from lightning_xai.report.page import Block, Folded, Note
from lightning_xai.report.paper_table import Column, PaperTable, Value
from lightning_xai.results.runs import Run
from lightning_xai.results.table import exclusions

_LONG = 12  # rows of a table that few want to read


def appendix_blocks(runs: Sequence[Run]) -> list[Block]:
    """Counts, settings and files of each run, folded where they are long."""
    blocks: list[Block] = []
    counts = _exclusion_table(runs)
    if counts.rows:
        long = len(counts.rows) > _LONG
        blocks.append(Folded("What was measured, and what was excluded", (counts,)) if long else counts)
    for run in runs:
        record = msgspec.to_builtins(run.record, builtin_types=(float,), enc_hook=str)
        record = {name: found for name, found in record.items() if found and name != "metrics"}
        text = run.config or json.dumps(record, indent=2, ensure_ascii=False, default=str)
        blocks.append(Folded(f"Settings and versions of {run.name}", (Note(text, tag="pre"),)))
    columns = [Column("run", numeric=False), Column("file", numeric=False), Column("bytes")]
    rows: list[list[Value]] = [[run.name, str(path), size] for run in runs for path, size in run.files.items()]
    blocks.append(Folded("Files that were read", (PaperTable("files", "Files that were read", "", columns, rows),)))
    return blocks


def _exclusion_table(runs: Sequence[Run]) -> PaperTable:
    """Numbers of measured and of excluded values, by reason."""
    lines: list[tuple[list[str], dict[str, int]]] = []
    for run in runs:
        measurement = run.measurements[-1]
        metrics = measurement.record.metrics
        for label in measurement.record.methods if run.record.kind != "roar" else ():
            values = measurement.table.values
            table = exclusions(values[values["method"] == label])
            for metric in metrics.values():
                # Values of one metric share their targets, so that the first one that is summed up speaks for all.
                own = table[table["metric"] == metric.scores[0].value] if metric.scores else table.iloc[:0]
                if len(own):
                    found = dict(zip(own["excluded"], own["count"].astype(int).tolist(), strict=True))
                    lines.append(([run.name, label, metric.name.replace("_", " ")], found))
    reasons = [reason for reason in dict.fromkeys(reason for _, found in lines for reason in found) if reason]
    columns = [Column(name, numeric=False) for name in ("run", "method", "metric")]
    columns += [Column("measured"), *(Column(reason.replace("_", " "), "excluded") for reason in reasons)]
    counts: list[list[Value]] = [
        [*head, found.get("", 0), *(found.get(reason, 0) for reason in reasons)] for head, found in lines
    ]
    note = "Summed over the seeds of a method; of a training, the last measurement."
    return PaperTable("excluded", "What was measured, and what was excluded and why", note, columns, counts)
