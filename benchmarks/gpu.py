"""Measures fitting and attribution on one GPU in at most eight minutes, in bounded sections; keeps a table.

    python benchmarks/gpu.py                               # on one CUDA device
    python benchmarks/gpu.py --only fit resume             # these sections; what the file says of others stays
    python benchmarks/gpu.py --device cpu --small --out D  # tiny models: shows that it works, and claims nothing

Weights are random unless a row says otherwise. Each section runs in a separate process and has a share of the time, and
what those before it leave of theirs. One that fails, or is cut when its time is over, is reported with what it has
measured until then, and the others go on. Results are written row by row: `gpu-DEVICE.jsonl`, and `gpu-DEVICE.md` as a
table, so that nothing is lost when the script is stopped.

The sections, and what they measure:

* fit: samples/s of `fit` and of a plain loop for ViT-B-16 in bf16-mixed, compiled or not, from batches in page-locked
  memory and from shards of photographs, and model FLOP utilisation as benchmarks/training.py has it.
* towers: span maps and full interactions of each tower, in forward passes of the pair, and their peak memory; how far
  embeddings and attributions are from those of the CPU, float32 without TF32 on both.
* callback: a validation epoch with and without `GroundingCallback`.
* banzhaf: `BanzhafInteractions` of ViT-B-16.
* resume: a `fit` with deterministic kernels that is killed by `kill -9` and resumes, against one that is not, bit for
  bit; with the model that it has trained, what bf16 changes in gamma and rho.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gpu_sections import SECTIONS
from kept_table import RESULTS

_BEAT = 2.0  # seconds between two looks at what a section has written
_ROOT = Path(__file__).resolve().parent.parent


class End(NamedTuple):
    """How a section ended.

    Attributes:
        status: done, failed or cut.
        seconds: that it took.
        reason: the last line that a failed one wrote.
    """

    status: str
    seconds: float
    reason: str = ""


def run_bounded(command: list[str], seconds: float, log: Path, beat: Callable[[], object]) -> End:
    """Run a command for at most so many seconds, then kill it with all that it has started.

    Args:
        command: program and arguments.
        seconds: that it may take.
        log: file that its output is written to.
        beat: called every other second.
    """
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and (left := begin + seconds - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(_BEAT, left))
                beat()
            code = process.poll()
        finally:
            with suppress(ProcessLookupError):  # also what a process that has ended may have left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    spent = time.monotonic() - begin
    if code is None:
        return End("cut", spent)
    if code == 0:
        return End("done", spent)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return End("failed", spent, lines[-1][:300] if lines else f"exit status {code}")


def environment() -> dict[str, str]:
    """The sections' environment variables: this checkout's package, and no downloads."""
    paths = [str(_ROOT), str(_ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def allowed(names: list[str], number: int, total: float, spent: float) -> float:
    """Seconds of a section: its share of the total, and what those before it have left of theirs."""
    shares = [SECTIONS[name].share for name in names]
    return total * (1 - sum(shares[number + 1 :]) / sum(shares)) - spent


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; a line that was cut while it was written is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def markdown(rows: list[dict[str, Any]], small: bool) -> str:
    """The page of all rows."""
    devices = list(dict.fromkeys(f"{row['name']}" for row in rows if row["table"] == "device"))
    versions = list(dict.fromkeys(f"{row['versions']}" for row in rows if row["table"] == "device"))
    lines = [f"# Fitting and attribution on {', '.join(devices) or 'no device yet'}", "", "; ".join(versions)]
    if small:
        lines += ["", "The small form, of tiny models: it shows that the script works, and claims nothing."]
    ends = {row["section"]: row for row in rows if row["table"] == "end"}
    tables = list(dict.fromkeys(row["table"] for row in rows if row["table"] not in ("device", "end")))
    for table in tables:
        found = [row for row in rows if row["table"] == table]
        lines += ["", f"## {table}", "", *_table(found)]
        lines += ["", *dict.fromkeys(note for row in found if (note := row.get("note")))]
    lines += ["", "## Sections", "", *_table([{"row": name, **_as_row(end)} for name, end in ends.items()])]
    return "\n".join(lines).rstrip() + "\n"


def _as_row(end: dict[str, Any]) -> dict[str, Any]:
    return {"ended": end["status"], "seconds": round(end["seconds"], 1), "why": end["reason"]}


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table; columns are all that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("table", "section", "row", "note")))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    return lines + [f"| {row['row']} | " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}" if type(value) is int else str(value).replace("|", "/")
    if value == 0 or 1e-3 <= abs(value) < 100:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:,.0f}" if 100 <= abs(value) < 1e9 else f"{value:.1e}"


def run_sections(names: list[str], options: argparse.Namespace, rows: Path, page: Path) -> list[str]:
    """Run sections one after the other; the names of those that did not end well."""
    begin, bad = time.monotonic(), []

    def render() -> None:
        page.write_text(markdown(read_rows(rows), options.small))

    with tempfile.TemporaryDirectory(prefix="gpu_benchmark_", ignore_cleanup_errors=True) as work:
        for number, name in enumerate(names):
            command = [sys.executable, str(_ROOT / "benchmarks/gpu_sections.py"), name, "--rows", str(rows)]
            command += ["--device", options.device, "--work", work, *(["--small"] if options.small else [])]
            seconds = allowed(names, number, options.seconds, time.monotonic() - begin)
            log = Path(work, f"{name}.log")
            print(f"{name}: at most {seconds:.0f} s ...", flush=True)
            end = run_bounded(command, seconds, log, render)
            with rows.open("a") as file:
                file.write(json.dumps({"table": "end", "section": name, **end._asdict()}) + "\n")
            render()
            print(f"{name}: {end.status} after {end.seconds:.0f} s {end.reason}", flush=True)
            if end.status != "done":
                bad.append(name)
                print(log.read_text(errors="replace")[-3000:], flush=True)
    return bad


def keep_others(rows: Path, names: Iterable[str]) -> None:
    """Drop the rows of sections that are measured again from a file of results, which is made if it is missing."""
    kept = [row for row in read_rows(rows) if row["section"] not in set(names)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="tiny models and few steps")
    parser.add_argument("--seconds", type=float, default=470.0, help="that all of it may take")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="the sections to run; all by default")
    parser.add_argument("--out", type=Path, help="folder of the results; by default benchmarks/results")
    options = parser.parse_args()
    if options.device == "cpu" and not (options.small and options.out):
        parser.error("--device cpu shows only that the script works: give --small, and --out FOLDER")
    out = options.out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    names = options.only or list(SECTIONS)
    rows, page = out / f"gpu-{options.device}.jsonl", out / f"gpu-{options.device}.md"
    if options.only:
        keep_others(rows, names)
    else:
        rows.write_text("")
    os.environ.update(environment())
    # Stopped from outside, it ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bad = run_sections(names, options, rows, page)
    print(f"\n{page.read_text()}\nKept in {page}")
    if bad:
        raise SystemExit(f"{', '.join(bad)} did not end well")


if __name__ == "__main__":
    main()
