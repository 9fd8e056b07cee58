from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import join_lightning, run_distributed
from lightning.pytorch.loggers import CSVLogger
from linear_towers import LinearTowers, eight_pairs
from small_hugging_face import save_small
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from training_runs import Recorder, batches_of, loader_of, records_of, trainer_in

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.data import Batch, Manifest
from lightning_xai.data.batch import TrainingCollate
from lightning_xai.exclusion import Exclusion
from lightning_xai.loss import global_contrastive_loss
from lightning_xai.metrics.grounding import gamma, measurable, patch_mask
from lightning_xai.models import load_dual_encoder
from lightning_xai.training import ContrastiveFineTuning
from lightning_xai.training.objectives import (
    Grounding,
    NegativeTexts,
    Sigmoid,
    Softmax,
    hard_negative_loss,
    sigmoid_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

_MASKS = [[True] * 8, [True, False, True, True, False, True, True, True], [True] * 4 + [False] * 4, [False] * 8]


def literal_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, valid: Tensor) -> Tensor:
    """Eq. 1 of the paper, one pair at a time."""
    rows = [row for row in range(len(valid)) if valid[row]]
    total = (0 * (scale * (image.sum() + text.sum()) + bias)).sum()
    for i in rows:
        for j in rows:
            logit = scale * image[i] @ text[j] + bias.squeeze()
            total = total - torch.log(1 / (1 + torch.exp(-(1 if i == j else -1) * logit)))
    return total / max(len(rows), 1)


def gradients_on_own_share(masks: list[list[bool]]) -> list[dict[str, Tensor]]:
    """One forward and backward pass under DDP for each mask; each rank sees its share of the batch only."""
    found = []
    for mask in masks:
        rank, world = dist.get_rank(), dist.get_world_size()
        images, texts = (tensor.chunk(world)[rank] for tensor in eight_pairs())
        model = DistributedDataParallel(LinearTowers())
        image, text, scale, bias = model(images, texts)
        loss, accuracy = sigmoid_loss(image, text, scale, bias, torch.tensor(mask).chunk(world)[rank])
        torch.autograd.backward(loss)
        gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), "accuracy": accuracy, **gradients})
    return found


def literal_gradients(mask: list[bool]) -> dict[str, Tensor]:
    model = LinearTowers()
    image, text, scale, bias = model(*eight_pairs())
    loss = literal_sigmoid(image, text, scale, bias, torch.tensor(mask))
    torch.autograd.backward(loss)
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("mask", _MASKS)
def test_the_sigmoid_loss_and_its_gradients_are_those_of_a_loop_over_pairs(mask: list[bool]) -> None:
    model = LinearTowers()
    image, text, scale, bias = model(*eight_pairs())
    loss, _ = sigmoid_loss(image, text, scale, bias, torch.tensor(mask))
    torch.autograd.backward(loss)
    expected = literal_gradients(mask)
    torch.testing.assert_close(loss.detach(), expected.pop("loss"), rtol=0, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=0, atol=1e-12)


def test_the_sigmoid_loss_is_that_of_open_clip() -> None:
    from open_clip.loss import SigLipLoss  # here, so that the processes started below do not import it

    image, text, scale, bias = LinearTowers()(*eight_pairs())
    loss, _ = sigmoid_loss(image, text, scale, bias, torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(loss, SigLipLoss()(image, text, scale, bias))


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_sigmoid_loss_and_the_gradients_of_one(world: int) -> None:
    for ranks, mask in zip(
        zip(*run_distributed(gradients_on_own_share, _MASKS, world_size=world), strict=True), _MASKS, strict=True
    ):
        for rank in ranks:
            for name, value in literal_gradients(mask).items():
                torch.testing.assert_close(rank[name], value, rtol=0, atol=1e-12, msg=name)


def kept_bytes(loss: Callable[[], tuple[Tensor, Tensor]]) -> int:
    """Bytes that a loss keeps for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value, _ = loss()
    assert value.requires_grad
    return sum(kept.values())


def test_the_sigmoid_loss_keeps_no_more_memory_than_the_softmax() -> None:
    generator, valid = torch.Generator().manual_seed(0), torch.ones(256, dtype=torch.bool)
    image, text = (normalize(torch.randn(256, 8, generator=generator), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    softmax = kept_bytes(lambda: global_contrastive_loss(image, text, scale, valid))
    assert kept_bytes(lambda: sigmoid_loss(image, text, scale, bias, valid)) < 0.75 * softmax


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_invalid_rows_hold_reaches_neither_sigmoid_loss_nor_gradient(junk: float) -> None:
    valid = torch.tensor([True, False, True])
    model = LinearTowers()
    image, text, scale, bias = model(*(tensor[:3] for tensor in eight_pairs()))
    loss, accuracy = sigmoid_loss(
        image.masked_fill(~valid[:, None], junk), text.masked_fill(~valid[:, None], junk), scale, bias, valid
    )
    torch.testing.assert_close(loss, literal_sigmoid(image, text, scale, bias, valid))
    torch.autograd.backward(loss)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert 0 <= accuracy <= 1


# Hard negatives of eight images, uneven over two and over four processes; the fourth image is not valid in two masks.
_WRONG = [[2, 0, 1, 2, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 2, 2], [0] * 8]


def wrong_captions(counts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [8, 2, 5] of wrong captions, which of them there are, and numbers of the words of all captions.

    The second wrong caption of the last image has the words of the first image's caption.
    """
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(8, 2, 5, generator=generator, dtype=torch.float64)
    known = torch.arange(2) < torch.tensor(counts)[:, None]
    words = torch.arange(100, 116).reshape(8, 2)
    words[7, 1] = 0
    return inputs, known, words, torch.arange(8)


def literal_hard_negative(
    image: Tensor, text: Tensor, wrong: Tensor, scale: Tensor, valid: list[bool], counts: list[int], margin: float
) -> Tensor:
    """The formula of `hard_negative_loss`, one image and one caption at a time."""
    rows = [row for row in range(len(valid)) if valid[row]]
    _, _, words, own = wrong_captions(counts)
    total = 0 * (image.sum() + text.sum() + wrong.sum() + scale)
    for i in rows:
        others = [torch.exp(scale * image[i] @ text[j]) for j in rows]
        negatives = [wrong[j, n] for j in rows for n in range(counts[j]) if words[j, n] != own[i]]
        others += [torch.exp(scale * (image[i] @ negative + margin)) for negative in negatives]
        total = total - torch.log(torch.exp(scale * image[i] @ text[i]) / sum(others)) / 2
        backwards = [torch.exp(scale * text[i] @ image[j]) for j in rows]
        total = total - torch.log(torch.exp(scale * text[i] @ image[i]) / sum(backwards)) / 2
    return total / max(len(rows), 1)


def hard_negative_case(mask: list[bool], counts: list[int], margin: float, spread: bool) -> dict[str, Tensor]:
    """Loss, numbers and gradients of this rank's share; what is not valid, or no negative, is NaN."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    images, texts, inputs, known, words, own, valid = (
        tensor.chunk(world)[rank] for tensor in (*eight_pairs(), *wrong_captions(counts), torch.tensor(mask))
    )
    model: Any = DistributedDataParallel(LinearTowers()) if spread else LinearTowers()
    image, text, scale, _ = model(images, torch.cat([texts, inputs[known]]))
    features = torch.full((*known.shape, 4), math.nan, dtype=torch.float64)
    features[known] = text[len(texts) :]
    invalid = ~valid[:, None]
    wrong = NegativeTexts(features.masked_fill(invalid[..., None], math.nan), known, words, own)
    embedded = image.masked_fill(invalid, math.nan), text[: len(texts)].masked_fill(invalid, math.nan)
    loss, numbers = hard_negative_loss(*embedded, wrong, scale, valid, margin)
    torch.autograd.backward(loss)
    module = model.module if spread else model
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **numbers, **gradients}


def hard_negative_cases() -> list[dict[str, Tensor]]:
    return [hard_negative_case(*case, spread=True) for case in itertools.product(_MASKS, _WRONG, (0.0, 0.3))]


def literal_hard_negative_case(mask: list[bool], counts: list[int], margin: float) -> dict[str, Tensor]:
    model = LinearTowers()
    image, text, scale, _ = model(*eight_pairs())
    _, wrong, _, _ = model(eight_pairs()[0], wrong_captions(counts)[0].flatten(0, 1))
    loss = literal_hard_negative(image, text, wrong.reshape(8, 2, 4), scale, mask, counts, margin)
    torch.autograd.backward(loss)
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("counts", _WRONG)
@pytest.mark.parametrize("mask", _MASKS)
def test_the_hard_negative_loss_and_its_gradients_are_those_of_a_loop(
    mask: list[bool], counts: list[int], margin: float
) -> None:
    found = hard_negative_case(mask, counts, margin, spread=False)
    for name, value in literal_hard_negative_case(mask, counts, margin).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_hard_negative_loss_and_the_gradients_of_one(world: int) -> None:
    ranks = run_distributed(hard_negative_cases, world_size=world)
    for number, case in enumerate(itertools.product(_MASKS, _WRONG, (0.0, 0.3))):
        expected = hard_negative_case(*case, spread=False) | literal_hard_negative_case(*case)
        for rank in ranks:
            for name, value in expected.items():
                torch.testing.assert_close(
                    rank[number][name], value, rtol=1e-12, atol=1e-12, equal_nan=True, msg=f"{name} of case {case}"
                )


def test_without_hard_negatives_the_loss_is_the_contrastive_one_and_with_them_more_is_counted() -> None:
    model, valid = LinearTowers(), torch.tensor(_MASKS[1])
    image, text, scale, _ = model(*eight_pairs())
    plain, accuracy = global_contrastive_loss(image, text, scale, valid)
    found = hard_negative_case(_MASKS[1], _WRONG[2], 0.3, spread=False)
    torch.testing.assert_close(found["loss"], plain.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["accuracy"], accuracy, rtol=1e-12, atol=1e-12)
    assert found["negatives"] == 0
    assert found["negatives_accuracy"].isnan()
    # Of images 0, 2, 3 and 6 with some, image 1 and image 5 not being valid.
    inputs = wrong_captions(_WRONG[0])[0]
    with torch.no_grad():
        _, wrong, _, _ = model(eight_pairs()[0], inputs.flatten(0, 1))
    wins = [
        all(image[i] @ text[i] > image[i] @ wrong.reshape(8, 2, 4)[i, n] for n in range(_WRONG[0][i]))
        for i in (0, 2, 3, 6)
    ]
    found = hard_negative_case(_MASKS[1], _WRONG[0], 0.3, spread=False)
    assert found["negatives"] == 6
    assert found["negatives_accuracy"] == sum(wins) / 4
    assert 0 < sum(wins) < 4


@pytest.fixture
def make(architecture_file: Callable[[str], Path]) -> Callable[..., ContrastiveFineTuning]:
    """A task with a small random model, the same one each time."""

    def build(**options: Any) -> ContrastiveFineTuning:
        torch.manual_seed(0)
        return ContrastiveFineTuning(str(architecture_file("vit")), None, **options)

    return build


def test_the_loss_of_a_step_is_the_weighted_sum_of_its_terms(
    make: Callable[..., ContrastiveFineTuning], shapes: Path, tmp_path: Path
) -> None:
    task, recorder = make(objectives=[Softmax(weight=0.5), Sigmoid(weight=0.25)]), Recorder()
    trainer_in(tmp_path, recorder).fit(task, loader_of([*batches_of(task, shapes / "train", 1, 8)]))
    logged = recorder.logged[0]
    expected = 0.5 * logged["train/softmax"] + 0.25 * logged["train/sigmoid"]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert logged["train/logit_bias"] == -10
    assert recorder.gradients[0].keys() == {name for name, _ in task.named_parameters()}, "the bias trains, too"


def test_a_model_without_a_bias_gets_one_that_its_checkpoint_keeps(
    make: Callable[..., ContrastiveFineTuning], shapes: Path, tmp_path: Path
) -> None:
    task = make(objectives=[Sigmoid(initial_bias=-8.0, initial_scale=20.0)])
    assert task.encoder.logit_scale.item() == pytest.approx(math.log(20))
    trainer = trainer_in(tmp_path)
    trainer.fit(task, loader_of([*batches_of(task, shapes / "train", 2, 8)]))
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    loaded: Any = load_dual_encoder(str(tmp_path / "trained.ckpt"), None)
    assert torch.equal(loaded.model.logit_bias, task.encoder.model.logit_bias)
    assert task.encoder.model.logit_bias.item() != -8
    kept = ContrastiveFineTuning(str(tmp_path / "trained.ckpt"), None, objectives=[Sigmoid()])
    assert torch.equal(kept.encoder.model.logit_bias, loaded.model.logit_bias), "one that has a bias keeps it"
    assert torch.equal(kept.encoder.logit_scale, loaded.logit_scale)


def test_objectives_that_cannot_be_trained_are_refused_before_training(
    make: Callable[..., ContrastiveFineTuning], tmp_path: Path
) -> None:
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight of the objective softmax has to be positive"):
            Softmax(weight=weight)
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="initial_scale positive"):
            Sigmoid(initial_scale=scale)
    folder = save_small("CLIPModel", tmp_path / "clip")
    with pytest.raises(ValueError, match="has no logit_bias, which the objective sigmoid trains"):
        ContrastiveFineTuning(f"hf:{folder}", None, objectives=[Sigmoid()])
    for objectives in ([], [Softmax(), Softmax(weight=2.0)]):
        with pytest.raises(ValueError, match="at least one objective, and each once"):
            make(objectives=objectives)
    with pytest.raises(ValueError, match=r"objectives are objects, such as \[Softmax\(\), .*; got 'Softmax'"):
        make(objectives=["Softmax"])


# --- grounding ---


def training_batch(task: ContrastiveFineTuning, shapes: Path, size: int) -> Batch:
    """A batch as the data module makes it for objectives with targets."""
    labels = Manifest.load(shapes / "train").labels
    collate = TrainingCollate(
        task.encoder.image_transform, task.encoder.tokenizer, label_names=labels, needs=task.batch_needs
    )
    return collate(records_of(shapes / "train", size))


def measured_gammas(task: ContrastiveFineTuning, batch: Batch, **options: Any) -> Tensor:
    """Gamma of each measurable phrase by `FeaturePairAttribution`."""
    phrases, size = batch.phrases, task.encoder.image_shape[1:]
    method = FeaturePairAttribution(task.encoder, rule="midpoint", **options)
    reason = measurable(phrases.reason, phrases.boxes, method.grid, size)
    rows = (reason == int(Exclusion.MEASURED)).nonzero()[:, 0]
    maps = method.span_map(
        batch.images[phrases.image_row[rows]], batch.tokens[phrases.caption_row[rows]], phrases.span_mask[rows]
    )
    return gamma(maps, patch_mask(phrases.boxes[rows], method.grid, size))


@pytest.mark.parametrize("layers", [(-1, -1), (0, 0), (1, 0)])
def test_the_grounding_term_and_its_gradient_are_those_of_measured_gamma(
    make: Callable[..., ContrastiveFineTuning], shapes: Path, tmp_path: Path, layers: tuple[int, int]
) -> None:
    """The gradient against finite differences of gamma, in float64, along a random direction of all weights."""
    at: dict[str, Any] = {"image_layer": layers[0], "text_layer": layers[1], "steps": 2}
    task = make(objectives=[Grounding(weight=2.0, **at)])
    task.double()
    batch = training_batch(task, shapes, 4)
    batch = replace(batch, images=batch.images.double())
    recorder = Recorder()
    copy = {name: value.clone() for name, value in task.state_dict().items()}
    expected = measured_gammas(task, batch, **at)
    trainer_in(tmp_path, recorder, precision="64-true").fit(task, loader_of([batch]))
    logged = recorder.logged[0]
    assert logged["train/grounding_phrases"] == expected.isfinite().sum() > 3
    assert logged["train/grounding_without_positive"] == expected.isnan().sum()
    assert logged["train/grounding_gamma"] == pytest.approx(float(expected.nanmean()), rel=1e-6)
    assert logged["train/loss"] == pytest.approx(2 * float(-expected.clamp(min=1e-3).log().nanmean()), rel=1e-6)
    generator, slope = torch.Generator().manual_seed(0), 0.0
    ends = []
    directions = {
        name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in recorder.gradients[0].items()
    }
    for sign in (1, -1):
        with torch.no_grad():
            task.load_state_dict(copy)
            for name, parameter in task.named_parameters():
                if name in directions:
                    parameter.add_(sign * 1e-6 * directions[name])
        ends.append(-measured_gammas(task, batch, **at).clamp(min=1e-3).log().nanmean())
    slope = float((ends[0] - ends[1]) / 2e-6)
    analytic = sum(float((g * directions[name]).sum()) for name, g in recorder.gradients[0].items()) / 2
    assert analytic == pytest.approx(slope, rel=1e-4)
    unused = {"encoder.model.logit_scale"}
    assert {name for name, _ in task.named_parameters()} - recorder.gradients[0].keys() <= unused


def test_two_grounding_terms_at_different_layers_are_added_and_logged_by_their_names(
    make: Callable[..., ContrastiveFineTuning], shapes: Path, tmp_path: Path
) -> None:
    at_inputs: dict[str, Any] = {"name": "grounding_inputs", "image_layer": 0, "text_layer": 0}
    lists = ([Grounding()], [Grounding(**at_inputs)], [Grounding(weight=0.5), Grounding(weight=2.0, **at_inputs)])
    logged, gradients = [], []
    for number, objectives in enumerate(lists):
        task, recorder = make(objectives=objectives), Recorder()
        trainer_in(tmp_path / str(number), recorder).fit(task, loader_of([training_batch(task, shapes, 4)]))
        logged.append(recorder.logged[0])
        gradients.append(recorder.gradients[0])
    last, inputs, both = logged
    for name in ("", "_gamma", "_phrases"):
        assert both[f"train/grounding{name}"] == pytest.approx(last[f"train/grounding{name}"], rel=1e-5)
        assert both[f"train/grounding_inputs{name}"] == pytest.approx(inputs[f"train/grounding_inputs{name}"], rel=1e-5)
    assert last["train/grounding"] != pytest.approx(inputs["train/grounding_inputs"], rel=1e-2)
    # Alone they have the weight 0.3.
    for name, gradient in gradients[2].items():
        expected = 0.5 / 0.3 * gradients[0][name] + 2.0 / 0.3 * gradients[1][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="a second Grounding takes another name"):
        make(objectives=[Grounding(), Grounding(image_layer=0)])


@pytest.mark.parametrize("name", ["loss", "accuracy", "learning_rate", "inputs", "", "grounding_", "grounding_gamma"])
def test_a_name_under_which_something_else_is_logged_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name is grounding, or grounding_ and a word .*, such as grounding_inputs"):
        Grounding(name=name)


def test_a_plain_trainer_logs_no_gamma_where_no_phrase_was_measured(
    make: Callable[..., ContrastiveFineTuning], shapes: Path, tmp_path: Path
) -> None:
    task, logger = make(objectives=[Softmax(), Grounding()]), CSVLogger(tmp_path, name="", version="")
    batch = training_batch(task, shapes, 4)
    bare = replace(batch, phrases=batch.phrases.only(torch.tensor([], dtype=torch.int64)))
    trainer_in(tmp_path, logger=logger).fit(task, loader_of([bare]))
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "train/grounding_gamma" not in header
    assert dict(zip(header.split(","), row.split(","), strict=True))["train/grounding_phrases"] == "0.0"


def gradients_of_share(config: str, shapes: str, out: str, spread: bool) -> dict[str, Tensor]:
    """A training step of all objectives in float64: on this rank's share of eight images, or on all of them."""
    torch.manual_seed(0)
    task = ContrastiveFineTuning(config, None, objectives=[Softmax(), Sigmoid(), Grounding()]).double()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    labels = Manifest.load(Path(shapes, "train")).labels
    collate = TrainingCollate(
        task.encoder.image_transform, task.encoder.tokenizer, label_names=labels, needs=task.batch_needs
    )
    records, share = records_of(Path(shapes, "train"), 8), 8 // world
    batch = collate(records[rank * share : (rank + 1) * share])
    recorder, processes = Recorder(), join_lightning() if spread else {}
    trainer = trainer_in(Path(out), recorder, precision="64-true", **processes)
    trainer.fit(task, loader_of([replace(batch, images=batch.images.double())]))
    return recorder.gradients[0] | {name: torch.tensor(value) for name, value in recorder.logged[0].items()}


@pytest.mark.distributed
def test_two_processes_have_the_gradients_of_one_for_all_objectives_together(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(shapes), str(tmp_path))
    expected = gradients_of_share(*where, spread=False)
    assert expected["train/grounding_phrases"] > 3
    for rank in run_distributed(gradients_of_share, *where, True):
        for name, value in expected.items():
            if name != "train/samples_per_second":
                torch.testing.assert_close(rank[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"gradient_checkpointing": True}])
def test_saving_memory_changes_no_gradient_of_the_grounding_term(
    make: Callable[..., ContrastiveFineTuning], shapes: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    found = []
    for number, chosen in enumerate(({}, options)):
        task, recorder = make(objectives=[Softmax(), Grounding()], **chosen), Recorder()
        batch = training_batch(task, shapes, 8)
        trainer_in(tmp_path / str(number), recorder).fit(task, loader_of([batch]))
        found.append((recorder.logged[0], recorder.gradients[0]))
    (plain, gradients), (saving, others) = found
    assert saving["train/grounding"] == pytest.approx(plain["train/grounding"], rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_without_phrases_has_a_grounding_term_of_zero(
    make: Callable[..., ContrastiveFineTuning], shapes: Path, tmp_path: Path
) -> None:
    task, recorder = make(objectives=[Grounding()]), Recorder()
    with pytest.warns(
        UserWarning, match="none of the first 1 training batches has a phrase, so that the objective gro"
    ):
        trainer_in(tmp_path, recorder).fit(task, loader_of([*batches_of(task, shapes / "train", 1, 8)]))
    assert recorder.logged[0]["train/grounding"] == 0
    assert recorder.logged[0]["train/grounding_phrases"] == 0
    assert not any(gradient.any() for gradient in recorder.gradients[0].values())
