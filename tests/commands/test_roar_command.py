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
from lightning_xai.commands.roar import Retraining, Roar
from lightning_xai.data.shard_store import LocalStore
from lightning_xai.data.shards import Manifest
from lightning_xai.data.verification import find_wrong_checksums
from lightning_xai.models import DualEncoder, load_dual_encoder, save_open_clip
from lightning_xai.results.schema import RoarResult
from lightning_xai.training.roar import retrain

TRAINING = Retraining(epochs=1, batch_size=8, lr=1e-3, val_group_size=4)


@pytest.fixture
def roar(
    make_encoder: Callable[..., DualEncoder], architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> Roar:
    """One method and the random control, both modalities, one seed: five cells."""
    weights = tmp_path / "weights" / "vit.safetensors"
    save_open_clip(make_encoder(), weights)
    return Roar(
        ModelChoice(str(architecture_file("vit")), str(weights), "cpu"),
        shapes / "val",
        tmp_path / "out",
        methods={"cam": {"method": "grad_cam"}, "random": {"seed": 3}},
        controls=False,
        seeds=(4,),
        samples=20,
        training=TRAINING,
    )


def cell_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in (folder / "cells").glob("*.json")}


def losses_of(folder: Path) -> dict[str, list[float]]:
    return {name: json.loads(path.read_text())["curve"] for name, path in cell_files(folder).items()}


NAMES = ["original--none--4", "cam--image--4", "cam--text--4", "random--image--4", "random--text--4"]


def test_every_method_and_modality_gets_a_score_and_settings_are_kept(
    roar: Roar, capsys: pytest.CaptureFixture[str]
) -> None:
    roar()
    result = RoarResult.load(roar.out)
    assert set(result.methods) == {"cam", "random"}
    assert result.methods["random"].options["seed"] == 3
    assert result.methods["cam"].method == "grad_cam"
    curves = losses_of(roar.out)
    assert set(curves) == set(NAMES)
    for label in ("cam", "random"):
        for modality in ("image", "text"):
            changed, original = curves[f"{label}--{modality}--4"][-1], curves["original--none--4"][-1]
            assert result.score(label, modality).mean == pytest.approx((changed - original) / original)
            assert changed != original
    assert result.base_loss == curves["original--none--4"][0] == curves["cam--text--4"][0]
    assert (result.data["training"], result.data["validation"]) == (16, 4)
    assert result.settings["training"]["lr"] == 1e-3
    assert result.missing == ()
    shown = capsys.readouterr()
    assert "higher is better" in shown.out
    assert re.search(
        r"cam: explained 16 pairs in .* pairs/s; .* equal values in \d+ images and \d+ captions", shown.err
    )
    assert set(json.loads((roar.out / "degraded" / "cam.json").read_text())["cut_through_ties"]) == {"image", "text"}


def test_what_is_done_is_not_done_again_and_what_is_missing_is(roar: Roar) -> None:
    roar()
    files, curves = cell_files(roar.out), losses_of(roar.out)
    data = {path: path.stat().st_mtime_ns for path in roar.out.glob("d*/*/*")}
    files["cam--text--4"].unlink()
    times = {name: path.stat().st_mtime_ns for name, path in cell_files(roar.out).items()}
    roar()
    assert losses_of(roar.out) == curves
    assert {name: path.stat().st_mtime_ns for name, path in cell_files(roar.out).items() if name in times} == times
    assert {path: path.stat().st_mtime_ns for path in roar.out.glob("d*/*/*")} == data


def test_a_run_that_breaks_off_is_taken_up_where_it_stopped(roar: Roar, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    stop_at = 2

    def recorded(*args: Any, **options: Any) -> list[float]:
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        ran.append(options["cell"])
        return retrain(*args, **options)

    monkeypatch.setattr(roar_run, "retrain", recorded)
    with pytest.raises(KeyboardInterrupt):
        roar()
    assert ran == ["original/none/4", "cam/image/4"]  # the original first
    assert not (roar.out / "result.json").exists()
    stop_at = 5
    roar()
    assert ran[2:] == ["cam/text/4", "random/image/4", "random/text/4"]


def test_a_cell_alone_gets_bit_for_bit_what_it_gets_in_the_middle_of_all(roar: Roar, tmp_path: Path) -> None:
    roar()
    alone = replace(roar, out=tmp_path / "alone", cell=3)
    alone()
    assert losses_of(alone.out) == {"random--image--4": losses_of(roar.out)["random--image--4"]}
    assert not (alone.out / "result.json").exists()


def test_one_run_on_the_original_data_serves_all_methods(roar: Roar) -> None:
    replace(roar, seeds=(0, 1), modalities=("image",))()
    result = RoarResult.load(roar.out)
    assert sorted(result.original) == [0, 1]
    assert [name for name in cell_files(roar.out) if name.startswith("original")] == [
        name for name in cell_files(roar.out) if name in ("original--none--0", "original--none--1")
    ]
    assert [len(result.score(label, "image").values) for label in result.methods] == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda roar: replace(roar, training=replace(TRAINING, lr=1e-4)), r"training.lr was 0.001 and is 0.0001"),
        (lambda roar: replace(roar, split_seed=1), r"selection.split_seed was 0 and is 1"),
        (lambda roar: replace(roar, pixels=0.5), r"degradation.pixels was 0.25 and is 0.5"),
        (lambda roar: replace(roar, methods={"cam": {"method": "saliency"}}), r"method.name was 'grad_cam'"),
        (lambda roar: replace(roar, data=roar.data.parent / "train"), r"data.shards was"),
        (lambda roar: replace(roar, model=replace(roar.model, pretrained=None)), r"model.weights was"),
    ],
)
def test_a_cell_of_other_settings_weights_or_data_is_refused_and_stays(
    roar: Roar, change: Callable[[Roar], Roar], message: str
) -> None:
    roar = replace(roar, methods={"cam": {"method": "grad_cam"}}, modalities=("image",))
    roar()
    before = {path: path.read_bytes() for path in cell_files(roar.out).values()}
    with pytest.raises(ValueError, match=message):
        change(roar)()
    assert {path: path.read_bytes() for path in cell_files(roar.out).values()} == before


def test_a_cell_of_other_images_is_refused(roar: Roar, tmp_path: Path) -> None:
    """The same weights, which the model's seed draws, fed with images of another mean."""
    roar = replace(roar, model=replace(roar.model, pretrained=None), cell=1)
    roar()
    model = json.loads(Path(roar.model.name).read_text())
    other = tmp_path / "other" / Path(roar.model.name).name
    other.parent.mkdir()
    other.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}))
    with pytest.raises(ValueError, match=r"model.preprocessing.mean was .* and is \[0.1, 0.2, 0.3\]") as refused:
        replace(roar, model=replace(roar.model, name=str(other)))()
    assert "weights" not in str(refused.value)


def test_costs_may_change_between_cells(roar: Roar) -> None:
    replace(roar, cell=0)()
    more = {"cam": {"method": "grad_cam", "internal_batch_size": 2}, "random": roar.methods["random"]}
    replace(roar, methods=more, batch_size=3, training=replace(TRAINING, eval_batch_size=2))()
    assert set(cell_files(roar.out)) == set(NAMES)


def test_what_is_done_can_be_gathered_while_cells_are_missing(roar: Roar, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        replace(roar, cell=number)()
    replace(roar, gather=True, model=ModelChoice("not/there.ckpt"))()  # it needs no model
    result = RoarResult.load(roar.out)
    assert result.missing == ("cam/text/4", "random/image/4", "random/text/4")
    assert len(result.score("cam", "image").values) == 1
    assert result.score("random", "text").values == ()
    assert "3 of 5 cells are missing" in capsys.readouterr().out
    replace(roar, list_cells=True)()
    listed = capsys.readouterr().out.splitlines()
    assert listed == [
        "0 original/none/4 done",
        "1 cam/image/4 done",
        "2 cam/text/4 to do",
        "3 random/image/4 to do",
        "4 random/text/4 to do",
    ]


def test_cells_of_two_experiments_are_not_gathered(roar: Roar, tmp_path: Path) -> None:
    replace(roar, cell=0)()
    other = replace(roar, out=tmp_path / "other", data=roar.data.parent / "train", cell=1)
    other()
    cell_files(other.out)["cam--image--4"].rename(roar.out / "cells" / "cam--image--4.json")
    with pytest.raises(ValueError, match=r"data.shards was"):
        replace(roar, gather=True)()
    with pytest.raises(ValueError, match=r"training.epochs was 1 and is 2"):
        replace(roar, gather=True, training=replace(TRAINING, epochs=2))()


def test_cells_of_two_methods_under_one_label_are_not_gathered(roar: Roar) -> None:
    def with_seed(*options: int, **changes: Any) -> Roar:
        methods: dict[str, Any] = {"noise": {"method": "random", **({"seed": options[0]} if options else {})}}
        return replace(roar, methods=methods, seeds=(0, 1), modalities=("text",), **changes)

    with_seed(3, cell=2)()
    with_seed(gather=True)()
    with pytest.raises(ValueError, match=r"noise--text--0.json was made .* method.options.seed was 3 and is 4"):
        with_seed(4, gather=True)()
    with_seed(4, cell=3)()  # alone, it does not see the other
    with pytest.raises(ValueError, match=r"noise--text--1.json was made .* method.options.seed was 4 and is 3"):
        with_seed(gather=True)()
    with pytest.raises(ValueError, match=r"method.name was 'random' and is 'gaussian'"):
        replace(with_seed(gather=True), methods={"noise": {"method": "gaussian"}})()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 9}', "null", '"x"'])
def test_a_broken_file_of_a_cell_is_named(roar: Roar, content: str) -> None:
    path = roar.out / "cells" / "original--none--4.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"original--none--4.json: no result of this cell .* delete it"):
        replace(roar, gather=True)()


def test_a_grid_is_a_method_for_each_point_and_a_table(roar: Roar, capsys: pytest.CaptureFixture[str]) -> None:
    grid: dict[str, list[Any]] = {"layer": [0, 1], "beta": [1.0, 0.1]}
    options = {"steps": 1, "samples": 1}
    roar = replace(roar, methods={"m2ib": options}, grid=grid, modalities=("image",), controls=True, samples=15)
    roar()
    result = RoarResult.load(roar.out)
    labels = [f"m2ib,layer={layer},beta={beta}" for layer in (0, 1) for beta in (1.0, 0.1)]
    assert list(result.methods) == [*labels, "random", "gaussian"]
    assert result.grid == {"layer": (0, 1), "beta": (1.0, 0.1)}
    assert [result.methods[label].options["beta"] for label in labels] == [1.0, 0.1, 1.0, 0.1]
    assert {result.methods[label].options["steps"] for label in labels} == {1}
    shown = capsys.readouterr().out
    assert "beta=1.0" in shown
    assert "image: ROAR+" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"a b": {}}}, "a label has"),
        ({"methods": {"original": {"method": "rise"}}}, "stands for the data as they are"),
        ({"methods": {"m2ib": {"options": {"beta": 1}}}}, "methods: m2ib: m2ib has no option options"),
        ({"methods": {"lime": {}}}, "unknown method 'lime'"),
        ({"methods": {"all": {}}}, "methods: all: expected one method"),
        ({"methods": {"x": {"method": "m2ib", "gamma": 1}}}, "methods: x: m2ib has no option gamma"),
        ({"methods": {}}, "no method takes part"),
        ({"grid": {"beta": [1]}}, "exactly one method"),
        ({"methods": {"m2ib": {}}, "grid": {"beta": []}}, "at least one value"),
        ({"modalities": ("sound",)}, "modalities has to hold"),
        ({"modalities": ()}, "modalities has to hold"),
        ({"seeds": ()}, "seeds has to hold"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"cell": 5}, "--cell has to be 0 to 4"),
        ({"cell": 0, "gather": True}, "one of them at a time"),
        ({"gather": True}, "not one of the 5 cells is done"),
        ({"model": ModelChoice("runs/none.ckpt")}, "fit --config configs/demo.yaml"),
        ({"samples": 41}, "the split has 40 samples"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(roar: Roar, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(roar, **changes)()


def test_data_are_made_once_for_all_seeds_by_prepare(roar: Roar, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(roar, prepare=True)()
    assert not (roar.out / "cells").exists()
    assert sorted(path.name.rpartition("--")[0] for path in (roar.out / "degraded").glob("*--*")) == [
        "cam--image", "cam--text", "random--image", "random--text",
    ]  # fmt: skip
    monkeypatch.setattr(roar_run, "attribute_pairs", None)  # nobody asks for it again
    replace(roar, seeds=(4, 5))()
    assert len(cell_files(roar.out)) == 10


def run_cell(roar: Roar, number: int) -> None:
    torch.set_num_threads(1)
    replace(roar, cell=number)()


def test_jobs_that_make_the_same_data_at_once_both_end_well(roar: Roar) -> None:
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=run_cell, args=(roar, number)) for number in (1, 2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert set(cell_files(roar.out)) == {"cam--image--4", "cam--text--4"}
    for folder in [*(roar.out / "data").iterdir(), *(roar.out / "degraded").glob("*--*")]:
        assert not folder.name.startswith(".")
        assert find_wrong_checksums(LocalStore(folder), Manifest.load(folder).shards) == []


def test_the_base_model_is_loaded_once(roar: Roar, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(*args: Any) -> DualEncoder:
        loaded.append(args[0])
        return load_dual_encoder(*args)

    monkeypatch.setattr("lightning_xai.models.load_dual_encoder", load)
    roar()
    assert len(loaded) == 1


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
                "controls": False,
                "seeds": [4],
                "samples": 20,
                "training": {"epochs": 1, "batch_size": 8, "lr": 1e-3, "val_group_size": 4},
            }
        )
    )
    main(["roar", "--config", str(config), "--list-cells"])
    assert capsys.readouterr().out.splitlines()[0] == "0 original/none/4 to do"
    main(["roar", "--config", str(config), "--cell", "0"])
    main(["roar", "--config", str(config), "--gather"])
    assert RoarResult.load(roar.out).missing == ("cam/image/4", "cam/text/4", "random/image/4", "random/text/4")
    with pytest.raises(SystemExit, match="lightning_xai roar: --cell has to be 0 to 4"):
        main(["roar", "--config", str(config), "--cell", "9"])


def test_the_help_shows_how_to_submit_it_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom lightning_xai.cli import main\n"
        "try:\n    main(['roar', '--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "slurm/roar.sh configs/roar_paper.yaml" in done.stdout
