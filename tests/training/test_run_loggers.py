"""Loggers of a run: where they write, and that they go on with what they have begun."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from folderless_loggers import WithoutFolder, WithRootFolder
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from lightning_xai.training.run_loggers import (
    continue_loggers,
    has_own_folder,
    log_measured,
    logger_ids,
    outlast,
    placed_loggers,
    restore_versions,
)

LOGGERS = "lightning.pytorch.loggers."


def configured(kind: type[Logger] | str, **options: Any) -> dict[str, Any]:
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return {"class_path": name, "init_args": options}


def test_a_logger_writes_into_the_runs_folder_by_whatever_name_it_takes_one(tmp_path: Path) -> None:
    loggers = [
        configured(LOGGERS + "CSVLogger", save_dir="logs", name="x"),
        configured(WithRootFolder, root_dir="logs"),
        configured(WithoutFolder, prefix="p"),
        configured(LOGGERS + "CometLogger", online=False),
        configured(LOGGERS + "MLFlowLogger", tracking_uri="https://host"),
        configured(LOGGERS + "MLFlowLogger"),
        configured(LOGGERS + "MLFlowLogger", artifact_location="s3://mine"),
    ]
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    placed = [one["init_args"] for one in placed_loggers(loggers, tmp_path, "")]
    assert placed == [
        {"save_dir": str(tmp_path), "name": "", "version": ""},
        {"root_dir": str(tmp_path)},
        {"prefix": "p"},
        {"online": False, "offline_directory": str(tmp_path)},
        {"tracking_uri": "https://host"},
        {"tracking_uri": database, "artifact_location": (tmp_path / "mlflow").as_uri()},
        {"tracking_uri": database, "artifact_location": "s3://mine"},
    ]
    assert placed_loggers(False, tmp_path, "") is False
    assert [has_own_folder(one) for one in (None, *loggers[:3], WithoutFolder())] == [True, True, False, False, False]


@pytest.mark.slow
def test_wandb_and_mlflow_go_on_with_their_runs(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    wandb = {"project": "p", "offline": True, "save_dir": str(tmp_path)}
    config = [configured(LOGGERS + "WandbLogger", **wandb), configured(LOGGERS + "CSVLogger", save_dir=str(tmp_path))]
    config += placed_loggers([configured(LOGGERS + "MLFlowLogger")], tmp_path, "")
    first: list[Any] = [
        WandbLogger(project="p", offline=True, save_dir=tmp_path),
        CSVLogger(tmp_path),
        MLFlowLogger(**config[2]["init_args"]),
    ]
    for logger in first:
        logger.log_metrics({"loss": 1.0}, step=0)  # begins it
        logger.finalize("success")
    first[0].experiment.finish()
    ids = logger_ids(first)
    assert ids == {"WandbLogger 1": {"id": first[0].version}, "MLFlowLogger 1": {"run_id": first[2].version}}
    again = continue_loggers(config, ids)
    assert again[0]["init_args"] == {**wandb, "id": first[0].version}
    assert again[1] == config[1]
    mlflow = MLFlowLogger(**again[2]["init_args"])
    mlflow.log_metrics({"loss": 0.5}, step=1)
    history = mlflow.experiment.get_metric_history(str(first[2].version), "loss")
    assert [(each.step, each.value) for each in history] == [(0, 1.0), (1, 0.5)]


def test_an_id_that_the_config_gives_stays_and_each_logger_has_its_own() -> None:
    config = [configured(LOGGERS + "CometLogger", experiment_key="mine"), configured(LOGGERS + "CometLogger")]
    ids = {"CometLogger 1": {"experiment_key": "first"}, "CometLogger 2": {"experiment_key": "second"}}
    continued = continue_loggers(config, ids)
    assert [one["init_args"]["experiment_key"] for one in continued] == ["mine", "second"]
    assert continue_loggers(False, ids) is False


@pytest.mark.parametrize("resuming", [False, True])
def test_what_was_not_measured_is_not_logged_but_a_loss_is(tmp_path: Path, resuming: bool) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    log_measured([logger])
    if resuming:
        outlast([logger], lambda: False)
    for _ in range(2):  # by the run, and by the module
        log_measured([logger])
    nan = float("nan")
    # Lightning adds to names where a number is logged by step and by epoch, or there are several data loaders.
    losses = {"train/loss": nan, "train/loss_step": nan, "val/loss/dataloader_idx_1": nan}
    logger.log_metrics(metrics={"train/grounding_gamma": nan, **losses, "train/accuracy": 0.5}, step=3)
    logger.save()
    (row,) = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    assert row == {"step": "3", "train/accuracy": "0.5", **dict.fromkeys(losses, "nan")}


def test_named_numbers_alone_are_kept_back_until_all_are() -> None:
    logger, logged, nan = CSVLogger("unused"), list[list[str]](), float("nan")
    logger.log_metrics = lambda metrics, step=None: logged.append(list(metrics))  # type: ignore[method-assign]
    for names in (["a"], ["b"], None, ["a"]):
        log_measured([logger], names)
        logger.log_metrics({"a": nan, "b": nan, "c": nan, "loss": nan, "d": 1.0})
    assert logged == [["b", "c", "loss", "d"], ["c", "loss", "d"], ["loss", "d"], ["loss", "d"]]


def test_an_experiment_of_litlogger_is_known_by_name_and_version(tmp_path: Path) -> None:
    pytest.importorskip("litlogger")
    from lightning.pytorch.loggers import LitLogger

    ids = {"LitLogger 1": {"name": "quiet-lake", "version": "2026-11-28T22-00-00.000Z"}}
    [config] = continue_loggers([configured(LOGGERS + "LitLogger", root_dir=str(tmp_path))], ids)
    logger: Any = LitLogger(**config["init_args"])
    restore_versions([logger], ids)
    assert logger_ids([logger]) == ids
