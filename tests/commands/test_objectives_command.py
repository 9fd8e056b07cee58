"""`objectives` through the object that the command line makes, and through the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from jsonargparse import ArgumentError
from objective_trials import GAMMA, write_trials

from lightning_xai.commands.objectives import Objectives
from lightning_xai.commands.objectives_run import ObjectivesRun, _see_one_gpu
from lightning_xai.results.objectives import ObjectiveTrial, read_trained_model
from lightning_xai.results.table import read_result


@pytest.fixture
def settings(architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path) -> Objectives:
    """Two variants with one seed, of a tiny model on a tiny world."""
    data = {"train": str(shapes / "train"), "val": str(shapes / "val"), "test": str(shapes / "val")}
    return Objectives(
        out=tmp_path / "out",
        model={"model": str(architecture_file("vit")), "pretrained": None, "initial_lr": 1e-3, "final_lr": 1e-3},
        data={
            "class_path": "lightning_xai.data.ShardDataModule",
            "init_args": {**data, "batch_size": 16, "num_workers": 0, "swap_objects": True},
        },
        variants={
            "base": [{"class_path": "Softmax"}],
            "gamma": [{"class_path": "Softmax"}, {"class_path": "Grounding"}],
        },
        judge={
            "methods": {"feature_pair": {}, "grad_cam": {}},
            "metrics": ["grounding"],
            "examples": 1,
            "examples_per_class": 0,
            "failures": 0,
        },
        trainer={"accelerator": "cpu", "max_epochs": 1, "callbacks": [{"class_path": "CaptionChoiceCallback"}]},
        seeds=(3,),
        images=8,
        scores=("gamma_mean",),
        bootstrap_samples=20,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "plain"}, r"base has to be one of the variants \(base, gamma\); got 'plain'"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"trial": 2}, r"--trial has to be 0 to 1 \(see --list-trials\); got 2"),
        ({"trial": 0, "gather": True}, "exclude each other"),
        ({"workers": 0}, "workers has to be at least 1; got 0"),
        ({"gather": True}, "no trial of the base 'base' is done"),
        ({"variants": {"a-b": []}, "base": "a-b"}, "names of letters, digits and _"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_in_a_sentence(
    change: dict[str, Any], message: str, settings: Objectives
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings, **change)()


def test_an_unknown_objective_is_refused_before_any_training(settings: Objectives) -> None:
    with pytest.raises(ArgumentError, match=r"variants\.gamma"):
        ObjectivesRun(replace(settings, variants={"base": [], "gamma": [{"class_path": "Gamma"}]}))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_of_other_settings_is_refused_before_any_training(
    settings: Objectives, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectivesRun, "run", None)
    write_trials(settings.out, {"gamma": GAMMA}, seeds=settings.seeds)
    with pytest.raises(ValueError, match="was made with other settings"):
        replace(settings, workers=workers)()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_with_a_page(settings: Objectives, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ran = ObjectivesRun.run, list[str]()

    def recorded(self: ObjectivesRun, trial: ObjectiveTrial) -> None:
        if len(ran) == 1:
            ran.append("stop")
            raise KeyboardInterrupt
        ran.append(str(trial))
        run(self, trial)

    monkeypatch.setattr(ObjectivesRun, "run", recorded)
    with pytest.raises(KeyboardInterrupt):
        settings()
    assert not (settings.out / "report").exists()
    settings()
    assert ran == ["base/3", "stop", "gamma/3"]
    found = read_trained_model(settings.out, ObjectiveTrial("gamma", 3))
    assert found is not None
    assert found.trained_on == ("feature_pair",)
    assert "val/caption_choice" in found.logged
    assert (found.trial.validated(settings.out) / "caption_choice" / "validate.csv").is_file()
    assert (settings.out / "report" / "report.html").is_file()
    record, table = read_result(settings.out / "variants" / "gamma")
    assert list(record.methods) == ["feature_pair", "grad_cam"]
    assert set(table.values["seed"]) == {3}


@pytest.mark.parametrize(
    ("visible", "seen"), [("", ["0", "1", "2", "0"]), ("5,7,9", ["5", "7", "9", "5"]), ("3", ["3", "3", "3", "3"])]
)
def test_each_worker_sees_one_of_the_gpus_in_turn(
    visible: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: len((visible or "0,1,2").split(",")))
    found = []
    for number in range(4):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        _see_one_gpu(number)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == seen


@pytest.mark.slow
def test_two_workers_find_what_one_process_finds(settings: Objectives) -> None:
    data = {**settings.data, "init_args": {**settings.data["init_args"], "num_workers": 1}}
    both = replace(settings, out=settings.out / "both", data=data, workers=2)
    settings()
    both()
    for variant in settings.variants:
        trial = ObjectiveTrial(variant, 3)
        one, other = (read_trained_model(each.out, trial) for each in (settings, both))
        assert one is not None
        assert other is not None
        # Numbers of threads differ.
        assert other.logged == pytest.approx(one.logged, rel=1e-4, abs=1e-4)
        values = [read_result(each.out / "variants" / variant)[1].values for each in (settings, both)]
        pd.testing.assert_frame_equal(*values, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_trial_that_fails_in_a_worker_ends_the_run_in_its_own_words(settings: Objectives, tmp_path: Path) -> None:
    data = {**settings.data, "init_args": {**settings.data["init_args"], "train": str(tmp_path / "nowhere")}}
    with pytest.raises(Exception, match="nowhere") as caught:
        replace(settings, data=data, workers=2)()
    assert any(entry.name == "_raise_failure" for entry in caught.traceback)
    assert not (settings.out / "trials").exists()
