"""`report` through the command line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from result_folders import SKILLS, write_evaluation, write_roar, write_training

from lightning_xai.cli import main

FAST = ["--bootstrap-samples", "20"]


def message_of(*args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *args])
    assert isinstance(stopped.value.code, str), "a traceback or a usage text, not a message"
    return stopped.value.code


@pytest.mark.slow
def test_page_tables_and_figures_are_written_without_torch(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", SKILLS)
    write_roar(tmp_path / "r", {("m2ib", "image"): (2.5, 2.4), ("random", "image"): (2.1,)})
    code = (
        "import sys; from lightning_xai.cli import main; main(sys.argv[1:]);"
        "print('heavy:', *({'torch', 'lightning', 'open_clip', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "a", "r", "--out", "out", *FAST],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "160", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "heavy:"
    assert lines[-2] == "Open out/report.html"
    assert "Visual-linguistic grounding" in done.stdout
    assert "ROAR+, image" in done.stdout
    out = tmp_path / "out"
    for name in ("grounding", "roar", "runs", "classes-feature_pair-on-shapes"):
        for suffix in ("csv", "md", "tex"):
            assert (out / "tables" / f"{name}.{suffix}").stat().st_size > 60
    for path in (out / "figures").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 100
    assert (out / "figures" / "delta-shapes.svg").read_text().startswith("<?xml")
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_names_title_alpha_and_epsilon_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, skill in (("a", 0.3), ("b", 0.7)):
        write_evaluation(tmp_path / name, {"feature_pair": skill}, examples=False)
    out = tmp_path / "out"
    options = ["--names", "openai, fine-tuned", "--title", "My <title>", "--alpha=0.001", "--epsilon=0.01", *FAST]
    main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), *options])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>My &lt;title&gt;</h1>" in page
    assert "at level α = 0.001" in page
    assert "fine-tuned grounds better than openai (feature_pair): ε_min = 0.0" in capsys.readouterr().out
    with (out / "tables" / "grounding.csv").open(newline="", encoding="utf-8") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["openai", "fine-tuned"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone"], "lightning_xai report: gone is not a folder"),
        (["."], "holds no results"),
        (["t", "t"], "is given twice"),
        (["t", "--names", "a,b"], "--names has to hold a different name for each of 1 runs"),
        (["t", "--method", "rise"], "--method rise: none of the runs has it; they have feature_pair"),
        (["t", "--alpha", "0.7"], "alpha: expected a significance level in (0, 0.5), got 0.7"),
        (["t", "--min-pairs", "0"], "min_pairs: expected at least 1, got 0"),
        (["t", "--out", "file"], "file cannot be written"),
    ],
)
def test_a_mistake_is_named_without_a_traceback(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_training(tmp_path / "t", [0.2, 0.5])
    (tmp_path / "file").write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert message in message_of(*args)


def test_without_a_run_the_usage_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2
    usage = capsys.readouterr().err
    assert "required: runs (`lightning_xai report --help` lists the options)" in usage
