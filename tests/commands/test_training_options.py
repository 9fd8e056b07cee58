"""Options of training that would do nothing are refused or said, and lists of a later config replace earlier ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import config_of
from training_runs import Recorder

from lightning_xai.cli import build_cli, main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

ADAM = ["--optimizer=AdamW", "--optimizer.lr=1e-3"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, architecture_file: Callable[[str], Path], shapes: Path) -> Path:
    return config_of(tmp_path_factory.mktemp("options"), architecture_file("vit"), shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr_scheduler=StepLR", "--lr_scheduler.step_size=2"], "--lr_scheduler does nothing without --optimizer"),
        ([*ADAM, "--model.init_args.layer_decay=0.5"], "so that layer_decay would do nothing"),
        (["--trainer.callbacks=LearningRateFinder"], "LearningRateFinder looks for one rate"),
        (['--trainer.callbacks=[{"class_path": "BatchSizeFinder"}]'], "BatchSizeFinder changes the batch"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: list[str], message: str, config: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["fit", f"--config={config}", *options])


def test_a_scheduler_given_by_its_class_moves_on_at_every_step_and_says_so(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=2", "--lr_scheduler.gamma=0.5"]
    short = ["--trainer.limit_train_batches=4", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    short += ["--trainer.callbacks=[]", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    cli, recorder = build_cli([f"--config={config}", *ADAM, *scheduler, *short], run=False), Recorder()
    cli.trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    assert recorder.rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    assert "StepLR moves on after every step, not every epoch: its options count steps, of which there are 4" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("in_a_file", [True, False])
def test_a_list_of_a_later_config_takes_nothing_from_the_list_before_it(
    in_a_file: bool, config: Path, tmp_path: Path
) -> None:
    callbacks = [
        {"class_path": "lightning_xai.training.GroundingCallback"},
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}},
    ]
    later: list[str] = [f"--trainer.callbacks={json.dumps(callbacks)}"]
    if in_a_file:
        path = tmp_path / "later.yaml"
        path.write_text(json.dumps({"trainer": {"callbacks": callbacks}}))
        later = ["--config", str(path)]
    cli: Any = build_cli([f"--config={config}", f"--trainer.default_root_dir={tmp_path}", *later], run=False)
    grounding, stopping = cli.config.trainer.callbacks
    assert grounding.init_args.examples == 6  # 0 in the first config
    assert stopping.init_args.mode == "min"  # ModelCheckpoint's is max
