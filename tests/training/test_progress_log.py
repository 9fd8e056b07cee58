"""Lines of progress in a log: one for each epoch, more where an epoch takes long, and no bar."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from stopped_runs import config_of
from training_runs import batches_of, task_of, trainer_in

from lightning_xai.cli import main
from lightning_xai.training import ProgressLog

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

TIME = r"\d+:\d\d:\d\d left"


@pytest.mark.parametrize(("minutes", "steps"), [(60.0, [4, 8]), (1e-9, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_each_epoch_has_a_line_and_so_has_each_span_of_minutes(
    minutes: float,
    steps: list[int],
    architecture_file: Callable[[str], Path],
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = task_of(architecture_file("vit"))
    loader = batches_of(task, shapes / "train", count=4, size=4)
    trainer_in(tmp_path, ProgressLog(minutes), max_epochs=2).fit(task, loader)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(steps)
    for line, step in zip(lines, steps, strict=True):
        assert re.fullmatch(rf"epoch {1 + (step > 4)}/2, step {step}/8, loss \d+\.\d{{4}}, {TIME}", line), line
    assert lines[-1].endswith("0:00:00 left")


def test_steps_are_counted_as_they_are_made_where_accumulation_changes(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(architecture_file("vit"))
    loader = batches_of(task, shapes / "train", count=6, size=4)
    by_epoch = GradientAccumulationScheduler({0: 4, 1: 2})
    trainer_in(tmp_path, ProgressLog(60), by_epoch, max_epochs=2).fit(task, loader)
    assert re.findall(r"step (\d+/\d+)", capsys.readouterr().out) == ["2/5", "5/5"]


def test_where_the_output_is_no_terminal_a_run_prints_lines_and_no_bar(
    architecture_file: Callable[[str], Path],
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(tmp_path, architecture_file("vit"), shapes, enable_progress_bar=True, logger=False, callbacks=[])
    steps = "--trainer.limit_train_batches=2"
    for verb, *options in (("fit", steps), ("validate",)):
        assert not sys.stdout.isatty()
        main([verb, f"--config={config}", *options])
        lines = capsys.readouterr().out.splitlines()
        assert "%" not in "".join(lines)
        assert [line for line in lines if re.search(rf"loss \d.*, [\d,]+ samples/s, {TIME}", line)] == [
            line for line in lines if line.startswith("epoch ")
        ]
        assert len([line for line in lines if line.startswith("epoch ")]) == (2 if verb == "fit" else 0)


def test_no_time_between_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="minutes has to be positive; got 0"):
        ProgressLog(0)
