from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import pytest
import torch
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from training_runs import task_of, trainer_in

from lightning_xai.data import Manifest, Sample, ShardDataModule, write_shards
from lightning_xai.data.object_swaps import object_swaps
from lightning_xai.data.sample import WrongCaption, decode_image
from lightning_xai.data.shapes import SHAPES, prepare_shapes
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.training import CaptionChoiceCallback, ContrastiveFineTuning, GroundingCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

Make = Callable[..., ContrastiveFineTuning]
PAIR = ("a red ring and a blue star", "a blue ring and a red star")


@pytest.fixture(scope="module")
def make(architecture_file: Callable[[str], Path]) -> Make:
    return lambda name="vit", **options: task_of(architecture_file(name), **options)


def noise(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def with_choices(key: str, seed: int, captions: tuple[str, ...], *wrong: WrongCaption, group: str = "") -> Sample:
    return Sample(key, noise(seed), (40, 40), captions, source=f"test/{key}", wrong_captions=wrong, group=group)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes with 24 images to train on and 13 to validate on, wrong captions of two kinds, and pairs of images."""
    root = tmp_path_factory.mktemp("world") / "shapes"
    prepare_shapes(root, 24, 13, progress=False)
    crepe = []
    for i in range(11):
        texts = (f"a red ring and {i} stars", f"{i} stars")
        wrong = [
            WrongCaption(f"a red star and {i} rings", 0, "swap_att"),
            WrongCaption(f"{i} blue stars", 1, "add_att"),
        ]
        # One that a tokenizer in lower case cannot tell from the true one.
        same = [WrongCaption(texts[1].upper(), 1, "add_att")] if i == 4 else []
        crepe.append(with_choices(f"c{i}", i, texts, *wrong[: 1 + i % 2], *same))
    write_shards(crepe, root / "crepe", name="crepe", progress=False)
    pairs = []
    for i in range(9):
        sides = [f"{text} {i}" for text in PAIR]
        for side in (0, 1) if i != 5 else (0,):  # one image of the sixth pair is not there
            wrong_caption = WrongCaption(sides[1 - side], 0, "Relation")
            pairs.append(with_choices(f"{i}-{side}", 2 * i + side, (sides[side],), wrong_caption, group=str(i)))
    write_shards(pairs, root / "pairs", name="pairs", progress=False)
    return root


def data_of(world: Path, **options: Any) -> ShardDataModule:
    folders = {"train": world / "train", "val": world / "val", "test": world / "val"}
    defaults = {"batch_size": 8, "eval_batch_size": 5, "num_workers": 0, "swap_objects": True}
    return ShardDataModule(**(folders | defaults | options))


def callback_of(world: Path, **options: Any) -> CaptionChoiceCallback:
    shards = {"crepe": world / "crepe", "pairs": world / "pairs"}
    defaults: dict[str, Any] = {"shards": shards, "batch_size": 4, "num_workers": 0}
    return CaptionChoiceCallback(**(defaults | options))


def samples_of(folder: Path) -> list[Sample]:
    manifest = Manifest.load(folder)
    records = read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)
    return [sample for _, sample in records if isinstance(sample, Sample)]


class Literal:
    """One image and one caption at a time through open_clip's own model and tokenizer."""

    def __init__(self, task: ContrastiveFineTuning) -> None:
        self.encoder = task.encoder.eval()
        self.model: Any = task.encoder.model
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)

    @torch.no_grad()
    def similarity(self, sample: Sample, text: str) -> float:
        image = self.model.encode_image(self.encoder.image_transform(decode_image(sample))[None])
        caption = self.model.encode_text(self.tokenizer([text]))
        return float((normalize(image, dim=1) * normalize(caption, dim=1)).sum())

    def right(self, sample: Sample, true: str, wrong: str) -> bool:
        return self.similarity(sample, true) > self.similarity(sample, wrong)

    def swaps(self, folder: Path) -> list[bool]:
        return [
            self.right(sample, sample.captions[swap.caption], swap.text)
            for sample in samples_of(folder)
            for swap in object_swaps(sample, sample.captions, SHAPES)
        ]

    def kinds(self, folder: Path) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] = {}
        for sample in samples_of(folder):
            for wrong in sample.wrong_captions:
                true = sample.captions[wrong.caption]
                if wrong.text.lower() != true:
                    found.setdefault(wrong.kind, []).append(self.right(sample, true, wrong.text))
        return found

    def pairs(self, folder: Path) -> list[tuple[bool, bool]]:
        found, groups = [], {sample.group: sample for sample in samples_of(folder)}
        samples = samples_of(folder)
        for group in groups:
            images = [sample for sample in samples if sample.group == group]
            if len(images) == 2:
                s = [[self.similarity(image, other.captions[0]) for image in images] for other in images]
                found.append((s[0][0] > s[1][0] and s[1][1] > s[0][1], s[0][0] > s[0][1] and s[1][1] > s[1][0]))
        return found


def mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def logged_by(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_scores_are_those_of_open_clip_one_caption_at_a_time(make: Make, world: Path, tmp_path: Path) -> None:
    task = make()
    trainer = trainer_in(tmp_path, callback_of(world))
    trainer.validate(task, data_of(world), verbose=False)
    found, literal = logged_by(trainer), Literal(task)
    swaps, kinds, pairs = literal.swaps(world / "val"), literal.kinds(world / "crepe"), literal.pairs(world / "pairs")
    asked = [right for values in kinds.values() for right in values]
    assert set(kinds) == {"swap_att", "add_att"}
    assert 0 < mean(asked) < 1
    expected = {
        "caption_choice": mean(swaps),
        "caption_choice_targets": len(swaps),
        "caption_choice_excluded": 0,
        "caption_choice_crepe": mean(asked),
        "caption_choice_crepe_macro": (mean(kinds["swap_att"]) + mean(kinds["add_att"])) / 2,
        "caption_choice_crepe_targets": len(asked),
        "caption_choice_crepe_excluded": 1,
        "caption_choice_pairs": mean(literal.kinds(world / "pairs")["Relation"]),
        "caption_choice_pairs_targets": 17,
        "caption_choice_pairs_excluded": 1,  # the pair with one image
        "pairs_text": mean([text for text, _ in pairs]),
        "pairs_image": mean([image for _, image in pairs]),
        "pairs_group": mean([text and image for text, image in pairs]),
    }
    assert {f"val/{name}": value for name, value in expected.items()} == pytest.approx(
        {name: value for name, value in found.items() if "choice" in name or "pairs" in name}
    )
    with (tmp_path / "caption_choice" / "validate.csv").open(newline="") as file:
        lines = {(line["shards"], line["kind"]): line for line in csv.DictReader(file)}
    assert float(lines["crepe", "add_att"]["share"]) == mean(kinds["add_att"])
    assert int(lines["crepe", "add_att"]["targets"]) == len(kinds["add_att"])
    assert float(lines["pairs", "pairs: group"]["share"]) == expected["pairs_group"]


def test_a_training_monitors_them_and_they_stand_next_to_grounding(make: Make, world: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/caption_choice_crepe", mode="max")
    callbacks: list[Callback] = [callback_of(world), GroundingCallback(examples=0), best]
    trainer_in(tmp_path, *callbacks, max_epochs=2).fit(make(), data_of(world))
    with (tmp_path / "grounding" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("caption_choice", "pairs_group", "rho"))
    assert float(best.best_model_score or 0) == max(float(row["caption_choice_crepe"]) for row in rows[1:])
    files = sorted(path.name for path in (tmp_path / "caption_choice").iterdir())
    assert files == [f"step={step:08d}.csv" for step in (0, 3, 6)]


def test_grounding_and_weights_are_the_same_with_and_without_it(make: Make, world: Path, tmp_path: Path) -> None:
    found = []
    for name, callbacks in (("with", [callback_of(world)]), ("without", [])):
        task = make()
        trainer = trainer_in(tmp_path / name, *callbacks, GroundingCallback(examples=0), max_epochs=1)
        trainer.fit(task, data_of(world))
        logged = {key: value for key, value in logged_by(trainer).items() if "choice" not in key and "pairs" not in key}
        logged.pop("train/samples_per_second", None)
        found.append((logged, {key: value.clone() for key, value in task.state_dict().items()}))
    (logged, weights), (other_logged, other_weights) = found
    assert logged == other_logged
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())


def test_in_half_precision_true_and_wrong_captions_are_embedded_alike(
    make: Make, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, modes = make(), list[bool]()
    embed = task.encoder.encode_text

    def watched(tokens: Tensor) -> Tensor:
        modes.append(torch.is_autocast_enabled("cpu"))
        return embed(tokens)

    monkeypatch.setattr(task.encoder, "encode_text", watched)
    trainer_in(tmp_path, callback_of(world), precision="bf16-mixed").validate(task, data_of(world), verbose=False)
    assert set(modes) == {True}


def choices_of(config: str, world: Path, folder: Path) -> dict[str, float]:
    """What a training of one epoch logs last; on the processes that there are."""
    trainer = trainer_in(folder, callback_of(world), **join_lightning())
    trainer.validate(task_of(config), data_of(world), verbose=False)
    return {name: value for name, value in logged_by(trainer).items() if "choice" in name or "pairs" in name}


@pytest.mark.slow
@pytest.mark.distributed
def test_numbers_are_the_same_on_any_number_of_processes(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    config = str(architecture_file("vit"))
    alone, *others = (
        run_distributed(choices_of, config, world, tmp_path / str(size), world_size=size) for size in (1, 2, 4)
    )
    assert len(alone[0]) == 13
    assert [found for each in others for found in each] == alone * 6


def test_what_could_fail_later_is_refused_before_anything_is_computed(
    make: Make, world: Path, tmp_path: Path, shapes: Path
) -> None:
    def refused(message: str, *callbacks: Callback, task: L.LightningModule | None = None, **options: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            trainer_in(tmp_path, *callbacks).fit(make() if task is None else task, data_of(world, **options))

    refused(
        r"val shards .* hold no wrong captions .* set --data.swap_objects true",
        CaptionChoiceCallback(),
        swap_objects=False,
    )
    refused(r"^the shards 'own' .*val\) hold no wrong captions", CaptionChoiceCallback(shards={"own": world / "val"}))
    refused("no such folder", CaptionChoiceCallback(shards={"none": world / "nowhere"}))
    for watched in ("caption_choice", "caption_choice_pairs", "pairs_group", "caption_choice_crepe_macro"):
        stopping = EarlyStopping(f"val/{watched}")
        refused(
            r"looks at val/.* every 1 epochs, CaptionChoiceCallback", callback_of(world, every_n_epochs=2), stopping
        )
    for options, message in (
        ({"every_n_epochs": 0}, "every_n_epochs has to be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size has to be at least 1"),
        ({"swaps": False}, "nothing to ask about"),
        ({"shards": {"a/b": world}}, r"names of shards have letters.*got 'a/b'"),
    ):
        with pytest.raises(ValueError, match=message):
            CaptionChoiceCallback(**options)


def test_a_module_that_returns_no_embeddings_is_told_what_to_return(make: Make, world: Path, tmp_path: Path) -> None:
    class Silent(ContrastiveFineTuning):
        def validation_step(self, *args: Any) -> Any:
            super().validation_step(*args)

    task = make()
    task.__class__ = Silent
    with pytest.raises(ValueError, match=r"validation_step and test_step of Silent return: let them return"):
        trainer_in(tmp_path, CaptionChoiceCallback()).validate(task, data_of(world), verbose=False)
    trainer = trainer_in(tmp_path, callback_of(world, swaps=False))
    trainer.validate(task, data_of(world, swap_objects=False), verbose=False)
    assert logged_by(trainer)["val/caption_choice_crepe_targets"] == 16
