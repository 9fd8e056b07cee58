from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from numpy.typing import NDArray
from training_runs import task_of, trainer_in

from lightning_xai.cli import main
from lightning_xai.data import Manifest, Sample, ShardDataModule, write_shards
from lightning_xai.data.sample import read_image
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.evaluation import AttributionEvaluation
from lightning_xai.metrics.grounding import gamma, patch_mask
from lightning_xai.results.predictions import PredictionPart, part_paths, read_predictions, write_part
from lightning_xai.results.record import ResultError
from lightning_xai.results.table import read_result
from lightning_xai.training import ContrastiveFineTuning, PredictionWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")


@pytest.fixture(scope="module")
def samples(shapes: Path) -> list[Sample]:
    """Eleven images, one of which does not decode, with captions in other scripts than Latin and a small object."""
    manifest = Manifest.load(shapes / "val")
    found = [sample for _, sample in read_samples(shapes / "val", manifest, [0], 0, 11) if isinstance(sample, Sample)]
    found[4] = replace(found[4], image=found[4].image[:-60])
    small, *others = found[5].regions
    found[5] = replace(found[5], regions=(replace(small, box=(8.0, 8.0, 6.0, 6.0), mask=None), *others))
    found[6] = replace(found[6], captions=(*found[6].captions, "ein blauer Stern – 青い星"))
    return found


@pytest.fixture(scope="module")
def data_folder(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "shards"
    write_shards(samples, folder, name="test", progress=False)
    return folder


@pytest.fixture(scope="module")
def task(architecture_file: Callable[[str], Path]) -> ContrastiveFineTuning:
    return task_of(architecture_file("vit"))


def data_of(shards: Path, **options: Any) -> ShardDataModule:
    return ShardDataModule(
        test=shards, **({"eval_batch_size": 2, "num_workers": 0, "max_fault_fraction": 0.5} | options)
    )


def predict(
    task: ContrastiveFineTuning,
    shards: Path,
    out: Path,
    *more: Callback,
    trainer: Any = None,
    workers: int = 0,
    **options: Any,
) -> Path:
    writer = PredictionWriter(out / "parts", **({"part_megabytes": 0} | options))
    trainer_in(out, writer, *more, **(trainer or {})).predict(
        task, data_of(shards, num_workers=workers), return_predictions=False
    )
    return out / "parts"


def rows_of(parts: Path) -> dict[int, dict[str, NDArray[Any] | list[Any]]]:
    """What the parts say of each sample, by its index."""
    found: dict[int, dict[str, Any]] = {}
    for part in read_predictions(parts):
        for row, index in enumerate(part.arrays["index"].tolist()):
            assert index not in found
            own = part.arrays["caption_image"] == row
            found[index] = {
                "key": [part.texts["keys"][row]],
                "image": part.arrays["image"][row],
                "text": part.arrays["text"][own],
                "captions": [part.texts["captions"][i] for i in np.flatnonzero(own).tolist()],
                **phrases_of(part, own),
            }
    return found


def phrases_of(part: PredictionPart, captions: NDArray[Any]) -> dict[str, Any]:
    if "phrase_caption" not in part.arrays:
        return {}
    own = captions[part.arrays["phrase_caption"]]
    maps = span_maps(part)
    return {"phrases": [part.texts["phrases"][i] for i in np.flatnonzero(own).tolist()], "maps": maps[own]}


def span_maps(part: PredictionPart) -> NDArray[Any]:
    """The phrases' maps, also where the interactions of their captions are stored."""
    if "maps" in part.arrays:
        return part.arrays["maps"]
    interactions = part.arrays["interactions"][part.arrays["phrase_caption"]]
    summed: NDArray[Any] = np.einsum("rl,rlhw->rhw", part.arrays["span_mask"].astype(np.float32), interactions)
    return summed


def assert_same(one: Path, other: Path, tolerance: float = 0) -> None:
    first, second = rows_of(one), rows_of(other)
    assert first.keys() == second.keys()
    for index, row in first.items():
        for name, value in row.items():
            if isinstance(value, list):
                assert value == second[index][name]
            else:
                np.testing.assert_allclose(value, second[index][name], atol=tolerance, rtol=0)


class Stop(Callback):
    """Breaks a prediction off in one of its batches."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.batch:
            raise KeyError("stopped")


class Count(Callback):
    """Counts the images that a prediction reads."""

    read = 0

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self.read += int(batch.valid.sum())


def test_parts_hold_the_unit_embeddings_of_every_image_and_caption_but_broken_ones(
    task: ContrastiveFineTuning,
    samples: list[Sample],
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = predict(task, data_folder, tmp_path)
    assert f"Saved 10 images with their captions in 6 parts in {parts}" in capsys.readouterr().out
    rows = rows_of(parts)
    encoder = task.encoder.eval()
    assert sorted(rows) == [i for i in range(11) if i != 4]
    for index, row in rows.items():
        sample = samples[index]
        assert (row["key"], row["captions"]) == ([sample.key], list(sample.captions))
        with torch.no_grad():
            image = encoder.encode_image(encoder.image_transform(read_image(sample.image, sample.key))[None])
            text = encoder.encode_text(encoder.tokenizer.encode(sample.captions))
        for name, value in (("image", image[0]), ("text", text)):
            expected = torch.nn.functional.normalize(value, dim=-1).numpy()
            np.testing.assert_allclose(row[name], expected, atol=1e-6)


@pytest.mark.parametrize("maps", [None, "phrases"])
def test_a_prediction_that_was_stopped_goes_on_without_reading_again_and_ends_the_same(
    task: ContrastiveFineTuning, data_folder: Path, tmp_path: Path, maps: Any
) -> None:
    whole = predict(task, data_folder, tmp_path / "whole", maps=maps)
    with pytest.raises(KeyError):
        predict(task, data_folder, tmp_path / "stopped", Stop(3), maps=maps, part_megabytes=64)
    (stopped,) = part_paths(tmp_path / "stopped" / "parts")  # what was computed is kept
    before = stopped.read_bytes()
    (stopped.parent / f".{stopped.stem}.0123.safetensors").write_bytes(b"half of a part")
    count = Count()
    workers = 2 if maps is None else 0
    parts = predict(task, data_folder, tmp_path / "stopped", count, maps=maps, workers=workers)
    assert count.read == 5
    assert stopped.read_bytes() == before
    assert_same(parts, whole)


def test_other_settings_and_broken_parts_are_refused(
    task: ContrastiveFineTuning, data_folder: Path, tmp_path: Path, architecture_file: Callable[[str], Path]
) -> None:
    parts = predict(task, data_folder, tmp_path)
    with pytest.raises(ValueError, match=r"other settings: maps was None and is 'phrases'; .* Choose another folder"):
        predict(task, data_folder, tmp_path, maps="phrases")
    other = task_of(architecture_file("vit_average_pool"))
    with pytest.raises(ValueError, match="other settings: weights was "):
        predict(other, data_folder, tmp_path)
    part_paths(parts)[0].write_bytes(b"no part")
    with pytest.raises(ResultError, match=r"rank_0-000000\.safetensors cannot be read .* delete it and run"):
        predict(task, data_folder, tmp_path)
    (parts / "settings.json").unlink()
    part_paths(parts)[0].unlink()
    with pytest.raises(ValueError, match=r"settings\.json is missing"):
        predict(task, data_folder, tmp_path)
    with pytest.raises(ResultError, match="holds no predictions"):
        next(read_predictions(tmp_path))


@pytest.mark.parametrize("maps", ["phrases", "interactions"])
def test_stored_maps_give_the_gamma_that_test_measures(
    task: ContrastiveFineTuning,
    architecture_file: Callable[[str], Path],
    data_folder: Path,
    tmp_path: Path,
    maps: Any,
) -> None:
    parts = predict(task, data_folder, tmp_path / "predict", maps=maps, part_megabytes=64)
    found = {}
    for part in read_predictions(parts):
        boxes, size = torch.from_numpy(part.arrays["boxes"]), part.arrays["image_size"].tolist()
        values = torch.from_numpy(span_maps(part))
        gammas = gamma(values, patch_mask(boxes, (values.shape[1], values.shape[2]), tuple(size)))
        for row, value in enumerate(gammas.tolist()):
            if not part.texts["excluded"][row]:
                caption = part.arrays["phrase_caption"][row]
                image, number = part.arrays["caption_image"][caption], part.arrays["caption_index"][caption]
                found[part.texts["keys"][image], int(number), part.texts["labels"][row]] = value
    evaluation = AttributionEvaluation(
        str(architecture_file("vit")), None, out=tmp_path / "test", metrics=["grounding"], examples=0
    )
    evaluation.encoder.load_state_dict(task.encoder.state_dict())
    trainer_in(tmp_path).test(evaluation, data_of(data_folder), verbose=False)
    assert evaluation.table is not None
    measured = evaluation.table.frame.query("metric == 'gamma' and excluded in ('', 'no_positive')")
    expected = {
        (row.key, row.caption_index, row.label): row.value for row in measured.itertuples() if row.excluded == ""
    }
    assert expected
    assert {name: value for name, value in found.items() if name in expected} == pytest.approx(expected, abs=1e-5)
    assert len(found) == len(measured)

    main(["evaluate", "--predictions", str(parts), "--out", str(tmp_path / "stored")])
    record, table = read_result(tmp_path / "stored")
    _, original = read_result(tmp_path / "test")
    for metric in ("gamma", "rho"):
        own, other = (
            {
                (row.key, row.caption_index, row.label): (row.value, row.excluded)
                for row in each.frame.query(f"metric == '{metric}'").itertuples()
                if row.excluded in ("", "no_positive", "smaller_than_patch")
            }
            for each in (table, original)
        )
        assert own.keys() == other.keys()
        assert any(reason == "smaller_than_patch" for _, reason in own.values())
        for name, (value, reason) in other.items():
            assert own[name] == (pytest.approx(value, abs=1e-5, nan_ok=True), reason)
    assert record.methods["feature_pair"].options == PredictionWriter(maps=maps).options


def test_predictions_without_maps_cannot_be_evaluated(
    task: ContrastiveFineTuning, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = predict(task, data_folder, tmp_path / "predict")
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--predictions", str(parts), "--out", str(tmp_path / "out")])
    assert "embeddings without maps; run `predict --maps phrases`" in str(stopped.value)
    part = next(read_predictions(predict(task, data_folder, tmp_path / "maps", maps="phrases")))
    (tmp_path / "odd").mkdir()
    write_part(tmp_path / "odd/rank_0-000000.safetensors", replace(part, texts={**part.texts, "excluded": ["odd"]}))
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--predictions", str(tmp_path / "odd"), "--out", str(tmp_path / "out")])
    assert "has not the form that PredictionPart describes (KeyError: 'ODD')" in str(stopped.value)


def test_interactions_need_a_method_that_has_them() -> None:
    with pytest.raises(ValueError, match="maps=interactions needs a method with token-patch attributions"):
        PredictionWriter(maps="interactions", method="grad_cam")


def test_a_logger_decides_on_the_folder(task: ContrastiveFineTuning, data_folder: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", name="run", version=3)
    trainer_in(tmp_path, PredictionWriter(), logger=logger).predict(task, data_of(data_folder))
    assert len(part_paths(tmp_path / "logs" / "run" / "version_3" / "predictions")) == 1


def predict_on_this_rank(config: str, shards: str, out: str, stopped: bool) -> None:
    more = (Stop(1),) if stopped else ()
    try:
        predict(task_of(config), Path(shards), Path(out), *more, maps="phrases", trainer=join_lightning())
    except KeyError:
        assert stopped


@pytest.mark.distributed
def test_two_processes_write_parts_of_their_own_and_one_goes_on_with_them(
    architecture_file: Callable[[str], Path], data_folder: Path, tmp_path: Path
) -> None:
    config = str(architecture_file("vit"))
    alone = predict(task_of(config), data_folder, tmp_path / "alone", maps="phrases")
    run_distributed(predict_on_this_rank, config, str(data_folder), str(tmp_path / "two"), False)
    parts = tmp_path / "two" / "parts"
    assert {path.name[:6] for path in part_paths(parts)} == {"rank_0", "rank_1"}
    assert_same(parts, alone, 1e-6)
    run_distributed(predict_on_this_rank, config, str(data_folder), str(tmp_path / "stopped"), True)
    assert 0 < len(rows_of(tmp_path / "stopped" / "parts")) < 10
    assert_same(predict(task_of(config), data_folder, tmp_path / "stopped", maps="phrases"), alone, 1e-6)
