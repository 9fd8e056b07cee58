"""Retraining of one trial: the same numbers wherever it runs, and the known answer of a world with one object."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_xai.attribution import Attribution
from lightning_xai.data.batch import EvaluationCollate
from lightning_xai.data.dataset import EvaluationDataset
from lightning_xai.data.sample import Sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest, write_shards
from lightning_xai.evaluation.roar_data import write_degraded, write_original
from lightning_xai.loss import contrastive_loss
from lightning_xai.models import DualEncoder
from lightning_xai.models.fingerprint import weights_fingerprint
from lightning_xai.results.trials import Retraining
from lightning_xai.training.nonfinite import NonFiniteLossError
from lightning_xai.training.roar import retrain

COLORS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "white": (250, 250, 250)}


@pytest.fixture
def encoder(make_encoder: Callable[..., DualEncoder]) -> DualEncoder:
    return make_encoder("vit")


@pytest.fixture
def folders(encoder: DualEncoder, shapes: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A training part of 24 and a validation part of 10 samples."""
    manifest = Manifest.load(shapes / "val")
    keys = [s.key for _, s in read_samples(shapes / "val", manifest, [0], 0, 34) if isinstance(s, Sample)]
    for name, own in (("train", keys[:24]), ("val", keys[24:])):
        write_original(encoder, shapes / "val", frozenset(own), tmp_path / name, name)
    return tmp_path / "train", tmp_path / "val"


def losses(encoder: DualEncoder, train: Path, val: Path, seed: int = 0, name: str = "x", **options: Any) -> list[float]:
    return retrain(encoder, train, val, Retraining(**({"epochs": 1, "batch_size": 8} | options)), name=name, seed=seed)


def test_losses_are_those_of_fixed_groups_of_the_validation_part(
    encoder: DualEncoder, folders: tuple[Path, Path]
) -> None:
    curve = losses(encoder, *folders, epochs=2, eval_batch_size=4, val_group_size=5)
    collate = EvaluationCollate(encoder.image_transform, encoder.tokenizer, ())
    (batch,) = EvaluationDataset(folders[1], Manifest.load(folders[1]), collate, batch_size=10)
    with torch.no_grad():
        image, text = encoder.encode_image(batch.images), encoder.encode_text(batch.tokens)
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in (image, text))
    groups = [
        contrastive_loss(image[rows], text[rows], encoder.logit_scale.detach().exp())[0]
        for rows in (slice(5), slice(5, 10))
    ]
    assert len(curve) == 3
    assert curve[0] == pytest.approx(float(groups[0] + groups[1]) / 2, rel=1e-5)
    assert curve[1] != curve[0] != curve[2]
    assert losses(encoder, *folders, epochs=2, eval_batch_size=64, val_group_size=5) == pytest.approx(curve, rel=1e-6)


def test_a_trial_gets_the_same_numbers_whatever_ran_before_and_leaves_the_model_as_it_was(
    encoder: DualEncoder, folders: tuple[Path, Path]
) -> None:
    before, modes = weights_fingerprint(encoder), [module.training for module in encoder.modules()]
    in_training: list[bool] = []
    probe = encoder.model.visual.transformer.resblocks[0]
    hook = probe.register_forward_pre_hook(lambda module, inputs: in_training.append(module.training))
    first = losses(encoder, *folders, lr=1e-3)
    hook.remove()
    assert in_training == [False, True, True, True, False]
    torch.manual_seed(123)
    other = losses(encoder, *folders, lr=1e-3, seed=1)
    assert losses(encoder, *folders, lr=1e-3) == first
    assert other[0] == first[0]  # nothing has been trained yet
    assert other[1:] != first[1:]
    assert weights_fingerprint(encoder) == before
    assert [module.training for module in encoder.modules()] == modes
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not torch.are_deterministic_algorithms_enabled()  # explanations in the same process run as usual


def test_a_loss_that_is_not_finite_names_its_trial(encoder: DualEncoder, folders: tuple[Path, Path]) -> None:
    with pytest.raises(NonFiniteLossError, match=r"trial m2ib/text/3: the training loss of epoch 0, batch 1 is nan"):
        losses(encoder, *folders, name="m2ib/text/3", lr=1e30)
    with torch.no_grad():
        encoder.model.visual.proj.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match=r"trial a/image/0: the validation loss after 0 epochs is nan"):
        losses(encoder, *folders, name="a/image/0")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": 0}, "epochs has to be at least 1"), ({"batch_size": 25}, "do not fill one batch of 25")],
)
def test_settings_that_cannot_be_met_are_refused(
    encoder: DualEncoder, folders: tuple[Path, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        losses(encoder, *folders, **options)


def colored_squares(count: int, seed: int) -> list[tuple[Sample, torch.Tensor]]:
    """Images of noise with one square of 8 pixels, whose color the caption names; and where it is, [4, 4]."""
    generator, squares = np.random.default_rng(seed), []
    for number in range(count):
        pixels = generator.integers(90, 160, (32, 32, 3), dtype=np.uint8)
        row, column = generator.integers(0, 4, 2)
        name = list(COLORS)[number % len(COLORS)]
        pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = COLORS[name]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        place = torch.zeros(4, 4)
        place[row, column] = 1.0
        squares.append((Sample(f"s{seed}-{number}", stream.getvalue(), (32, 32), (f"a {name} square",)), place))
    return squares


@pytest.mark.slow
def test_a_map_of_the_object_scores_far_above_maps_of_the_background(encoder: DualEncoder, tmp_path: Path) -> None:
    train, validation = colored_squares(32, 0), colored_squares(16, 1)
    write_shards([sample for sample, _ in train], tmp_path / "train", name="train")
    write_shards([sample for sample, _ in validation], tmp_path / "val", name="val")
    place = torch.stack([place for _, place in train])
    background = torch.rand(place.shape, generator=torch.Generator().manual_seed(0)) - 2 * place
    maps = {"object": place, "background": background}
    folders = {"original": tmp_path / "train"}
    for name, image in maps.items():
        folders[name] = tmp_path / name
        given = Attribution(image, torch.zeros(len(train), encoder.tokenizer.context_length), image[:, 0, 0])
        write_degraded(encoder, tmp_path / "train", given, folders[name], modality="image", fraction=0.25, name=name)
    options: dict[str, Any] = {"epochs": 7, "batch_size": 4, "lr": 1e-3, "val_group_size": 4}
    last = {name: losses(encoder, folder, tmp_path / "val", **options)[-1] for name, folder in folders.items()}
    assert last["original"] < last["background"] < last["object"], last
    assert last["background"] < 0.75 * math.log(4)  # a guess among four costs log(4)
    assert last["object"] > 0.9 * math.log(4)  # nothing of the color is left to learn from
