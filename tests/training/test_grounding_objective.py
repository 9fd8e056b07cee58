"""The objective `Grounding`: its gradient through every kind of tower, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TEXT, encoder_from
from distributed import join_lightning, run_distributed
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training_runs import Recorder, loader_of, records_of, trainer_in

from lightning_xai.attribution.reference import reference_image
from lightning_xai.data import Batch, Manifest
from lightning_xai.data.batch import TrainingCollate
from lightning_xai.data.needs import BatchNeeds
from lightning_xai.data.phrases import Phrases
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import measurable, patch_mask
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.at_layer import differentiable
from lightning_xai.training import ContrastiveFineTuning, Lora
from lightning_xai.training.contrastive import ContrastiveModule
from lightning_xai.training.objectives import Grounding, Objective, Sigmoid, Softmax, Step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch")

CAPTIONS = ["two red rings and a blue square", "a dog"]


def hand_made(encoder: DualEncoder, spans: list[tuple[int, list[int]]]) -> Batch:
    """Two random images with captions, and a phrase for each (row, tokens), whose box is the left half of its image."""
    dtype, rows = encoder.logit_scale.dtype, len(CAPTIONS)
    channels, height, width = encoder.image_shape
    images = torch.randn(rows, channels, height, width, generator=torch.Generator().manual_seed(3), dtype=dtype)
    tokens = encoder.trim_tokens(encoder.tokenizer.encode(CAPTIONS))
    row = torch.tensor([row for row, _ in spans], dtype=torch.int64)
    mask = torch.zeros(len(spans), encoder.tokenizer.context_length, dtype=torch.bool)
    for number, (_, positions) in enumerate(spans):
        mask[number, positions] = True
    boxes = torch.tensor([[0.0, 0.0, width / 2, height]]).expand(len(spans), 4)
    measured = torch.full_like(row, int(Exclusion.MEASURED))
    phrases = Phrases(row, row, torch.zeros_like(row), mask, boxes, measured, [""] * len(spans))
    place, valid = torch.arange(rows), torch.ones(rows, dtype=torch.bool)
    return Batch(images, valid, place, tokens, place, torch.zeros_like(place), CAPTIONS, ["a", "b"], phrases)


def term(encoder: DualEncoder, objective: Grounding, batch: Batch) -> Any:
    """The objective's term of a training pass."""
    with objective.listening():
        image, text = (normalize(x, dim=1) for x in encoder(batch.images, batch.tokens))
    return objective(Step(encoder, batch, image, text, encoder.logit_scale.exp()))


def assert_gradient(encoder: DualEncoder, objective: Grounding) -> None:
    """Compare the gradient of the term with differences along random directions, which move every parameter."""
    objective.prepare(encoder)
    batch = hand_made(encoder, [(0, [1, 2]), (0, [3]), (0, [4, 5]), (1, [1]), (1, [1, 2])])
    found = term(encoder, objective, batch)
    assert found.logged["grounding_phrases"] > 1
    weights = [weight for weight in encoder.parameters() if weight.requires_grad]
    gradient = torch.autograd.grad(found.loss, weights, allow_unused=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        direction = [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in weights]
        # Each of length one, so that a small parameter counts as much as the table of token embeddings.
        direction = [each / each.norm() for each in direction]
        loss = []
        for step in (1e-5, -1e-5):
            with torch.no_grad(), shifted(weights, direction, step):
                loss.append(term(encoder, objective, batch).loss)
        slope = torch.stack([(g * d).sum() for g, d in zip(gradient, direction, strict=True)]).sum()
        torch.testing.assert_close((loss[0] - loss[1]) / 2e-5, slope, rtol=1e-6, atol=1e-9)


@contextmanager
def shifted(weights: list[nn.Parameter], direction: list[Tensor], step: float) -> Iterator[None]:
    """Move the weights along a direction, and back at the end."""
    kept = [weight.clone() for weight in weights]
    for weight, each in zip(weights, direction, strict=True):
        weight.add_(each, alpha=step)
    yield
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before)


@pytest.mark.parametrize("layers", [(-1, -1), (0, 0)])
@pytest.mark.parametrize("name", ["vit", "vit_layer_scale_quick_gelu", "vit_average_pool", "vit_custom_block"])
def test_the_gradient_through_towers_of_open_clip_is_that_of_differences(
    make_encoder: Callable[..., DualEncoder], name: str, layers: tuple[int, int]
) -> None:
    assert_gradient(make_encoder(name, torch.float64), Grounding(image_layer=layers[0], text_layer=layers[1]))


def test_the_gradient_of_every_parameter_alone_passes_gradcheck(make_encoder: Callable[..., DualEncoder]) -> None:
    encoder, objective = make_encoder("vit_layer_scale_quick_gelu", torch.float64), Grounding()
    objective.prepare(encoder)
    batch = hand_made(encoder, [(0, [1, 2]), (1, [1])])
    weights = [weight for weight in encoder.parameters() if weight.requires_grad]
    # gradcheck moves the parameters in place, so that the model itself need not be a function of them.
    assert torch.autograd.gradcheck(
        lambda *_: term(encoder, objective, batch).loss, weights, fast_mode=True, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_the_gradient_through_towers_of_transformers_is_that_of_differences(tmp_path: Path, name: str) -> None:
    from small_hugging_face import save_small  # here, so that the processes started below do not import it

    encoder = load_dual_encoder(f"hf:{save_small(name, tmp_path / name)}", None).double().eval()
    assert_gradient(encoder, Grounding())


def test_the_gradient_through_a_tower_of_timm_is_that_of_differences(tmp_path: Path) -> None:
    """With a text tower like that of SigLIP: without causal mask, read at its last token."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    text = TEXT | {"no_causal_mask": True, "pool_type": "last"}
    encoder = encoder_from({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, tmp_path)
    assert_gradient(encoder, Grounding())


def test_batch_statistics_and_unknown_towers_are_refused_before_training(
    make_encoder: Callable[..., DualEncoder],
) -> None:
    with pytest.raises(ValueError, match=r"batch statistics \(visual.bn1\).*take a model without BatchNorm"):
        Grounding().prepare(make_encoder("resnet"))
    towers: Any = "left"
    with pytest.raises(ValueError, match="towers is both, image or text; got 'left'"):
        Grounding(towers=towers)


def test_a_term_of_frozen_towers_alone_is_refused_before_training(
    architecture_file: Callable[[str], Path], make_encoder: Callable[..., DualEncoder], tmp_path: Path
) -> None:
    path, image, text = str(architecture_file("vit")), Grounding(towers="image"), Grounding(towers="text")
    frozen: list[tuple[Grounding, dict[str, Any]]] = [
        (image, {"freeze_image": "all"}),
        (image, {"lora": Lora(towers="text")}),
        (text, {"lora": Lora(towers="image")}),
    ]
    for objective, options in frozen:
        message = (
            rf"grounding trains the {objective.towers} tower alone, which is frozen: .* \(freeze_{objective.towers}"
        )
        with pytest.raises(ValueError, match=message):
            ContrastiveFineTuning(path, None, objectives=[Softmax(), objective], **options)
    ContrastiveFineTuning(path, None, objectives=[Softmax(), text], freeze_image="all")
    ContrastiveFineTuning(path, None, objectives=[Softmax(), Grounding()], lora=Lora(towers="text"))
    # By hand, after the task is made; the logit scale, which is of no tower, is left.
    task = ContrastiveModule(make_encoder(), objectives=[Softmax(), Grounding()])
    for name, parameter in task.encoder.named_parameters():
        parameter.requires_grad_(name.endswith("logit_scale"))
    with pytest.raises(ValueError, match="grounding trains the towers, which are both frozen"):
        trainer_in(tmp_path).fit(task, DataLoader([0]))  # type: ignore[arg-type] # a list is a data set


def test_the_gradients_of_the_two_towers_are_the_halves_of_that_of_both(
    make_encoder: Callable[..., DualEncoder],
) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    losses = []
    for towers in ("both", "image", "text"):
        encoder, objective = make_encoder("vit", torch.float64), Grounding(towers=towers)
        objective.prepare(encoder)
        loss = term(encoder, objective, hand_made(encoder, [(0, [1, 2]), (0, [3]), (1, [1])])).loss
        found[towers] = gradients(encoder, loss)
        losses.append(found[towers].pop("loss"))
        assert all(weight.requires_grad for weight in encoder.parameters())
    assert losses[0] == losses[1] == losses[2]
    image = {name for name in found["both"] if name.startswith("model.visual.")}
    assert found["image"].keys() == image
    assert found["text"].keys() == found["both"].keys() - image != set()
    for name, gradient in found["both"].items():
        half = found["image" if name in image else "text"][name]
        torch.testing.assert_close(half, gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_phrases_without_positive_attribution_are_counted_and_leave_no_nan(
    make_encoder: Callable[..., DualEncoder],
) -> None:
    """An image tower whose output ignores the image has maps of zeros."""
    encoder, objective = make_encoder("vit", torch.float64), Grounding()
    model: Any = encoder.model
    objective.prepare(encoder)
    with torch.no_grad():
        model.visual.proj.zero_()
        model.visual.proj[:, 0] = model.visual.ln_post.bias
        model.visual.ln_post.weight.zero_()
    found = term(encoder, objective, hand_made(encoder, [(0, [1, 2]), (1, [1])]))
    torch.autograd.backward(found.loss)
    assert found.loss == 0
    assert (found.logged["grounding_phrases"], found.logged["grounding_without_positive"]) == (0, 2)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in encoder.parameters())


def literal_attribution(tower: Any, inputs: Tensor, reference: Tensor) -> Tensor:
    """`(x - r) . J` of one input [1, ...]: [T, K], J the mean of whole Jacobians at two midpoints of the path."""
    hidden = tower.features_before(inputs)
    start = tower.features_before(reference, *([hidden.shape[1]] if inputs.ndim == 2 else []))
    tokens = [inputs] if inputs.ndim == 2 else []
    total = torch.zeros((), dtype=hidden.dtype)
    for alpha in (0.25, 0.75):
        point = start + alpha * (hidden - start)
        jacobian = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
            lambda x: tower.embed_from(x, *tokens)[0], point, create_graph=True
        )
        total = total + torch.einsum("td,ktd->tk", (hidden - start)[0], jacobian[:, 0]) / 2
    return total


def literal_grounding(encoder: DualEncoder, batch: Batch) -> Tensor:
    """The mean of -log gamma over the batch's phrases, one at a time (paper, Eqs. 6 and 9)."""
    image, text, phrases = encoder.image_at_layer(), encoder.text_at_layer(), batch.phrases
    size, terms = encoder.image_shape[1:], [0 * encoder.logit_scale]
    for r in (measurable(phrases.reason, phrases.boxes, image.grid, size) == 0).nonzero()[:, 0].tolist():
        seen, said = phrases.image_row[r : r + 1], phrases.caption_row[r : r + 1]
        at = literal_attribution(image, batch.images[seen], reference_image(encoder, "zeros")[None])
        of = literal_attribution(text, batch.tokens[said], encoder.tokenizer.padding_caption()[None])
        cells = image.on_grid(at @ (phrases.span_mask[r, : len(of)].to(of) @ of)).clamp(min=0)
        if cells.sum() > 0:
            gamma = (cells * patch_mask(phrases.boxes[r : r + 1], image.grid, size)[0]).sum() / cells.sum()
            terms.append(-gamma.clamp(min=1e-3).log())
    return torch.stack(terms).sum() / max(len(terms) - 1, 1)


def literal_softmax(encoder: DualEncoder, batch: Batch) -> Tensor:
    """CLIP's loss, one image and one caption at a time."""
    image, text = normalize(encoder.encode_image(batch.images)), normalize(encoder.encode_text(batch.tokens))
    total, count = torch.zeros((), dtype=torch.float64), len(image)
    for i in range(count):
        rows = [torch.exp(encoder.logit_scale.exp() * image[i] @ text[j]) for j in range(count)]
        columns = [torch.exp(encoder.logit_scale.exp() * image[j] @ text[i]) for j in range(count)]
        total = total - torch.log(rows[i] / sum(rows)) / 2 - torch.log(columns[i] / sum(columns)) / 2
    return total / count


def literal_sigmoid(encoder: DualEncoder, batch: Batch) -> Tensor:
    """SigLIP's loss, one pair at a time."""
    image, text = normalize(encoder.encode_image(batch.images)), normalize(encoder.encode_text(batch.tokens))
    total, count = torch.zeros((), dtype=torch.float64), len(image)
    for i in range(count):
        for j in range(count):
            logit = encoder.logit_scale.exp() * image[i] @ text[j] + encoder.model.logit_bias
            total = total - torch.log(1 / (1 + torch.exp(-(1 if i == j else -1) * logit)))
    return total / count


# Name -> objective and its literal formula. A new objective needs one entry.
FORMULAS: dict[str, tuple[Callable[[], Objective], Callable[[DualEncoder, Batch], Tensor]]] = {
    "softmax": (Softmax, literal_softmax),
    "sigmoid": (Sigmoid, literal_sigmoid),
    "grounding": (Grounding, literal_grounding),
}
PHRASES_FROM = (0, 4, 8)  # the first of eight images that has phrases: with 4 the first of two processes has none


class Loss(nn.Module):
    """An objective as a module, which DistributedDataParallel can hold."""

    def __init__(self, encoder: DualEncoder, objective: Objective) -> None:
        super().__init__()
        self.encoder, self.objective = encoder, objective

    def forward(self, batch: Batch) -> Tensor:
        with self.objective.listening():
            image, text = (normalize(x, dim=1) for x in self.encoder(batch.images, batch.tokens))
        step = Step(self.encoder, batch, image, text, self.encoder.logit_scale.exp())
        # A gradient of everything, which DistributedDataParallel waits for.
        rest = sum(0 * weight.sum() for weight in self.encoder.parameters() if weight.requires_grad)
        return self.objective(step).loss + rest


def encoder_of(config: str, objective: Objective) -> DualEncoder:
    """The same small model in float64 on every process."""
    torch.manual_seed(0)
    encoder = load_dual_encoder(config).double().eval()
    objective.prepare(encoder)
    return encoder


def share(encoder: DualEncoder, shapes: str, first: int, rank: int = 0, world: int = 1) -> Batch:
    """This process's part of eight pairs, of which those before `first` have no phrases."""
    labels = Manifest.load(Path(shapes)).labels
    collate = TrainingCollate(
        encoder.image_transform, encoder.tokenizer, label_names=labels, needs=BatchNeeds(phrases=True, boxes=True)
    )
    each = 8 // world
    batch = collate(records_of(Path(shapes), 8)[rank * each : (rank + 1) * each])
    phrases = batch.phrases.only((batch.phrases.image_row + rank * each >= first).nonzero()[:, 0])
    tokens = encoder.trim_tokens(batch.tokens).contiguous()
    return replace(batch, images=batch.images.double(), tokens=tokens, phrases=phrases)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and the gradients by name; those of zero are left out."""
    torch.autograd.backward(loss)
    found = {name.rpartition("encoder.")[2]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | {name: gradient for name, gradient in found.items() if gradient.any()}


def gradients_on_this_rank(config: str, shapes: str) -> list[dict[str, Tensor]]:
    """Of every objective, with phrases in all, in some and in no images."""
    found = []
    for make, _ in FORMULAS.values():
        for first in PHRASES_FROM:
            objective = make()
            encoder = encoder_of(config, objective)
            model = DistributedDataParallel(Loss(encoder, objective))
            batch = share(encoder, shapes, first, dist.get_rank(), dist.get_world_size())
            found.append(gradients(model, model(batch)))
    return found


def assert_literal(found: dict[str, Tensor], formula: Any, config: str, make: Any, shapes: str, first: int) -> None:
    """Compare with the gradients of a literal formula on all eight pairs."""
    encoder = encoder_of(config, make())
    with differentiable(encoder):
        expected = gradients(encoder, formula(encoder, share(encoder, shapes, first)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=f"{name}, from {first}")


@pytest.mark.parametrize("name", FORMULAS)
def test_an_objective_has_the_gradient_of_its_literal_formula(
    architecture_file: Callable[[str], Path], shapes: Path, name: str
) -> None:
    make, formula = FORMULAS[name]
    config, train = str(architecture_file("vit")), str(shapes / "train")
    for first in PHRASES_FROM if name == "grounding" else PHRASES_FROM[:1]:
        model = Loss(encoder_of(config, make()), make())
        model.objective.prepare(model.encoder)
        found = gradients(model, model(share(model.encoder, train, first)))
        assert_literal(found, formula, config, make, train, first)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_gradients_of_the_literal_formulas(
    architecture_file: Callable[[str], Path], shapes: Path, world: int
) -> None:
    config, train = str(architecture_file("vit")), str(shapes / "train")
    for found in run_distributed(gradients_on_this_rank, config, train, world_size=world, timeout=600):
        cases = ((make, formula, first) for make, formula in FORMULAS.values() for first in PHRASES_FROM)
        for each, (make, formula, first) in zip(found, cases, strict=True):
            assert_literal(each, formula, config, make, train, first)


def step_of_both_strategies(config: str, shapes: str, folder: str) -> list[list[dict[str, Tensor]]]:
    """Gradients of a step of the Trainer under DDP and FSDP2, by objective and by where phrases begin."""
    found = []
    for make, _ in FORMULAS.values():
        for first in PHRASES_FROM:
            pair = []
            for name in ("ddp", "fsdp"):
                torch.manual_seed(0)
                objective = make()
                task = ContrastiveFineTuning(config, None, objectives=[objective]).double()
                sharded = {"strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False), "devices": 2}
                recorder, batch = Recorder(), share(task.encoder, shapes, first, dist.get_rank(), 2)
                options: dict[str, Any] = join_lightning() if name == "ddp" else sharded
                trainer = trainer_in(Path(folder) / name, recorder, **options)
                trainer.fit(task, loader_of([batch, batch]))
                pair.append({key.removeprefix("module."): value for key, value in recorder.gradients[-1].items()})
            found.append(pair)
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(FSDPModule, "set_reshard_after_forward"), reason="this torch cannot shard an encoder")
def test_a_sharded_model_has_the_gradients_of_ddp_for_every_objective(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    where = str(architecture_file("vit")), str(shapes / "train"), str(tmp_path)
    for rank in run_distributed(step_of_both_strategies, *where, timeout=300):
        for plain, sharded in rank:
            assert plain.keys() == sharded.keys()
            for name, gradient in plain.items():
                torch.testing.assert_close(sharded[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_layers_that_sharding_does_not_go_with_are_refused(make_encoder: Callable[..., DualEncoder]) -> None:
    objective = Grounding(image_layer=0)
    objective.prepare(make_encoder("vit"))
    with pytest.raises(ValueError, match="only at the last blocks of open_clip's own transformers"):
        objective.check_sharding()
