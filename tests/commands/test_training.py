"""`fit`, stopped and resumed: the same weights, numbers and tables as without interruption; and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from stopped_runs import config_of, differences, finish, left_by, signal_all, start, stop_at_random, time_of

from lightning_xai.results.record import read_record
from lightning_xai.training.run_folder import RunFolder

pytestmark = pytest.mark.slow

STOPS = int(os.environ.get("LIGHTNING_XAI_STOPS", "4"))  # of each of four kinds of runs
ALL = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, architecture_file: Callable[[str], Path], shapes: Path) -> Path:
    return config_of(tmp_path_factory.mktemp("training"), architecture_file("vit"), shapes)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(["fit", f"--config={config}", f"--run={folder / 'run'}"], folder / "log") == 0
    return folder / "run"


WANDB = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline=true"]
WANDB += ["--trainer.logger.project=p"]


def test_a_signal_that_also_ends_the_service_of_a_logger_stops_a_run_in_order(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    rng, log, expected = random.Random(5), tmp_path / "log", left_by(whole)
    for number in range(max(1, STOPS // 5)):
        run = tmp_path / f"run{number}"
        arguments = ["fit", f"--config={config}", f"--run={run}", "--save_every_minutes=0.0001", *WANDB]
        process = start(arguments, log)
        while not RunFolder(run).files():
            assert process.exitcode is None, log.read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        signal_all(process.pid or 0, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM, log.read_text()[-3000:]
        assert finish(arguments, log) == 0, log.read_text()[-3000:]
        assert differences(left_by(run)._replace(logged={}), expected._replace(logged={})) == []


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_runs_stopped_at_random_moments_end_as_an_uninterrupted_one(
    workers: int, accumulate: int, config: Path, tmp_path: Path
) -> None:
    options = [f"--config={config}", f"--data.init_args.num_workers={workers}", "--save_every_minutes=0.001"]
    options.append(f"--trainer.accumulate_grad_batches={accumulate}")
    whole = tmp_path / "whole"
    # On any machine, most moments of a run are as likely as others: those after four fifths of its time are rarer.
    seconds = 0.8 * time_of(["fit", *options, f"--run={whole}"], tmp_path / "whole.log", whole)
    expected, rng, stops, runs = left_by(whole), random.Random(10 * accumulate + workers), 0, 0
    while stops < STOPS:
        assert runs < 3 * STOPS, "most runs end before they can be stopped"
        run, log = tmp_path / f"run{runs}", tmp_path / f"log{runs}"
        runs += 1
        arguments = ["fit", *options, f"--run={run}"]
        while stops < STOPS and (stopped := stop_at_random(arguments, log, run, rng, ALL, seconds)):
            stops += 1
            # A signal that comes before training has begun to listen ends the process in the usual way; one that comes
            # when nothing is left to do changes nothing.
            record = RunFolder(run).read()
            if stopped.code == 0 and record is not None and record.finished:
                break
            usual = 1 if stopped.signum == signal.SIGINT else -stopped.signum
            assert stopped.code in (usual, 128 + stopped.signum), (stopped, log.read_text()[-3000:])
        assert finish(arguments, log) == 0, log.read_text()[-3000:]
        assert differences(left_by(run), expected) == []


def refusal(log: Path, *arguments: str) -> str:
    """The message of a command that has to fail, on one line."""
    log.unlink(missing_ok=True)
    assert finish(arguments, log) == 1, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text
    return " ".join(text.split())


def stop_after_a_checkpoint(arguments: list[str], run: Path, log: Path, epochs: int = 0) -> None:
    """Stop a run after its first checkpoint after some epochs of six steps."""
    process = start([*arguments, "--save_every_minutes=0.0001"], log)
    while not any(path > RunFolder(run).place(6 * epochs) for path in RunFolder(run).files()):
        assert process.exitcode is None, log.read_text()[-3000:]
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "start the same command again to resume" in log.read_text()


@pytest.fixture(scope="module")
def stopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after_a_checkpoint(["fit", f"--config={config}", f"--run={folder / 'run'}"], folder / "run", folder / "log")
    return folder / "run"


def test_rerunning_a_finished_run_prints_a_message_and_changes_nothing(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != "lock.owner"}
    assert finish(["fit", f"--config={config}", f"--run={whole}"], tmp_path / "log") == 0
    assert "is finished" in (tmp_path / "log").read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_other_verbs_measure_the_runs_best_model_and_leave_the_run_as_it_is(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "moved", tmp_path / "log"
    shutil.copytree(whole, run)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    history = pd.read_csv(run / "grounding/summary.csv").set_index("step")["gamma_mean"]
    best = history.drop(0).idxmax()
    for verb, option in (("test", f"--config={run / 'config.yaml'}"), ("validate", f"--run={run}")):
        assert finish([verb, option], log) == 0, log.read_text()[-3000:]
        file = run / "checkpoints/best.ckpt"
        line = f"Model: {file}, the run's best by val/gamma_mean ({history[best]:.4f}, after step {best})"
        assert line in log.read_text()
        result = read_record(run / verb / "version_0/grounding" / verb)
        checkpoint = json.loads((run / verb / "version_0/model.json").read_text())
        assert result.model["checkpoint"] == checkpoint
        assert (checkpoint["path"], checkpoint["choice"], checkpoint["step"]) == (str(file), "best", best)
        measured = pd.read_csv(run / f"{verb}/version_0/grounding/summary-{verb}.csv")["gamma_mean"]
        assert measured.tolist() == [pytest.approx(history[best], abs=1e-12)]
    last = f"--ckpt_path={RunFolder(run).files()[0]}" if best == history.index[-1] else "--ckpt_path=last"
    assert finish(["test", f"--config={config}", f"--run={run}", last], log) == 0
    measured = pd.read_csv(run / "test/version_1/grounding/summary-test.csv")["gamma_mean"]
    assert measured.tolist() == [pytest.approx(history.iloc[-1], abs=1e-12)]
    after = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    written = {path.parts[:2] for path in after.keys() - before.keys()}
    assert written == {("test", "version_0"), ("test", "version_1"), ("validate", "version_0")}
    assert (run / "test/version_1/config.yaml").is_file()


def test_where_a_run_has_no_model_other_verbs_say_so(config: Path, tmp_path: Path) -> None:
    options, log = ["test", f"--config={config}"], tmp_path / "log"
    assert "holds no training run" in refusal(log, *options, f"--run={tmp_path / 'misspelt'}")
    assert "name it, --run=FOLDER" in refusal(log, *options, "--ckpt_path=best")
    RunFolder(tmp_path).lock()
    RunFolder(tmp_path).begin({})
    assert "has no checkpoint that can be read (none was written)" in refusal(log, *options, f"--run={tmp_path}")
    assert "there is no file nowhere.ckpt" in refusal(log, *options, f"--run={tmp_path}", "--ckpt_path=nowhere.ckpt")
    assert not (tmp_path / "test").exists()


def test_a_run_trained_for_longer_is_that_of_a_longer_training_where_the_rate_is_constant(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    log, constant = tmp_path / "log", [f"--config={config}", "--model.init_args.final_lr=1e-3"]
    assert finish(["fit", *constant, f"--run={tmp_path / 'long'}"], log) == 0
    run = tmp_path / "extended"
    assert finish(["fit", *constant, f"--run={run}", "--trainer.max_epochs=1"], log) == 0
    assert finish(["fit", f"--run={run}", "--trainer.max_epochs=2"], log) == 0, log.read_text()[-3000:]
    assert "for longer: trainer.max_epochs was 1 and is 2" in log.read_text()
    assert differences(left_by(run), left_by(tmp_path / "long")) == []
    record = RunFolder(run).read()
    assert record is not None
    assert (record.finished, record.longer) == (
        True, ("from step=00000006.ckpt on, trainer.max_epochs was 1 and is 2",)
    )  # fmt: skip
    assert "was 2 and is 1" in refusal(log, "fit", *constant, f"--run={run}", "--trainer.max_epochs=1")


def test_where_the_rate_changes_it_follows_the_longer_schedule_and_says_so(whole: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole, run)
    assert finish(["fit", f"--run={run}", "--trainer.max_epochs=3"], log) == 0, log.read_text()[-3000:]
    # From 1e-3 to 1e-4 in 18 steps, where there were 12.
    assert (
        "The learning rate follows the schedule of 18 steps from step 12 on: it was 0.0001, goes on with 0.000197, and "
        "ends with 0.0001." in log.read_text()
    )
    rates = {step: rate for (name, step), rate in left_by(run).logged.items() if name == "train/learning_rate"}
    assert [rates[step] for step in (11, 12, 17)] == pytest.approx([1e-4, 1e-3 * 0.1 ** (12 / 17), 1e-4])


def test_a_run_with_another_logger_keeps_its_best_model_and_its_id_when_it_goes_on(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ["fit", f"--config={config}", f"--run={run}", *WANDB]
    stop_after_a_checkpoint(arguments, run, log, epochs=1)
    assert finish(arguments, log) == 0, log.read_text()[-3000:]
    assert "dirpath has changed" not in log.read_text()
    identity = RunFolder(run).read().loggers["WandbLogger 1"]["id"]  # type: ignore[union-attr]
    assert {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")} == {identity}
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    expected, found = RunFolder(whole).read(), RunFolder(run).read()
    assert expected is not None and expected.best is not None  # noqa: PT018
    assert found is not None and found.best is not None  # noqa: PT018
    assert (found.best.step, found.best.score) == (expected.best.step, expected.best.score)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["best.ckpt"]
    assert identity not in (run / "config.yaml").read_text()


def test_without_a_name_each_start_of_a_logger_without_a_folder_is_a_run_of_its_own(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    options = [f"--config={config}", f"--trainer.default_root_dir={root}", "--trainer.max_epochs=1"]
    options += ["--trainer.logger=folderless_loggers.WithoutFolder"]
    log = tmp_path / "log"
    assert finish(["fit", *options], log) == 0, log.read_text()[-3000:]
    in_job(monkeypatch, tasks=1)
    assert finish(["fit", *options], log) == 0, log.read_text()[-3000:]
    files = {"run.json", "resume", "grounding", "config.yaml", "checkpoints", "lock", "lock.owner"}
    assert {folder.name: {path.name for path in folder.iterdir()} for folder in root.iterdir()} == {
        "version_0": files, "slurm-7": files
    }  # fmt: skip


def test_a_run_resumes_only_with_the_settings_it_was_started_with(config: Path, stopped: Path, tmp_path: Path) -> None:
    message = refusal(
        tmp_path / "log", "fit", f"--config={config}", f"--run={stopped}", "--model.init_args.initial_lr=0.5",
        "--trainer.max_epochs=1", "--trainer.log_every_n_steps=3",
    )  # fmt: skip
    assert "model.init_args.initial_lr was 0.001 and is 0.5" in message
    assert "trainer.max_epochs was 2 and is 1" in message
    assert "log_every_n_steps" not in message  # changes what is shown, no number
    smaller = "--data.init_args.batch_size=8"  # without another number of processes
    message = refusal(tmp_path / "log", "fit", f"--config={config}", f"--run={stopped}", smaller)
    assert "its batches would hold other samples: batch_size was 16 and is 8" in message


def test_a_run_of_a_version_that_lacked_an_option_goes_on_with_its_default(
    config: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    record = json.loads((run / "run.json").read_text())
    for group, name in (("model", "schedule"), ("model", "warmup_steps"), ("model", "recall_at")):
        del record["settings"][group]["init_args"][name]
    (run / "run.json").write_text(json.dumps(record))
    message = refusal(
        tmp_path / "log", "fit", f"--config={config}", f"--run={run}", "--model.init_args.schedule=cosine"
    )
    assert "model.init_args.schedule was None and is 'cosine'" in message
    assert "warmup_steps" not in message
    assert finish(["fit", f"--config={config}", f"--run={run}"], tmp_path / "log") == 0


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    for verb in ("fit", "test"):
        message = refusal(tmp_path / "log", verb, f"--run={tmp_path}")
        assert f"--run={tmp_path}: there is no run in this folder" in message


def test_where_a_model_is_wanted_the_folder_of_a_run_is_answered_with_its_best_model(
    whole: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    options = ["--image", str(tmp_path / "red.png"), "--caption", "a red square", "--out", str(tmp_path / "out")]
    message = refusal(tmp_path / "log", "explain", *options, "--model.name", str(whole))
    assert f"give the model itself, --model.name={RunFolder(whole).model().path}" in message


def test_options_that_a_callback_of_the_config_makes_idle_are_refused(config: Path, tmp_path: Path) -> None:
    idle = "--trainer.callbacks=[{class_path: lightning_xai.training.FiniteSteps}]"
    message = refusal(tmp_path / "log", "fit", f"--config={config}", idle, "--on_nonfinite=skip")
    assert "--on_nonfinite does nothing next to a FiniteSteps among the callbacks" in message


def test_a_folder_that_another_job_uses_is_refused(config: Path, stopped: Path, tmp_path: Path) -> None:
    holder = RunFolder(stopped)
    holder.lock()
    message = refusal(tmp_path / "log", "fit", f"--config={config}", f"--run={stopped}")
    holder.release()
    assert f"{stopped} is in use by process {os.getpid()} on " in message


def test_corrupt_and_foreign_checkpoints_are_skipped_and_named(
    config: Path, stopped: Path, whole: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, run)
    newest = RunFolder(run).files()[0]
    foreign = shutil.copy(RunFolder(whole).files()[0], RunFolder(run).place(99))
    corrupt = RunFolder(run).place(50)
    corrupt.write_bytes(newest.read_bytes()[:1000])
    assert finish(["fit", f"--config={config}", f"--run={run}"], log) == 0
    message = log.read_text()
    assert f"Skipped {Path(foreign).name}" in message
    assert "it belongs to another run" in message
    assert f"Skipped {corrupt.name}" in message
    assert f"from {newest}" in message
    assert differences(left_by(run)._replace(step=0), left_by(whole)._replace(step=0)) == []


def test_a_run_whose_checkpoints_cannot_be_read_does_not_start_over(
    config: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    files = RunFolder(run).files()
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    before = (run / "run.json").read_bytes()
    message = refusal(tmp_path / "log", "fit", f"--config={config}", f"--run={run}")
    assert f"none of the run's checkpoints in {run / 'resume'} can be read ({files[0].name}" in message
    assert (run / "run.json").read_bytes() == before
    for path in files:
        shutil.copy(stopped / "resume" / path.name, path)  # the refused start left everything that is needed to resume
    assert finish(["fit", f"--config={config}", f"--run={run}"], tmp_path / "log") == 0


def test_a_stale_checkpoint_that_lightning_would_take_inside_a_job_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, tasks=1)
    root = tmp_path / "runs"
    root.mkdir()
    (root / "hpc_ckpt_3.ckpt").write_text("")
    for verb, option in (("fit", f"--run={root}"), ("test", f"--trainer.default_root_dir={root}")):
        options = (f"--config={config}", option)
        assert "hpc_ckpt_3.ckpt is a checkpoint of an earlier job" in refusal(tmp_path / "log", verb, *options)


def in_job(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    """Make the environment that of one of Slurm's tasks on a single node."""
    variables = {"JOB_ID": 7, "JOB_NAME": "test", "STEP_ID": 0, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NNODES": 1}
    for name, value in (variables | {"NTASKS": tasks, "NTASKS_PER_NODE": tasks}).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_devices_that_do_not_match_the_allocation_are_refused_before_anything_is_loaded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, tasks=2)
    message = refusal(tmp_path / "log", "fit", f"--config={config}", "--trainer.devices=1", "--model.model=missing")
    assert "trainer.devices=1, but Slurm has started 2 task(s) on each node" in message


def test_a_job_is_a_run_and_prints_its_steps(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, tasks=1)
    root = tmp_path / "runs"
    options = ["--trainer.max_epochs=1", "--trainer.accumulate_grad_batches=4"]
    arguments = ["fit", f"--config={config}", f"--trainer.default_root_dir={root}", *options]
    assert finish(arguments, tmp_path / "log") == 0
    message = (tmp_path / "log").read_text()
    assert "batch: 16 on each device, 16 in all" in message
    assert "4 batches (64 samples) make a step" in message
    assert "steps: 2 an epoch, 1 epoch, 2 in all" in message
    assert [path.name for path in root.iterdir()] == ["slurm-7"]
    saved = root / "slurm-7/config.yaml"
    before = saved.read_bytes()
    assert finish(["validate", f"--config={saved}"], tmp_path / "log") == 0
    assert (saved.read_bytes(), (root / "slurm-7/validate/version_0").is_dir()) == (before, True)
    assert {"run.json", "resume", "grounding", "config.yaml", "checkpoints"} <= {
        path.name for path in (root / "slurm-7").iterdir()
    }


def test_too_few_samples_for_a_batch_are_refused_before_the_first_validation(config: Path, tmp_path: Path) -> None:
    message = refusal(
        tmp_path / "log", "fit", f"--config={config}", f"--run={tmp_path / 'run'}", "--data.init_args.batch_size=97"
    )
    assert "96 samples do not fill one batch of 97" in message
    assert "val:" not in message


def test_a_dry_run_leaves_no_files(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    options = [f"--config={config}", f"--trainer.default_root_dir={root}", "--trainer.fast_dev_run=true"]
    log = tmp_path / "log"
    assert finish(["fit", *options], log) == 0, log.read_text()[-3000:]
    assert not list(root.glob("**/*.ckpt"))
    assert not list(root.glob("**/run.json"))


def test_a_run_without_a_checkpoint_starts_over_with_any_settings(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    RunFolder(run).lock()
    RunFolder(run).begin({"model": "one that did not fit into memory"})
    assert finish(["fit", f"--config={config}", f"--run={run}", "--trainer.max_epochs=1"], log) == 0
    assert "was stopped before its first checkpoint; it starts over" in log.read_text()


def test_a_table_of_csv_keeps_the_rows_from_before_a_stop(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ["fit", f"--config={config}", f"--run={run}"]
    arguments += ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."]
    stop_after_a_checkpoint(arguments, run, log)
    # As if the run had been killed while it wrote rows of steps that are in no checkpoint.
    with (run / "metrics.csv").open("a", newline="") as file:
        columns = (run / "metrics.csv").read_text().partition("\n")[0].split(",")
        file.write(",".join("11" if name == "step" else "1.0" for name in columns) + "\r\n1")
    assert finish(arguments, log) == 0
    steps = [set(), set()]  # type: list[set[str]]
    for rows, name in zip(steps, ("metrics-1.csv", "metrics.csv"), strict=True):
        with (run / name).open(newline="") as file:
            rows |= {row["step"] for row in csv.DictReader(file) if row["train/loss"]}
    assert steps[0]
    assert steps[0] | steps[1] == {str(step) for step in range(12)}
    assert not steps[0] & steps[1]
    printed = log.read_text()
    assert [noise for noise in ("Experiment logs directory", "Tip:", "TPU available") if noise in printed] == []
