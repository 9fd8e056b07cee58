"""`roar` through the object that the command line makes, and through the command line."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_xai.cli import main
from lightning_xai.commands import roar_run
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.roar import Roar
from lightning_xai.data.shard_store import LocalStore
from lightning_xai.data.shards import Manifest
from lightning_xai.data.verification import find_wrong_checksums
from lightning_xai.models import DualEncoder, save_open_clip
from lightning_xai.results.record import ResultRecord
from lightning_xai.results.roar import roar_scores
from lightning_xai.results.table import read_result
from lightning_xai.results.trials import Retraining
from lightning_xai.training.roar import retrain

TRAINING = Retraining(epochs=1, batch_size=8, lr=1e-3, val_group_size=4)


@pytest.fixture
def roar(
    make_encoder: Callable[..., DualEncoder], architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> Roar:
    """One method and the random baseline, both modalities, one seed: five trials."""
    weights = tmp_path / "weights" / "vit.safetensors"
    save_open_clip(make_encoder(), weights)
    return Roar(
        ModelChoice(str(architecture_file("vit")), str(weights), "cpu"),
        shapes / "val",
        tmp_path / "out",
        methods={"cam": {"method": "grad_cam"}, "random": {"seed": 3}},
        baselines=False,
        seeds=(4,),
        samples=20,
        training=TRAINING,
    )


def trial_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in (folder / "trials").glob("*.json")}


def result_of(folder: Path) -> tuple[ResultRecord, dict[tuple[str, str, int], float]]:
    """The record, and the scores by method, modality and seed."""
    record, table = read_result(folder)
    return record, {tuple(key): value for *key, value in roar_scores(record, table).itertuples(index=False)}


def losses_of(folder: Path) -> dict[str, list[float]]:
    return {name: json.loads(path.read_text())["curve"] for name, path in trial_files(folder).items()}


NAMES = ["original--none--4", "cam--image--4", "cam--text--4", "random--image--4", "random--text--4"]


def test_every_method_and_modality_gets_a_score_and_settings_are_kept(
    roar: Roar, capsys: pytest.CaptureFixture[str]
) -> None:
    roar()
    record, scores = result_of(roar.out)
    assert {label: method.name for label, method in record.methods.items()} == {"cam": "grad_cam", "random": "random"}
    assert record.methods["random"].options["seed"] == 3
    assert [(method.baseline, method.signed) for method in record.methods.values()] == [(False, False), (True, False)]
    curves = losses_of(roar.out)
    assert set(curves) == set(NAMES)
    assert len(scores) == 4
    for (label, modality, seed), score in scores.items():
        changed, original = curves[f"{label}--{modality}--{seed}"][-1], curves["original--none--4"][-1]
        assert score == (changed - original) / original != 0
    assert record.extra["base_loss"] == curves["original--none--4"][0] == curves["cam--text--4"][0]
    assert record.extra["missing"] == []
    assert (record.data["training"], record.data["validation"]) == (16, 4)
    assert record.settings["training"]["lr"] == 1e-3
    shown = capsys.readouterr()
    assert "ROAR+" in shown.out
    assert re.search(
        r"cam: explained 16 pairs in .* pairs/s; .* equal values in \d+ images and \d+ captions", shown.err
    )
    assert set(json.loads((roar.out / "degraded" / "cam.json").read_text())["cut_through_ties"]) == {"image", "text"}


def test_trials_that_are_done_are_not_run_again_and_missing_ones_are(roar: Roar) -> None:
    roar = replace(roar, methods={"cam": {"method": "grad_cam"}})
    roar()
    files, curves = trial_files(roar.out), losses_of(roar.out)
    data = {path: path.stat().st_mtime_ns for path in roar.out.glob("d*/*/*")}
    files["cam--text--4"].unlink()
    times = {name: path.stat().st_mtime_ns for name, path in trial_files(roar.out).items()}
    roar()
    assert losses_of(roar.out) == curves
    assert {name: path.stat().st_mtime_ns for name, path in trial_files(roar.out).items() if name in times} == times
    assert {path: path.stat().st_mtime_ns for path in roar.out.glob("d*/*/*")} == data


@pytest.mark.slow
def test_an_interrupted_run_continues_with_the_trials_that_are_missing(
    roar: Roar, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    stop_at = 2

    def recorded(*args: Any, **options: Any) -> list[float]:
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        ran.append(options["name"])
        return retrain(*args, **options)

    monkeypatch.setattr(roar_run, "retrain", recorded)
    with pytest.raises(KeyboardInterrupt):
        roar()
    assert ran == ["original/none/4", "cam/image/4"]  # the original first
    assert not (roar.out / "result.json").exists()
    stop_at = 5
    roar()
    assert ran[2:] == ["cam/text/4", "random/image/4", "random/text/4"]


@pytest.mark.slow
def test_a_trial_alone_has_bit_for_bit_the_losses_it_has_among_all(roar: Roar, tmp_path: Path) -> None:
    roar()
    alone = replace(roar, out=tmp_path / "alone", trial=3)
    alone()
    assert losses_of(alone.out) == {"random--image--4": losses_of(roar.out)["random--image--4"]}
    assert not (alone.out / "result.json").exists()


@pytest.mark.slow
def test_a_trial_of_other_settings_weights_or_data_is_refused_and_stays(roar: Roar) -> None:
    roar = replace(roar, methods={"cam": {"method": "grad_cam"}}, modalities=("image",))
    replace(roar, trial=1)()
    before = trial_files(roar.out)["cam--image--4"].read_bytes()
    changed = {
        r"training.lr was 0.001 and is 0.0001": replace(roar, training=replace(TRAINING, lr=1e-4)),
        r"selection.split_seed was 0 and is 1": replace(roar, split_seed=1),
        r"degradation.pixels was 0.25 and is 0.5": replace(roar, pixels=0.5),
        r"method.name was 'grad_cam' and is 'saliency'": replace(roar, methods={"cam": {"method": "saliency"}}),
        r"data.shards was": replace(roar, data=roar.data.parent / "train"),
        r"model.weights was": replace(roar, model=replace(roar.model, pretrained=None)),
    }
    for message, other in changed.items():
        with pytest.raises(ValueError, match=message):
            other()
    assert trial_files(roar.out)["cam--image--4"].read_bytes() == before


def test_a_trial_of_other_preprocessing_is_refused(roar: Roar, tmp_path: Path) -> None:
    """The same weights, which the model's seed draws, fed with images of another mean."""
    roar = replace(roar, model=replace(roar.model, pretrained=None), trial=1)
    roar()
    model = json.loads(Path(roar.model.name).read_text())
    other = tmp_path / "other" / Path(roar.model.name).name
    other.parent.mkdir()
    other.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}))
    with pytest.raises(ValueError, match=r"model.preprocessing.mean was .* and is \[0.1, 0.2, 0.3\]") as refused:
        replace(roar, model=replace(roar.model, name=str(other)))()
    assert "weights" not in str(refused.value)


@pytest.mark.slow
def test_batch_sizes_that_change_no_number_may_differ_between_trials(roar: Roar) -> None:
    replace(roar, trial=0)()
    more = {"cam": {"method": "grad_cam", "internal_batch_size": 2}, "random": roar.methods["random"]}
    replace(roar, methods=more, batch_size=3, training=replace(TRAINING, eval_batch_size=2))()
    assert set(trial_files(roar.out)) == set(NAMES)


def test_results_can_be_gathered_while_trials_are_missing(roar: Roar, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        replace(roar, trial=number)()
    replace(roar, gather=True, model=ModelChoice("not/there.ckpt"))()  # it needs no model
    record, scores = result_of(roar.out)
    assert record.extra["missing"] == ["cam/text/4", "random/image/4", "random/text/4"]
    assert list(scores) == [("cam", "image", 4)]
    assert "3 of 5 trials are missing" in capsys.readouterr().out
    replace(roar, list_trials=True)()
    listed = capsys.readouterr().out.splitlines()
    assert listed == [
        "0 original/none/4 done",
        "1 cam/image/4 done",
        "2 cam/text/4 to do",
        "3 random/image/4 to do",
        "4 random/text/4 to do",
    ]


def test_trials_of_two_experiments_are_not_gathered(roar: Roar, tmp_path: Path) -> None:
    replace(roar, trial=0)()
    other = replace(roar, out=tmp_path / "other", data=roar.data.parent / "train", trial=1)
    other()
    trial_files(other.out)["cam--image--4"].rename(roar.out / "trials" / "cam--image--4.json")
    with pytest.raises(ValueError, match=r"data.shards was"):
        replace(roar, gather=True)()
    with pytest.raises(ValueError, match=r"training.epochs was 1 and is 2"):
        replace(roar, gather=True, training=replace(TRAINING, epochs=2))()


def test_trials_of_two_methods_under_one_label_are_not_gathered(roar: Roar) -> None:
    def with_seed(*options: int, **changes: Any) -> Roar:
        methods: dict[str, Any] = {"noise": {"method": "random", **({"seed": options[0]} if options else {})}}
        return replace(roar, methods=methods, seeds=(0, 1), modalities=("text",), **changes)

    with_seed(3, trial=2)()
    with_seed(gather=True)()
    with pytest.raises(ValueError, match=r"noise--text--0.json was made .* method.options.seed was 3 and is 4"):
        with_seed(4, gather=True)()
    with_seed(4, trial=3)()  # alone, it does not see the other
    with pytest.raises(ValueError, match=r"noise--text--1.json was made .* method.options.seed was 4 and is 3"):
        with_seed(gather=True)()
    with pytest.raises(ValueError, match=r"method.name was 'random' and is 'gaussian'"):
        replace(with_seed(gather=True), methods={"noise": {"method": "gaussian"}})()


@pytest.mark.parametrize("content", ["{", '{"version": 2}', "null"])
def test_a_broken_file_of_a_trial_is_named(roar: Roar, content: str) -> None:
    path = roar.out / "trials" / "original--none--4.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"original--none--4.json: no result of this trial .* delete it"):
        replace(roar, gather=True)()


def test_results_of_an_earlier_release_are_refused(roar: Roar) -> None:
    (roar.out / "cells").mkdir(parents=True)
    with pytest.raises(ValueError, match="use another --out folder to run the trials again"):
        replace(roar, list_trials=True)()


@pytest.mark.slow
def test_a_grid_is_a_method_for_each_point_and_a_table(roar: Roar, capsys: pytest.CaptureFixture[str]) -> None:
    grid: dict[str, list[Any]] = {"layer": [0, 1], "beta": [1.0, 0.1]}
    options = {"steps": 1, "samples": 1}
    roar = replace(roar, methods={"m2ib": options}, grid=grid, modalities=("image",), baselines=True, samples=15)
    roar()
    record, scores = result_of(roar.out)
    labels = [f"m2ib,layer={layer},beta={beta}" for layer in (0, 1) for beta in (1.0, 0.1)]
    assert list(record.methods) == [*labels, "random", "gaussian"]
    assert [label for label, _, _ in scores] == list(record.methods)
    assert record.extra["grid"] == {"layer": [0, 1], "beta": [1.0, 0.1]}
    assert [record.methods[label].options["beta"] for label in labels] == [1.0, 0.1, 1.0, 0.1]
    assert {record.methods[label].options["steps"] for label in labels} == {1}
    shown = capsys.readouterr().out
    assert "β = 1.0" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"a b": {}}}, "a label has"),
        ({"methods": {"original": {"method": "rise"}}}, "stands for the data as they are"),
        ({"methods": {"lime": {}}}, "unknown method 'lime'"),
        ({"methods": {"all": {}}}, "methods: all: expected one method"),
        ({"methods": {"x": {"method": "m2ib", "gamma": 1}}}, "methods: x: m2ib has no option gamma"),
        ({"methods": {}}, "no method takes part"),
        ({"grid": {"beta": [1]}}, "exactly one method"),
        ({"methods": {"m2ib": {}}, "grid": {"beta": []}}, "at least one value"),
        ({"modalities": ("sound",)}, "modalities has to hold"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"trial": 5}, "--trial has to be 0 to 4"),
        ({"trial": 0, "gather": True}, "one of them at a time"),
        ({"gather": True}, "none of the 5 trials is done"),
        ({"model": ModelChoice("runs/none.ckpt")}, "fit --config configs/demo.yaml"),
        ({"samples": 41}, "the split has 40 samples"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(roar: Roar, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(roar, **changes)()


def test_prepare_creates_data_once_for_all_seeds(roar: Roar, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(roar, prepare=True)()
    assert not (roar.out / "trials").exists()
    assert sorted(path.name.rpartition("--")[0] for path in (roar.out / "degraded").glob("*--*")) == [
        "cam--image", "cam--text", "random--image", "random--text",
    ]  # fmt: skip
    monkeypatch.setattr(roar_run, "attribute_pairs", None)  # not called again
    replace(roar, seeds=(4, 5))()
    assert len(trial_files(roar.out)) == 10
    assert len(result_of(roar.out)[1]) == 8


def run_trial(roar: Roar, number: int) -> None:
    torch.set_num_threads(1)
    replace(roar, trial=number)()


@pytest.mark.slow
def test_jobs_that_create_the_same_data_at_once_both_succeed(roar: Roar) -> None:
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=run_trial, args=(roar, number)) for number in (1, 2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert set(trial_files(roar.out)) == {"cam--image--4", "cam--text--4"}
    for folder in [*(roar.out / "data").iterdir(), *(roar.out / "degraded").glob("*--*")]:
        assert not folder.name.startswith(".")
        assert find_wrong_checksums(LocalStore(folder), Manifest.load(folder).shards) == []


def test_the_command_line_reads_a_config_and_flags(
    roar: Roar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "roar.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"name": roar.model.name, "pretrained": roar.model.pretrained, "device": "cpu"},
                "data": str(roar.data),
                "out": str(roar.out),
                "methods": roar.methods,
                "baselines": False,
                "seeds": [4],
                "samples": 20,
                "training": {"epochs": 1, "batch_size": 8, "lr": 1e-3, "val_group_size": 4},
            }
        )
    )
    main(["roar", "--config", str(config), "--list-trials"])
    assert capsys.readouterr().out.splitlines()[0] == "0 original/none/4 to do"
    main(["roar", "--config", str(config), "--trial", "0"])
    main(["roar", "--config", str(config), "--gather"])
    assert len(result_of(roar.out)[0].extra["missing"]) == 4
    with pytest.raises(SystemExit, match="lightning_xai roar: --trial has to be 0 to 4"):
        main(["roar", "--config", str(config), "--trial", "9"])


def test_the_help_shows_how_to_submit_it_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom lightning_xai.cli import main\n"
        "try:\n    main(['roar', '--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "slurm/roar.sh configs/roar_paper.yaml" in done.stdout
