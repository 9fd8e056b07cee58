"""Measures how long `watch` takes to answer on a run of 1,000 measurements; prints and keeps a table.

    python benchmarks/watch.py            # about a minute

The folder is made: two readings of six examples of 14 x 14 patches, with pictures of 224 x 224 pixels, and numbers for
all that `fit` logs on COCO. The server is a separate process. "Changed" is the first question after a measurement
was added, when the answer is computed again; CPU is what the server's process took for it (Linux), which does not
depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import http.client
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
from kept_table import keep
from PIL import Image

from lightning_xai.metrics.grounding import SPEC
from lightning_xai.results.examples import ExampleRecord, words_of, write_examples, write_words
from lightning_xai.results.record import MethodRecord, ResultRecord, write_record
from lightning_xai.results.table import write_csv

PATHS = {"page": "/", "table and curves": "/run.json", "explorer": "/explorer"}
ROUNDS = 7
EXAMPLES, PATCHES, PIXELS = 6, 14, 224
CAPTION = "a dog lies on a red mat next to a sleeping cat"
METHODS = {
    label: MethodRecord(name="feature_pair", options={"image_layer": layer, "text_layer": layer}, signed=True)
    for label, layer in (("feature_pair", -1), ("feature_pair,0,0", 0))
}


def make(run: Path, count: int) -> list[dict[str, Any]]:
    """Write a run of so many measurements; returns the lines of its summary."""
    (run / "grounding" / "examples").mkdir(parents=True)
    (run / "config.yaml").write_text("{}\n")
    draw = np.random.default_rng(0)
    for number in range(EXAMPLES):
        pixels = draw.integers(0, 255, (7, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        picture.save(run / "grounding" / "examples" / f"{number}.jpg")
    lines: list[dict[str, Any]] = []
    for place in range(count):
        add(run, lines, place, draw)
    write_csv(run / "grounding" / "summary.csv", pd.DataFrame(lines))
    return lines


def add(run: Path, lines: list[dict[str, Any]], place: int, draw: np.random.Generator) -> None:
    """Write the folder of one more measurement, and add its line."""
    step = 100 * place
    folder = run / "grounding" / f"step={step:08d}"
    record = ResultRecord(
        kind="training",
        methods=METHODS,
        metrics={SPEC.name: SPEC.record({})},
        state={"epoch": 0, "step": step, "batch": step},
    )
    for label in METHODS:
        write_examples(folder / label, [example(number, draw) for number in range(EXAMPLES)])
        shape = (EXAMPLES, len(words_of(CAPTION)), PATCHES, PATCHES)
        write_words(folder / label, dict(enumerate(draw.normal(size=shape).astype(np.float32))))
    write_record(folder, record)
    names = ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho")
    recalls = [f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    logged = [*recalls, "loss", "accuracy", "zero_shot_accuracy", "caption_choice"]
    counts = [f"excluded_{why}{end}" for end in ("", "_input") for why in ("several_instances", "not_mentioned")]
    line: dict[str, Any] = {"epoch": 0, "step": step}
    for end, layers in (("", "11,11"), ("_input", "0,0")):
        line |= {f"targets{end}": 5000, **{f"{name}{end}": draw.random() for name in names}, f"layers{end}": layers}
    lines.append(line | {name: draw.random() for name in logged} | dict.fromkeys(counts, 100))


def example(number: int, draw: np.random.Generator) -> ExampleRecord:
    """An example with a drawn map."""
    heat = draw.normal(size=(PATCHES, PATCHES)).round(4).tolist()
    return ExampleRecord(
        why=("fixed",),
        image=f"examples/{number}.jpg",
        key=f"{number:012d}",
        caption=CAPTION,
        phrase="a dog",
        spans=((0, 5),),
        label="dog",
        box=(20.0, 30.0, 150.0, 200.0),
        gamma=0.5,
        hit=True,
        heat=tuple(map(tuple, heat)),
    )


def asked(address: tuple[str, int], path: str, headers: Mapping[str, str] | None = None) -> tuple[float, int, str]:
    """Milliseconds until a whole answer is there, its bytes, and its tag."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection(*address)
    connection.request("GET", path, headers=dict(headers or {}))
    response = connection.getresponse()
    size = len(response.read())
    connection.close()
    return 1000 * (time.perf_counter() - start), size, response.headers["ETag"]


def measure(run: Path, lines: list[dict[str, Any]]) -> str:
    """Times of each path: first, again, unchanged (304), and after a measurement was added."""
    command = [sys.executable, "-m", "lightning_xai", "watch", str(run), "--port=0"]
    draw, rows = np.random.default_rng(1), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = urlsplit(server.stdout.readline().split(" at ")[1].split()[0])
        address = (str(url.hostname), int(url.port or 80))
        for name, path in PATHS.items():
            first, size, tag = asked(address, path)
            again = statistics.median(asked(address, path)[0] for _ in range(ROUNDS))
            same = statistics.median(asked(address, path, {"If-None-Match": tag})[0] for _ in range(ROUNDS))
            changed, used = [], processor_seconds(server.pid)
            for _ in range(ROUNDS):
                add(run, lines, len(lines), draw)
                write_csv(run / "grounding" / "summary.csv", pd.DataFrame(lines))
                changed.append(asked(address, path)[0])
            times = " | ".join(f"{taken:.0f}" for taken in (first, again, same))
            each = 1000 * (processor_seconds(server.pid) - used) / ROUNDS
            changes = f"{statistics.median(changed):.0f} (at most {max(changed):.0f}) | {each:.0f}"
            rows.append(f"| {name} | {size / 1000:,.0f} | {times} | {changes} |")
        server.terminate()
    names = ("", "kB", *(f"{name} [ms]" for name in ("first", "again", "unchanged, 304", "changed", "its CPU")))
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    load = f"Other work on the machine: a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    return "\n".join([f"A run of {len(lines) - len(PATHS) * ROUNDS:,} measurements. {load}", "", head, *rows])


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken so far; NaN on systems without /proc."""
    path = Path(f"/proc/{pid}/stat")
    if not path.is_file():
        return math.nan
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Make a run, measure, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="measurements of the run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        lines = make(run, options.count)
        found = measure(run, lines)
    keep("watch", "Answers of the live page", "cpu", found)


if __name__ == "__main__":
    main()
