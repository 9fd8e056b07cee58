from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import join_lightning, run_distributed
from linear_towers import LinearTowers
from small_hugging_face import save_clip
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from training_runs import Recorder, loader_of, records_of, task_of, trainer_in

from lightning_xai.data import Batch, Manifest, ShardDataModule
from lightning_xai.data.batch import TrainingCollate
from lightning_xai.exclusion import Exclusion
from lightning_xai.loss import rank_and_world
from lightning_xai.metrics.grounding import measurable, patch_mask
from lightning_xai.models import DualEncoder
from lightning_xai.models.loading import load_dual_encoder
from lightning_xai.training import ContrastiveFineTuning
from lightning_xai.training.objectives import (
    Objective,
    PhrasePatch,
    PhraseRegion,
    Softmax,
    phrase_patch,
    phrase_patch_loss,
    phrase_region_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

# (image, text) of each phrase of eight images: of several on an image, of equal texts, of ranks without any.
_PHRASES = [
    [(0, 1), (0, 2), (0, 1), (3, 2), (5, 0), (7, 1), (7, 3)],
    [(1, 0), (1, 3), (6, 0)],
    [(4, 2), (5, 2)],
    [],
]
_VALID = torch.tensor([True, True, False, True, True, True, True, True])
_NAMES = ("region", "patch")


class PatchTowers(LinearTowers):
    """Towers whose images are many patches, of any length."""

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.project(images, texts), self.log_scale.exp(), self.bias


def world_of(phrases: list[tuple[int, int]], ranks: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [B, P, 6], texts [R, 5], and image row and number of each text, of some of the eight images."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 3, 6, generator=generator, dtype=torch.float64)
    texts = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    own = [(image - ranks.start, text) for image, text in phrases if ranks.start <= image < ranks.stop]
    rows, numbers = torch.tensor(own, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return images[ranks], texts[numbers], rows, numbers


def literal_region(model: nn.Module, phrases: list[tuple[int, int]]) -> Tensor:
    """The formula of `phrase_region_loss`, one phrase at a time."""
    images, texts, rows, numbers = world_of(phrases, slice(0, 8))
    patches, said, scale, bias = model(images, texts)
    region, phrase = normalize(patches[rows].mean(dim=1), dim=1), normalize(said, dim=1)
    total = 0 * (patches.sum() + said.sum() + scale + bias.sum())
    for r in range(len(rows)):
        negatives = [j for j in range(len(rows)) if numbers[j] != numbers[r]]
        right = torch.exp(scale * region[r] @ phrase[r])
        total = total - torch.log(right / (right + sum(torch.exp(scale * region[r] @ phrase[j]) for j in negatives)))
        total = total - torch.log(right / (right + sum(torch.exp(scale * region[j] @ phrase[r]) for j in negatives)))
    mean: Tensor = total / (2 * max(len(rows), 1))
    return mean


def literal_patch(model: nn.Module, phrases: list[tuple[int, int]]) -> Tensor:
    """The formula of `phrase_patch_loss`, one image and one query at a time."""
    images, texts, *_ = world_of(phrases, slice(0, 8))
    patches, said, scale, bias = model(images, texts)
    total = 0 * (patches[_VALID].sum() + said.sum() + scale + bias.sum())
    for image in _VALID.nonzero()[:, 0].tolist():
        for query, (own, number) in enumerate(phrases):
            if image != own and (image, number) in phrases:
                continue
            cosines = [patch @ said[query] / patch.norm() / said[query].norm() for patch in patches[image]]
            shares = [torch.exp(10 * c) / sum(torch.exp(10 * other) for other in cosines) for c in cosines]
            logit = scale * sum(share * c for share, c in zip(shares, cosines, strict=True)) + bias.squeeze()
            total = total - torch.log(1 / (1 + torch.exp(-logit if image == own else logit)))
    mean: Tensor = total / max(len(phrases), 1)
    return mean


def literal_gradients(phrases: list[tuple[int, int]], name: str) -> dict[str, Tensor]:
    model = PatchTowers()
    loss = (literal_region if name == "region" else literal_patch)(model, phrases)
    torch.autograd.backward(loss)
    return {"loss": loss.detach(), **gradients_of(model)}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradients_on_own_share(cases: list[list[tuple[int, int]]]) -> list[dict[str, dict[str, Tensor]]]:
    """A forward and a backward pass of both losses; each rank sees its share of the images, with their phrases."""
    rank, world = rank_and_world()
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = []
    for phrases in cases:
        images, texts, rows, numbers = world_of(phrases, share)
        results = {}
        for name in _NAMES:
            model: Any = PatchTowers() if world == 1 else DistributedDataParallel(PatchTowers())
            patches, said, scale, bias = model(images, texts)
            if name == "region":
                regions = patches[rows].mean(dim=1) + 0 * patches.sum()
                loss, accuracy, count = phrase_region_loss(regions, said, numbers[:, None], scale)
            else:
                valid = _VALID[share]
                loss, accuracy, count = phrase_patch_loss(
                    patches + 0 * said.sum(), said, rows, numbers[:, None], scale, bias, valid
                )
            torch.autograd.backward(loss)
            numbers_of = {"loss": loss.detach(), "accuracy": accuracy, "count": count}
            results[name] = numbers_of | gradients_of(getattr(model, "module", model))
        found.append(results)
    return found


def assert_literal(results: list[dict[str, dict[str, Tensor]]]) -> None:
    for phrases, found in zip(_PHRASES, results, strict=True):
        for name in _NAMES:
            assert found[name]["count"] == len(phrases)
            assert 0 <= found[name]["accuracy"] <= 1 if phrases else found[name]["accuracy"].isnan()
            for part, value in literal_gradients(phrases, name).items():
                torch.testing.assert_close(found[name][part], value, rtol=0, atol=1e-12, msg=f"{name} {part} {phrases}")


def test_the_losses_of_regions_and_patches_are_those_of_loops_over_phrases() -> None:
    assert_literal(gradients_on_own_share(_PHRASES))


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_with_uneven_numbers_of_phrases_have_the_gradients_of_one(world: int) -> None:
    for results in run_distributed(gradients_on_own_share, _PHRASES, world_size=world):
        assert_literal(results)


def test_queries_that_are_compared_in_parts_have_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrase_patch, "_SIMILARITIES", 2 * 8 * 3)  # two queries at a time
    assert_literal(gradients_on_own_share(_PHRASES))


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_invalid_rows_hold_reaches_neither_the_loss_of_patches_nor_its_gradient(junk: float) -> None:
    images, texts, rows, numbers = world_of(_PHRASES[0], slice(0, 8))
    model = PatchTowers()
    patches, said, scale, bias = model(images, texts)
    patches = patches.masked_fill(~_VALID[:, None, None], junk)
    loss, _, _ = phrase_patch_loss(patches, said, rows, numbers[:, None], scale, bias, _VALID)
    torch.autograd.backward(loss)
    expected = literal_gradients(_PHRASES[0], "patch")
    torch.testing.assert_close(loss.detach(), expected.pop("loss"))
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


# --- within a training step ---


def collate_for(task: ContrastiveFineTuning, shards: Path) -> TrainingCollate:
    labels, encoder = Manifest.load(shards).labels, task.encoder
    return TrainingCollate(encoder.image_transform, encoder.tokenizer, label_names=labels, needs=task.batch_needs)


def training_batch(task: ContrastiveFineTuning, shards: Path, size: int) -> Batch:
    """A batch as the data module makes it for these objectives."""
    return collate_for(task, shards)(records_of(shards, size))


def step_of(folder: Path, task: ContrastiveFineTuning, batch: Batch, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer_in(folder, recorder, **options).fit(task, loader_of([batch]))
    return recorder


@torch.no_grad()
def open_clip_patches(encoder: DualEncoder, images: Tensor) -> Tensor:
    """Patch embeddings [B, P, K] of what open_clip itself calls tokens, those after the final norm."""
    visual: Any = encoder.model.visual
    visual.output_tokens = True
    tokens: Tensor = visual(images)[1]
    visual.output_tokens = False
    patches: Tensor = tokens @ visual.proj
    return patches


def test_the_terms_are_those_of_the_models_own_patches_and_of_phrases_as_captions(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    task = task_of(architecture_file("vit"), objectives=[Softmax(), PhraseRegion(), PhrasePatch()])
    batch, encoder = training_batch(task, shapes / "train", 8), task.encoder
    phrases, scale = batch.phrases, encoder.logit_scale.exp().detach()
    reason = measurable(phrases.reason, phrases.boxes, (4, 4), (32, 32))
    rows = (reason == int(Exclusion.MEASURED)).nonzero()[:, 0]
    named = [row for row, text in enumerate(phrases.text) if text and phrases.reason[row] != Exclusion.OUTSIDE_CROP]
    patches = open_clip_patches(encoder, batch.images)
    masks = patch_mask(phrases.boxes[rows], (4, 4), (32, 32)).flatten(1)
    regions = torch.stack(
        [patches[image][mask].mean(dim=0) for image, mask in zip(phrases.image_row[rows], masks, strict=True)]
    )
    tokens = encoder.tokenizer.encode([phrases.text[row] for row in named])
    said = torch.zeros(len(phrases), encoder.embedding_width)
    said[named] = encoder.encode_text(tokens).detach()
    assert phrases.tokens is not None
    assert torch.equal(phrases.tokens[named], tokens)
    region, right, _ = phrase_region_loss(regions, said[rows], phrases.tokens[rows], scale)
    patch, _, _ = phrase_patch_loss(
        patches, said[named], phrases.image_row[named], tokens, scale, torch.tensor(-10.0), batch.valid
    )
    logged = step_of(tmp_path, task, batch).logged[0]
    assert logged["train/phrase_region"] == pytest.approx(float(region), rel=1e-5)
    assert logged["train/phrase_region_accuracy"] == pytest.approx(float(right))
    assert logged["train/phrase_region_phrases"] == len(rows) > 3
    assert logged["train/phrase_region_excluded"] == len(named) - len(rows) > 0
    assert logged["train/phrase_patch"] == pytest.approx(float(patch), rel=1e-5)
    assert (logged["train/phrase_patch_phrases"], logged["train/phrase_patch_captions"]) == (len(named), 0)


def gradients_of_share(config: str, shapes: str, out: str) -> dict[str, Tensor]:
    """A training step in float64 on this rank's share of eight images."""
    task = task_of(config, objectives=[Softmax(), PhraseRegion(), PhrasePatch()]).double()
    rank, world = rank_and_world()
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    batch = collate_for(task, Path(shapes))(records_of(Path(shapes), 8)[share])
    batch = replace(batch, images=batch.images.double())
    processes = join_lightning() if dist.is_initialized() else {}
    recorder = step_of(Path(out), task, batch, precision="64-true", **processes)
    return recorder.gradients[0] | {name: torch.tensor(value) for name, value in recorder.logged[0].items()}


@pytest.mark.distributed
def test_a_step_on_two_processes_has_the_gradients_of_one(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(shapes / "train"), str(tmp_path))
    expected = gradients_of_share(*where)
    for rank in run_distributed(gradients_of_share, *where):
        for name in expected.keys() - {"train/samples_per_second"}:
            torch.testing.assert_close(rank[name], expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 3}, {"gradient_checkpointing": True}, {"chunk_size": 3, "gradient_checkpointing": True}]
)
def test_saving_memory_changes_no_gradient(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    found = []
    for number, chosen in enumerate(({}, options)):
        task = task_of(architecture_file("vit"), objectives=[PhraseRegion(), PhrasePatch()], **chosen)
        found.append(step_of(tmp_path / str(number), task, training_batch(task, shapes / "train", 8)))
    plain, saving = found
    assert saving.logged[0]["train/loss"] == pytest.approx(plain.logged[0]["train/loss"], rel=1e-5)
    for name, gradient in plain.gradients[0].items():
        torch.testing.assert_close(saving.gradients[0][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_half_precision_gives_nearly_the_same_terms(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        task = task_of(architecture_file("vit"), objectives=[PhraseRegion(), PhrasePatch()])
        batch = training_batch(task, shapes / "train", 8)
        recorder = step_of(tmp_path / precision, task, batch, precision=precision)
        assert all(gradient.isfinite().all() for gradient in recorder.gradients[0].values())
        found.append(recorder.logged[0]["train/loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=2e-2)


@pytest.mark.parametrize("objective", [PhraseRegion, PhrasePatch])
def test_batches_without_phrases_or_without_valid_rows_still_have_a_graph(
    architecture_file: Callable[[str], Path],
    shapes: Path,
    tmp_path: Path,
    objective: type[Objective],
) -> None:
    task = task_of(architecture_file("vit"), objectives=[objective()])
    collate = collate_for(task, shapes / "train")
    samples: list[Any] = [sample for _, sample in records_of(shapes / "train", 8)]
    batch = collate([(row, replace(sample, regions=(), negatives=())) for row, sample in enumerate(samples)])
    empty = collate([(-1, None)] * 8)
    for number, (given, queries) in enumerate(((batch, 8), (empty, 0))):
        recorder = step_of(tmp_path / str(number), task, given)
        logged, name = recorder.logged[0], objective.name
        assert logged[f"train/{name}_phrases"] == 0
        if objective is PhrasePatch:
            assert logged["train/phrase_patch_captions"] == queries
        learns = objective is PhrasePatch and queries > 0
        assert (logged["train/loss"] > 0) == learns
        assert recorder.gradients[0].keys() == {name for name, _ in task.named_parameters()}
        assert any(gradient.any() for gradient in recorder.gradients[0].values()) == learns


def test_the_data_module_tokenises_phrases_only_for_objectives_that_ask(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    for objective, asked in ((Softmax(), False), (PhraseRegion(), True)):
        recorder = Recorder()
        data = ShardDataModule(train=shapes / "train", batch_size=8, num_workers=0)
        task = task_of(architecture_file("vit"), objectives=[Softmax(weight=0.5), objective] if asked else [objective])
        trainer_in(tmp_path / objective.name, recorder, max_steps=1).fit(task, data)
        assert ("train/phrase_region" in recorder.logged[0]) == asked
        batch = next(iter(data.train_dataloader()))
        assert (batch.phrases.tokens is not None) == asked


# --- towers ---


def patches_of(encoder: DualEncoder, images: Tensor) -> Tensor:
    """The patches as the objectives embed them."""
    objective = PhraseRegion()
    objective.prepare(encoder)
    with torch.no_grad():
        with objective.listening():
            encoder(images, encoder.tokenizer.encode(["a dog"] * len(images)))
        return objective._patches(encoder)


def test_patches_of_transformers_are_those_of_open_clip(
    make_encoder: Callable[..., DualEncoder], tmp_path: Path
) -> None:
    own = make_encoder()
    other = load_dual_encoder(f"hf:{save_clip(own, tmp_path / 'clip')}", None).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = open_clip_patches(own, images)
    torch.testing.assert_close(patches_of(own, images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches_of(other, images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["vit_average_pool", "vit_custom_block", "vit_layer_scale_quick_gelu"])
def test_other_vits_embed_one_vector_for_each_patch(
    make_encoder: Callable[..., DualEncoder], architecture: str
) -> None:
    encoder = make_encoder(architecture)
    assert patches_of(encoder, torch.zeros(2, 3, 32, 32)).shape == (2, 4, 24)


def test_towers_and_options_that_do_not_suit_are_refused_before_training(
    architecture_file: Callable[[str], Path],
) -> None:
    for objective in (PhraseRegion(), PhrasePatch()):
        with pytest.raises(ValueError, match=r"passes on feature maps.*take a ViT"):
            task_of(architecture_file("resnet"), objectives=[objective])
    for options in ({"sharpness": 0.0}, {"bias": math.nan}):
        with pytest.raises(ValueError, match="bias has to be finite, sharpness positive"):
            PhrasePatch(**options)
    task = task_of(architecture_file("vit"))
    task.encoder.model.visual.patch_dropout = type("PatchDropout", (nn.Identity,), {"prob": 0.5})()
    with pytest.raises(ValueError, match=r"leaves patches out in training \(model.visual.patch_dropout\)"):
        PhraseRegion().prepare(task.encoder)
