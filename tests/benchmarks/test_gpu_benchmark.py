"""benchmarks/gpu.py loses nothing: sections are bounded, failures are results, and its small form runs to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_sections
import pytest
import torch

SECTIONS = {"fit", "towers", "resume", "callback", "banzhaf"}
ROOT = Path(gpu.__file__).parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_section_that_takes_too_long_is_killed_with_all_it_has_started(tmp_path: Path) -> None:
    beats: list[int] = []
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    end = gpu.run_bounded(python(code), 1.5, tmp_path / "log", lambda: beats.append(1))
    assert (end.status, end.reason) == ("cut", "")
    assert beats
    pid = int((tmp_path / "log").read_text())
    for _ in range(100):  # until init has taken note of it
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail("its child goes on")


def test_a_section_that_fails_says_why_in_its_last_line(tmp_path: Path) -> None:
    end = gpu.run_bounded(python("raise ValueError('no such kernel')"), 60, tmp_path / "log", lambda: None)
    assert (end.status, end.reason) == ("failed", "ValueError: no such kernel")
    assert gpu.run_bounded(python("pass"), 60, tmp_path / "log", lambda: None).status == "done"


def test_each_section_has_its_share_whatever_those_before_it_took() -> None:
    names, total = list(gpu_sections.SECTIONS), 470.0
    shares = [section.share for section in gpu_sections.SECTIONS.values()]
    assert set(names) == SECTIONS
    assert sum(shares) == pytest.approx(470)
    spent = 0.0
    for number, share in enumerate(shares):  # each takes all that it may: none gets less than its share
        seconds = gpu.allowed(names, number, total, spent)
        assert seconds == pytest.approx(share)
        spent += seconds
    # What the first leaves goes to the second, and the last has all that is left.
    assert gpu.allowed(names, 1, total, 10.0) == pytest.approx(shares[0] + shares[1] - 10.0)
    assert gpu.allowed(names, len(names) - 1, total, 300.0) == pytest.approx(170.0)


def test_rows_are_shown_even_where_a_section_failed_or_was_cut_while_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"table": "device", "section": "fit", "name": "A device", "versions": "torch 1"},
        {"table": "fit", "section": "fit", "row": "eager", "samples/s": 1234.5, "workers": 12, "note": "bf16"},
        {"table": "fit", "section": "fit", "row": "compiled", "failed": "RuntimeError: a | b", "note": "bf16"},
        {"table": "end", "section": "fit", "status": "cut", "seconds": 160.04, "reason": ""},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"table": "fi')
    page = gpu.markdown(gpu.read_rows(path), small=False)
    assert page.startswith("# Fitting and attribution on A device\n\ntorch 1\n")
    assert "| | samples/s | workers | failed |" in page
    assert "| eager | 1,234 | 12 |  |" in page
    assert "| compiled |  |  | RuntimeError: a / b |" in page
    assert "| fit | cut | 160 |  |" in page
    assert page.count("bf16") == 1


def test_measuring_a_section_again_keeps_the_rows_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"table": "fit", "section": section, "row": section} for section in ("fit", "resume", "fit", "banzhaf")]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    gpu.keep_others(path, ["fit", "towers"])
    assert gpu.read_rows(path) == [rows[1], rows[3]]
    gpu.keep_others(tmp_path / "none.jsonl", ["fit"])
    assert gpu.read_rows(tmp_path / "none.jsonl") == []


def allocate() -> None:
    raise torch.OutOfMemoryError("no room\nmore about it")


def test_an_error_is_a_rows_result_and_the_next_row_is_measured(tmp_path: Path) -> None:
    bench = gpu_sections.Bench("fit", "cpu", True, tmp_path, tmp_path / "rows.jsonl")
    with bench.attempt("fit", "first"):
        allocate()
    with bench.attempt("fit", "second"):
        bench.write("fit", "second", rate=1.0)
    first, second = gpu.read_rows(bench.rows)
    assert first["failed"] == "OutOfMemoryError: no room"
    assert second["rate"] == 1.0


def test_a_fit_is_killed_at_its_first_checkpoint_and_one_that_ends_before_is_an_error(tmp_path: Path) -> None:
    write = "import pathlib, time; pathlib.Path('step=7.ckpt').touch()"
    kill = gpu_sections._kill_at_first_checkpoint
    assert kill(python(f"{write}; time.sleep(600)"), tmp_path, tmp_path) == "step=7"
    with pytest.raises(RuntimeError, match="ended by itself, with 3, before it could be killed"):
        kill(python("raise SystemExit(3)"), tmp_path, tmp_path / "none")


def test_one_other_bit_in_weights_or_averages_is_found(tmp_path: Path) -> None:
    def checkpoint(name: str, weight: float, average: float) -> Path:
        states = [{"state": {0: {"exp_avg": torch.tensor([average])}}}]
        torch.save({"state_dict": {"w": torch.tensor([weight])}, "optimizer_states": states}, tmp_path / name)
        return tmp_path / name

    one, same = checkpoint("one", 1.0, 2.0), checkpoint("same", 1.0, 2.0)
    above = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    assert gpu_sections._differences(one, same) == ([], 2)
    assert gpu_sections._differences(one, checkpoint("weight", above, 2.0)) == (["w"], 2)
    assert gpu_sections._differences(one, checkpoint("average", 1.0, 2.0 * above)) == (["optimizer.0.exp_avg"], 2)


@pytest.mark.slow
def test_the_small_form_measures_every_section_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--small", "--seconds", "900"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment)
    rows = gpu.read_rows(tmp_path / "gpu-cpu.jsonl")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert {row["section"]: row["status"] for row in rows if row["table"] == "end"} == dict.fromkeys(SECTIONS, "done")
    # A ResNet has no layer at its inputs.
    assert [row["row"] for row in rows if "failed" in row] == ["resnet, inputs"]
    tables = {name: [row for row in rows if row["table"] == name] for name in {row["table"] for row in rows}}
    assert all(row["samples/s"] > 0 and row["TFLOP/s"] > 0 for row in tables["fit"])
    assert len(tables["attribution"]) == len(gpu_sections.SMALL_TOWERS) * len(gpu_sections.PRESETS)
    assert {row["all within 1e-04"] for row in tables["agreement with the CPU"]} == {"yes"}
    (resumed,) = tables["resume"]
    assert resumed["bit for bit"] == "yes"
    assert resumed["killed with"] != resumed["ended with"]
    assert resumed["tensors compared"] > 100
    (bf16,) = tables["bf16"]
    assert 0 < bf16["change of gamma, mean"] < 0.1
    assert tables["callback"][0]["ratio"] > 0
    assert tables["banzhaf_pairs"][0]["s a pair"] > 0
    assert "claims nothing" in (tmp_path / "gpu-cpu.md").read_text()
